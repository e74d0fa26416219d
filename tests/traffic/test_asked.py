"""What a metered request asks for, read in one pass or in steps; and what is added to its body."""

import asyncio
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

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
        (CHAT, {"max_tokens": "300.0"}, 300),
        (COMPLETIONS, {"max_tokens": " 5_000 "}, 5000),
        (MESSAGES, {"max_tokens": "+5.00"}, 5),
        (RESPONSES, {"max_output_tokens": "0005.0"}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 0}, 0),
    ],
)
def test_the_most_that_an_answer_may_have_is_read_as_vllm_reads_it(
    path: str, members: dict[str, object], most: int
) -> None:
    """In the member of the route, and in any spelling that vLLM takes."""
    found = asked(path, **members)
    assert (found.most, found.is_given) == (most, True)


_spelled = st.text("0159_+-. ", max_size=8) | st.from_regex(r"\s?[+-]?0?_?[0-9_]{1,5}(\.0{0,3})?\s?", fullmatch=True)
_lax_int, _lax_bool = TypeAdapter(int), TypeAdapter(bool)


def taken[T](adapter: TypeAdapter[T], value: object) -> T | None:
    """What pydantic makes of it as vLLM does; None where it refuses it."""
    try:
        return adapter.validate_python(value)
    except ValidationError:
        return None


@given(value=_spelled | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text())
@example("1e3")
@example("5.")
@example("\u0665")
@example("\xa05.0\u2003")
@example("00_5.0")
@example("0__5")
@example("0-5.0")
@example("0" * 5000 + "5")
@example("1_000_000.000")
def test_a_number_that_pydantic_takes_is_read_as_the_same_number(value: object) -> None:
    """In every spelling, by each member that counts; what only we can read is no matter, since vLLM refuses it."""
    number = taken(_lax_int, value)
    if number is not None:
        found = asked(max_tokens=value, n=value)
        assert found.is_given
        assert (found.most, found.samples) == (min(max(number, 0), 2**53), min(max(number, 1), 2**53))


@given(
    value=st.booleans() | st.integers(-1, 2) | st.sampled_from(["TRUE", "oN", "Y", "t", "1.0", " 1", "nO"]) | st.text()
)
def test_a_stream_that_pydantic_takes_for_one_is_read_as_one(value: object) -> None:
    """And what it takes for none is none."""
    streams = taken(_lax_bool, value)
    if streams is not None:
        assert asked(stream=value).streams is streams


@pytest.mark.parametrize("given_as", ["many", 1.5, [5], {"a": 5}, "5e3", "", "9" * 5000])
def test_what_cannot_be_read_is_given_and_bounds_nothing(given_as: object) -> None:
    """So a key with a bound refuses it; and no default of vLLM counts in its place, nor another member."""
    for found in (
        asked(CHAT, max_tokens=given_as),
        asked(CHAT, max_tokens=5, max_completion_tokens=given_as),
        asked(COMPLETIONS, max_tokens=given_as),
    ):
        assert (found.most, found.is_given) == (None, True)


def test_no_bound_is_where_the_route_has_none() -> None:
    """A null is none, and that of another route is none."""
    for found in (asked(CHAT, max_tokens=None), asked(CHAT, max_output_tokens=5)):
        assert (found.most, found.is_given) == (None, False)


@pytest.mark.parametrize("negative", [-1, -1e9, "-5", "-5.0", " -5_0 "])
def test_fewer_tokens_than_none_are_none(negative: object) -> None:
    """Nothing is given back to a limit by a request that vLLM refuses."""
    found = asked(CHAT, max_tokens=negative, n=negative)
    assert (found.most, found.is_given, found.samples) == (0, True, 1)


@pytest.mark.parametrize("n", [[], {}, "many", 1.5, "9" * 5000, ""])
def test_a_number_of_answers_that_cannot_be_read_is_refused(n: object) -> None:
    """As vLLM does, since nothing can be held for it."""
    body = json.dumps({"model": "chat", "n": n}).encode()
    for large in (False, True):
        with pytest.raises(RequestError) as refused:
            asyncio.run(read_large(body, CHAT)) if large else read(body, CHAT)
        assert (refused.value.code, refused.value.param) == ("bad_request", "n")


def test_every_answer_is_counted_that_a_request_brings() -> None:
    """`n` of each prompt; a list of tokens is one prompt."""
    assert asked(n=3).samples == 3
    assert asked(n="3").samples == asked(n="3.0").samples == 3
    assert asked(n=None).samples == asked(n=0).samples == 1
    assert asked(COMPLETIONS, prompt="a,b").samples == 1
    assert asked(COMPLETIONS, prompt=["a", "b,c", '"d",["e"'], n=2).samples == 6
    assert asked(COMPLETIONS, prompt=[1, 2, 3]).samples == 1
    assert asked(COMPLETIONS, prompt=[[1, 2, 3], [4]]).samples == 2
    assert asked(COMPLETIONS, prompt=[]).samples == asked(COMPLETIONS, prompt=[[]]).samples == 1
    assert asked(COMPLETIONS, prompt=[{"a": 1, "b": 2}, "c"]).samples == 1
    assert asked(COMPLETIONS, prompt_embeds=["a", "b", "c"], n=2).samples == 6
    assert asked(COMPLETIONS, prompt_embeds=["a", "b"], prompt=["c", "d"]).samples == 4
    assert asked(COMPLETIONS, prompt_embeds="a,b").samples == 1
    assert asked(BATCH, messages=[[{"role": "user", "content": "a"}]] * 3).samples == 3
    assert asked(CHAT, messages=[{"role": "user", "content": "a"}] * 3, prompt=["a", "b"]).samples == 1


@given(
    prompts=st.lists(st.text() | st.lists(st.integers()), min_size=1), spaces=st.text(" \r\n\t") | st.just(" " * 200)
)
def test_prompts_are_counted_alike_in_one_pass_and_in_steps(prompts: list[object], spaces: str) -> None:
    """Whatever their texts hold."""
    text = json.dumps(prompts, separators=(f",{spaces}", ":"), ensure_ascii=False)
    for path, name in ((COMPLETIONS, "prompt"), (BATCH, "messages")):
        body = f'{{"model":"chat","{name}":{spaces}[{spaces}{text[1:]}}}'.encode("utf-8", "surrogatepass")
        several = len(prompts)
        assert read(body, path).samples == asyncio.run(read_large(body, path)).samples == several


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
        assert asked(path, stream=true).options is not None
        assert asked(path, stream=true).streams
        assert asked(path, stream=true, stream_options={"include_usage": False}).options is not None
        assert asked(path, stream=true, stream_options={"include_usage": "no"}).options is not None
        assert asked(path, stream=true, stream_options={"continuous_usage_stats": True}).options is not None
        assert asked(path, stream=true, stream_options={"include_usage": true}).options is None
    for path in (MESSAGES, RESPONSES, EMBEDDINGS):
        assert asked(path, stream=true).options is None


@pytest.mark.parametrize("options", [5, "x", [1], {"include_usage": "perhaps"}, {"include_usage": []}])
def test_options_that_vllm_refuses_stay_refused(options: object) -> None:
    """Nothing is added that would hide them."""
    assert asked(stream=True, stream_options=options).options is None


@pytest.mark.parametrize("stream", [False, None, 0, "false", "off", [], "maybe"])
def test_what_does_not_stream_is_not_asked_for_usage(stream: object) -> None:
    """VLLM would refuse it."""
    found = asked(stream=stream)
    assert (found.streams, found.options) == (False, None)


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
@pytest.mark.parametrize("member", [b'"n":%s', b'"max_tokens":%s', b'"stream_options":{"x":%s}', b'"stream":%s'])
def test_a_number_beyond_all_bounds_is_refused(number: bytes, member: bytes) -> None:
    """Nothing is forwarded whose members were not read."""
    body = b'{"model":"chat","max_tokens":5,%s}' % (member % number)
    for large in (False, True):
        with pytest.raises(RequestError) as refused:
            asyncio.run(read_large(body, CHAT)) if large else read(body, CHAT)
        assert refused.value.code == "invalid_json"


def test_a_number_beyond_all_bounds_hides_no_later_member_of_its_name() -> None:
    """The last one is read, as vLLM reads it, or the body is refused."""
    body = b'{"model":"chat","max_tokens":1e999,"n":1e999,"max_tokens":200,"n":3}'
    found = asyncio.run(read_large(body, CHAT))
    assert (found.most, found.samples) == (200, 3)
    with pytest.raises(RequestError) as refused:
        read(body, CHAT)
    assert refused.value.code == "invalid_json"


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


@pytest.mark.parametrize("name", ["model", "stream_options", "n", "max_tokens"])
def test_a_large_value_of_what_is_looked_at_is_refused_and_not_decoded(name: str) -> None:
    """Tens of megabytes of it would hold the event loop for a second; of what is not looked at it is no matter."""
    long = b"[" + b"1," * 40_000 + b"1]"
    body = b'{"model":"chat","%s":%s}' % (name.encode(), long)
    with pytest.raises(RequestError, match=f"its {name} takes more than 64 KiB") as error:
        asyncio.run(read_large(body, CHAT))
    assert (error.value.code, error.value.param) == ("bad_request", name)
    assert asyncio.run(read_large(b'{"model":"chat","other":%s}' % long, CHAT)).model == "chat"
