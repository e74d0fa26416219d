"""What a moderated request says: the text of its last user turn, as vLLM's routes take it.

For `moderation`. What cannot be read as text (token ids, images, audio) is refused and never passed over: it would be
a way around the guard. Earlier turns, system prompts and tools are not looked at.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec

from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.body import BYTE_ORDER_MARK, no_json

# Of each route that generates, in which member the turns stand; the other routes run no prompt that is answered.
_MEMBERS = {
    "/v1/chat/completions": "messages",
    "/v1/chat/completions/batch": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/messages": "messages",
}
_BATCH = "/v1/chat/completions/batch"
_MOST_BYTES = 8 * 2**20  # of a body: its turns are told apart in one step of the event loop
_STEP = 1000  # messages that are looked at in one
_TEXT = frozenset({"text", "input_text", "output_text"})  # types of parts


class _Body(msgspec.Struct):
    messages: msgspec.Raw = msgspec.Raw(b"null")
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    input: msgspec.Raw = msgspec.Raw(b"null")
    prompt_embeds: msgspec.Raw = msgspec.Raw(b"null")


_body = msgspec.json.Decoder(_Body)
_items = msgspec.json.Decoder(list[msgspec.Raw])
_prompts = msgspec.json.Decoder(str | list[str] | None)


def is_checked(path: str) -> bool:
    """Whether requests to this route are checked."""
    return path in _MEMBERS


async def texts(body: bytes, path: str) -> list[str]:
    """The texts of a request to a route that is checked: one, or one for each of its prompts; empty ones left out.

    Raises:
        RequestError: `invalid_json`; `request_too_large`; `bad_request`, where there is something that is no text.

    """
    if len(body) > _MOST_BYTES:
        msg = f"cannot check this request: the model is moderated, and the body larger than {_MOST_BYTES // 2**20} MiB"
        raise RequestError("request_too_large", msg)
    name = _MEMBERS[path]
    try:
        asked = _body.decode(body[3:] if body.startswith(BYTE_ORDER_MARK) else body)
        if bytes(asked.prompt_embeds) != b"null":
            raise _unreadable("prompt_embeds", "embeddings")
        found = [text async for text in _texts(bytes(getattr(asked, name)), name, path)]
    except msgspec.ValidationError:
        raise _unreadable(name, "something that is no text") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise no_json(error) from None
    except RecursionError:
        raise no_json("its values are nested too deeply") from None
    return [text for text in found if text.strip()]


async def _texts(value: bytes, name: str, path: str) -> AsyncIterator[str]:
    if name == "prompt":
        for text in _of_prompts(value):
            yield text
    elif value.startswith(b"["):
        turns = _items.decode(value)
        for one in [_items.decode(each) for each in turns] if path == _BATCH else [turns]:
            yield await _last(one, name)
    elif isinstance(text := msgspec.json.decode(value), str) and name == "input":
        yield text
    elif text is not None:
        raise _unreadable(name, "something that is no text")


def _of_prompts(value: bytes) -> Sequence[str]:
    try:
        prompts = _prompts.decode(value)
    except msgspec.ValidationError:
        raise _unreadable("prompt", "token ids") from None
    return [prompts] if isinstance(prompts, str) else prompts or ()


async def _last(items: Sequence[msgspec.Raw], name: str) -> str:
    """The text of the last user turn, all messages of the user that follow each other; or of the last item."""
    turn: list[dict[str, Any]] = []  # the last message first
    for number, raw in enumerate(reversed(items)):
        if number % _STEP == _STEP - 1:
            await asyncio.sleep(0)
        item = msgspec.json.decode(raw)
        if not isinstance(item, dict):
            raise _unreadable(name, "a message that is no object")
        if item.get("role") == "user":
            turn.append(item)
        elif turn:
            break
    if not turn and items:
        turn = [msgspec.json.decode(items[-1])]
    found = (_content(item.get("content", item.get("output")), name) for item in reversed(turn))
    return "\n".join(text for texts in found for text in texts)


def _content(content: object, name: str) -> Iterator[str]:
    """The texts of a message's content: a text, or parts of it; what a tool gave back is text as well."""
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list | None):
        raise _unreadable(name, "something that is no text")
    for part in content or ():
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and part.get("type") in _TEXT and isinstance(part.get("text"), str):
            yield part["text"]
        elif isinstance(part, dict) and part.get("type") == "tool_result":
            yield from _content(part.get("content"), name)
        else:
            kind = part.get("type") if isinstance(part, dict) else None
            raise _unreadable(name, f"a part of type {kind[:40]!r}" if isinstance(kind, str) else "a part of no type")


def _unreadable(name: str, what: str) -> RequestError:
    msg = f"cannot check this request: the model is moderated, its guard reads text alone, and `{name}` holds {what}"
    return RequestError("bad_request", msg, param=name)
