"""What a metered request asks for, read in one pass or in steps; and what is added to its body."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.asked import Asked, read, read_large, with_most, with_usage

CHAT, COMPLETIONS, BATCH = "/v1/chat/completions", "/v1/completions", "/v1/chat/completions/batch"
MESSAGES, RESPONSES, EMBEDDINGS = "/v1/messages", "/v1/responses", "/v1/embeddings"


def asked(path: str = CHAT, /, **members: object) -> Asked:
    """What such a body asks for: the same in one pass and in steps."""
    body = json.dumps({"model": "chat", **members}).encode()
    found = read(body, path)
    stepwise = asyncio.run(read_large(body, path))
    assert stepwise.place is not None
    assert body[stepwise.place] == b'"chat"'
    for field in set(Asked.__struct_fields__) - {"place"}:
        assert getattr(found, field) == getattr(stepwise, field), field
    return found


def test_a_body_with_nothing_but_a_model_asks_for_what_vllm_does_then() -> None:
    """As many tokens as fit; 16 for completions; none where nothing is generated."""
    assert asked() == Asked("chat", streams=False, most=None, is_given=False, samples=1, binary=False)
    assert asked(COMPLETIONS).most == 16
    assert asked(RESPONSES).most is None
    assert asked("/generative_scoring").most is None
    assert asked(EMBEDDINGS).most == 0


@pytest.mark.parametrize(
    ("path", "members", "most"),
    [
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": None}, 5),
        (BATCH, {"max_completion_tokens": 7}, 7),
        (COMPLETIONS, {"max_tokens": 5}, 5),
        (MESSAGES, {"max_tokens": 5}, 5),
        (RESPONSES, {"max_output_tokens": 5}, 5),
        (CHAT, {"max_tokens": "5"}, 5),
        (CHAT, {"max_tokens": 5.0}, 5),
        (CHAT, {"max_tokens": True}, 1),
    ],
)
def test_the_most_that_an_answer_may_have_is_read_as_vllm_reads_it(
    path: str, members: dict[str, object], most: int
) -> None:
    """In the member of the route, and in any spelling that vLLM takes."""
    found = asked(path, **members)
    assert (found.most, found.is_given) == (most, True)


@pytest.mark.parametrize("given_as", [None, "many", 1.5, [5], {"a": 5}, "5e3", ""])
def test_what_vllm_refuses_is_no_bound(given_as: object) -> None:
    """Nobody gets past a limit by it: a bound of ours goes behind it."""
    found = asked(CHAT, max_tokens=given_as)
    assert (found.most, found.is_given) == (None, False)
    assert asked(CHAT, max_output_tokens=5).most is None  # of another route


def test_every_answer_is_counted_that_a_request_brings() -> None:
    """`n` of each prompt; a list of tokens is one prompt."""
    assert asked(n=3).samples == 3
    assert asked(n="3").samples == 3
    assert asked(n=None).samples == asked(n=0).samples == asked(n=[]).samples == 1
    assert asked(COMPLETIONS, prompt="a,b").samples == 1
    assert asked(COMPLETIONS, prompt=["a", "b,c", '"d",["e"'], n=2).samples == 6
    assert asked(COMPLETIONS, prompt=[1, 2, 3]).samples == 1
    assert asked(COMPLETIONS, prompt=[[1, 2, 3], [4]]).samples == 2
    assert asked(COMPLETIONS, prompt=[]).samples == asked(COMPLETIONS, prompt=[[]]).samples == 1
    assert asked(BATCH, messages=[[{"role": "user", "content": "a"}]] * 3).samples == 3
    assert asked(CHAT, messages=[{"role": "user", "content": "a"}] * 3, prompt=["a", "b"]).samples == 1


@given(prompts=st.lists(st.text() | st.lists(st.integers()), min_size=1), spaces=st.sampled_from(["", " ", "\n\t"]))
def test_prompts_are_counted_alike_in_one_pass_and_in_steps(prompts: list[object], spaces: str) -> None:
    """Whatever their texts hold."""
    text = json.dumps(prompts, separators=(f",{spaces}", ":"), ensure_ascii=False)
    body = f'{{"model":"chat","prompt":[{spaces}{text[1:]}}}'.encode("utf-8", "surrogatepass")
    several = len(prompts)
    assert read(body, COMPLETIONS).samples == asyncio.run(read_large(body, COMPLETIONS)).samples == several


def test_files_in_a_body_are_seen() -> None:
    """As data URLs."""
    assert asked(messages=[{"content": [{"image_url": {"url": "data:image/png;base64,AAAA"}}]}]).binary
    assert not asked(messages=[{"content": "base64,"}]).binary
    body = b'{"model":"chat","a":"%s;base64,"}' % (b"x" * (1024 * 1024 - 22))  # across the edge of a step
    assert asyncio.run(read_large(body, CHAT)).binary


@pytest.mark.parametrize("true", [True, 1, 1.0, "true", "True", "1", "yes", "on"])
def test_a_stream_without_usage_is_asked_for_it(true: object) -> None:
    """Of chat and completions alone; the others tell it by themselves."""
    for path in (CHAT, COMPLETIONS):
        assert asked(path, stream=true).adds_usage
        assert asked(path, stream=true).streams
        assert asked(path, stream=true, stream_options={"include_usage": False}).adds_usage
        assert asked(path, stream=true, stream_options={"include_usage": "no"}).adds_usage
        assert asked(path, stream=true, stream_options={"continuous_usage_stats": True}).adds_usage
        assert not asked(path, stream=true, stream_options={"include_usage": true}).adds_usage
    for path in (MESSAGES, RESPONSES, EMBEDDINGS):
        assert not asked(path, stream=true).adds_usage


@pytest.mark.parametrize("options", [5, "x", [1], {"include_usage": "perhaps"}, {"include_usage": []}])
def test_options_that_vllm_refuses_stay_refused(options: object) -> None:
    """Nothing is added that would hide them."""
    assert not asked(stream=True, stream_options=options).adds_usage


@pytest.mark.parametrize("stream", [False, None, 0, "false", "off", [], "maybe"])
def test_what_does_not_stream_is_not_asked_for_usage(stream: object) -> None:
    """VLLM would refuse it."""
    found = asked(stream=stream)
    assert (found.streams, found.adds_usage) == (False, False)


def test_usage_is_asked_for_and_what_the_client_set_is_kept() -> None:
    """But for usage in every event, which had no effect before."""
    body = b'{"model":"chat","stream":true,"stream_options":{"other":1,"continuous_usage_stats":true}}\n'
    options = read(body, CHAT).options
    assert options is not None
    added = with_usage(body, options)
    assert added.startswith(body.rstrip()[:-1])
    wanted = {"other": 1, "continuous_usage_stats": False, "include_usage": True}
    assert json.loads(added)["stream_options"] == wanted
    assert json.loads(with_usage(b'{"model":"chat"}', {})) == {
        "model": "chat",
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("path", "member"),
    [(CHAT, "max_completion_tokens"), (BATCH, "max_completion_tokens"), (COMPLETIONS, "max_tokens"),
     (MESSAGES, "max_tokens"), (RESPONSES, "max_output_tokens"), (EMBEDDINGS, None)],
)  # fmt: skip
def test_a_bound_goes_into_the_member_of_the_route(path: str, member: str | None) -> None:
    """As the last one, which counts; where nothing is generated the body stays as it is."""
    body = b'{"model":"chat","max_completion_tokens":null,"max_tokens":null}'
    bounded = with_most(body, path, 50)
    if member is None:
        assert bounded == body
    else:
        assert json.loads(bounded)[member] == 50
        assert asked(path, **json.loads(bounded)).most == 50


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"model":"chat"', b'{"model":"chat"} x', b"\xff\xfe{", b'{"a":' + b"[" * 5000]
)
def test_a_body_that_is_no_json_is_refused(body: bytes) -> None:
    """As for callers who are not metered."""
    with pytest.raises(RequestError) as refused:
        read(body, CHAT)
    assert refused.value.code == "invalid_json"


@pytest.mark.parametrize("number", [b"1e400", b"1" + b"0" * 5000])
def test_a_number_beyond_all_bounds_is_for_the_engine_to_refuse(number: bytes) -> None:
    """The request is passed on, and a bound of ours goes behind it."""
    body = b'{"model":"chat","n":%s,"max_tokens":%s,"stream_options":{"x":%s}}' % (number, number, number)
    for found in (read(body, CHAT), asyncio.run(read_large(body, CHAT))):
        assert (found.model, found.most, found.samples) == ("chat", None, 1)


@pytest.mark.parametrize("body", [b"{}", b"[]", b"5", b'{"model":""}', b'{"model":5}', b'{"prompt":["a"]}'])
def test_a_body_that_names_no_model_is_refused(body: bytes) -> None:
    """In one pass and in steps."""
    for path in (CHAT, COMPLETIONS):
        with pytest.raises(RequestError) as refused:
            read(body, path)
        assert refused.value.code == "missing_model"
        with pytest.raises(RequestError) as refused:
            asyncio.run(read_large(body, path))
        assert refused.value.code == "missing_model"


def test_of_members_of_one_name_the_last_one_counts() -> None:
    """As in vLLM."""
    body = b'\xef\xbb\xbf{"model":"a","max_tokens":5,"model":"b","max_tokens":7,"metadata":{"max_tokens":9}}'
    for found in (read(body, CHAT), asyncio.run(read_large(body, CHAT))):
        assert (found.model, found.most) == ("b", 7)
