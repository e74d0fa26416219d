"""What a moderated request says: nothing that a model would read as the user's last turn is missed."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.errors import RequestError
from vllm_proxy.traffic import routes, user_turn

CHAT, BATCH, RESPONSES = "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"


async def texts(path: str, body: object) -> list[str]:
    """The texts of a request."""
    return await user_turn.texts(body if isinstance(body, bytes) else json.dumps(body).encode(), path)


def user(content: object) -> dict[str, object]:
    """A message of the user."""
    return {"role": "user", "content": content}


def other(content: object, role: str = "assistant") -> dict[str, object]:
    """A message of somebody else."""
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("path", "body", "found"),
    [
        (CHAT, {"messages": [user("a"), other("b"), user("c")]}, ["c"]),
        (CHAT, {"messages": [other("s", "system"), user("a"), user("b"), other("c"), other("d", "tool")]}, ["a\nb"]),
        (CHAT, {"messages": [user([{"type": "text", "text": "a"}, "b"])]}, ["a\nb"]),
        (CHAT, {"messages": [other("s", "developer"), other("t", "tool")]}, ["t"]),
        (CHAT, {"messages": [user(None), other("x")]}, []),
        (CHAT, {"messages": [user("  ")]}, []),
        (CHAT, {"messages": []}, []),
        (CHAT, {}, []),
        (CHAT, b'{"messages": [], "messages": [{"role": "user", "content": "b"}]}', ["b"]),
        (CHAT, b'\xef\xbb\xbf{"mess\\u0061ges": [{"role": "us\\u0065r", "content": "b\\u0061d"}]}', ["bad"]),
        (BATCH, {"messages": [[user("a")], [user("b"), other("c")]]}, ["a", "b"]),
        ("/v1/completions", {"prompt": "a"}, ["a"]),
        ("/v1/completions", {"prompt": ["a", "", "b"], "prompt_embeds": None}, ["a", "b"]),
        (RESPONSES, {"input": "a"}, ["a"]),
        (RESPONSES, {"input": [user([{"type": "input_text", "text": "a"}]), {"type": "reasoning", "id": "r"}]}, ["a"]),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": "a"}]}, ["a"]),
        ("/v1/messages",
         {"messages": [user([{"type": "tool_result", "content": [{"type": "text", "text": "a"}]},
                             {"type": "tool_result", "content": "b"}, {"type": "text", "text": "c"}])]}, ["a\nb\nc"]),
    ],
)  # fmt: skip
async def test_the_last_user_turn_is_found(path: str, body: object, found: list[str]) -> None:
    """All messages of the user that follow each other; where there is none, the last message, whoever's it is."""
    assert await texts(path, body) == found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1, 2]}),
        ("/v1/completions", {"prompt": [[1], [2]]}),
        ("/v1/completions", {"prompt": {"prompt_token_ids": [1]}}),
        ("/v1/completions", {"prompt_embeds": ["AAAA"]}),
        (CHAT, {"messages": [user([{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "a"}])]}),
        (CHAT, {"messages": [user([{"type": "text", "text": ["a"]}])]}),
        (CHAT, {"messages": [user([{"image_url": "x"}])]}),
        (CHAT, {"messages": [user([7])]}),
        (CHAT, {"messages": [user(7)]}),
        (CHAT, {"messages": [user({"type": "text"})]}),
        (CHAT, {"messages": ["a"]}),
        (CHAT, {"messages": {"0": user("a")}}),
        (CHAT, {"messages": "a"}),
        (BATCH, {"messages": [user("a")]}),
        ("/v1/messages", {"messages": [user([{"type": "tool_result", "content": [{"type": "image"}]}])]}),
        ("/v1/messages", {"messages": [user([{"type": "document", "source": {}}])]}),
        (RESPONSES, {"input": 7}),
    ],
)  # fmt: skip
async def test_what_is_no_text_is_refused(path: str, body: object) -> None:
    """400, naming the member; never passed over."""
    with pytest.raises(RequestError) as found:
        await texts(path, body)
    assert (found.value.code, found.value.status) == ("bad_request", 400)
    assert "its guard reads text alone" in found.value.message


async def test_what_is_no_json_or_too_large_is_refused() -> None:
    """As on any route; what cannot be looked at in a moment is not looked at."""
    for body in (b"", b"{", b'"x"', b"\xff\xfe", b'{"messages": [' + b"[" * 100_000):
        with pytest.raises(RequestError) as found:
            await texts(CHAT, body)
        assert found.value.status == 400
    with pytest.raises(RequestError) as found:
        await texts(CHAT, b" " * (8 * 2**20 + 1))
    assert found.value.code == "request_too_large"


def test_every_route_that_generates_from_text_is_checked() -> None:
    """Of those that name a model in JSON: a new route has to be placed on one of the two sides."""
    named = set(routes.paths("json"))
    checked = {path for path in named if user_turn.is_checked(path)}
    assert checked == {CHAT, BATCH, "/v1/completions", RESPONSES, "/v1/messages"}
    assert named - checked == {
        "/v1/embeddings", "/v1/messages/count_tokens", "/v1/rerank", "/rerank", "/v2/rerank", "/v1/score", "/score",
        "/generative_scoring", "/classify", "/pooling", "/tokenize", "/detokenize", "/v2/embed",
    }  # fmt: skip


CONTENT: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "role", "content", "output"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(CONTENT)
async def test_any_body_is_read_or_refused(value: object) -> None:
    """Whatever the JSON, it is texts or a RequestError."""
    for path, member in ((CHAT, "messages"), (BATCH, "messages"), (RESPONSES, "input"), ("/v1/completions", "prompt")):
        try:
            found = await texts(path, {member: value})
        except RequestError as error:
            found = [error.code]
        assert all(text.strip() for text in found)
