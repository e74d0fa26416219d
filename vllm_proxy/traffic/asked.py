"""What a metered request asks for: its model, whether it streams, how much it may put out; and what is added to it.

Only for callers whose tokens are counted; for all others `body.model_name` is enough. Values are read as vLLM reads
them, which takes "5" for 5 and "yes" for true: nobody gets past a limit by another spelling. What is added to a body
becomes its last member: of members of one name vLLM takes the last one, so what the client sent stays as it is.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_proxy.domain.tokens import asks_for_usage
from vllm_proxy.traffic.body import BYTE_ORDER_MARK, check_encoding, model_name, no_json, usable, with_member
from vllm_proxy.traffic.scan import count_elements, find_members

_BINARY = b";base64,"  # of a data URL
_SLICE = 1024 * 1024
_COMPLETIONS = "/v1/completions"
_BATCH = "/v1/chat/completions/batch"
_COMPLETIONS_DEFAULT = 16  # vLLM's `max_tokens` of /v1/completions
_MANY = {_COMPLETIONS: b"prompt", _BATCH: b"messages"}  # where several prompts may stand
_MOST = {  # in which members a route takes the most tokens of an answer, what counts most at first
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    _BATCH: ("max_completion_tokens", "max_tokens"),
    _COMPLETIONS: ("max_tokens",),
    "/v1/messages": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
_OPEN = "/generative_scoring"  # generates too: a token for each item
_TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})
_FALSE = frozenset({"0", "false", "f", "no", "n", "off"})


class _Body(msgspec.Struct):
    """The fields of a body that are needed here; the others are skipped, not decoded."""

    model: Any = None
    stream: Any = None
    stream_options: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None


_NOTHING = msgspec.Raw(b"null")


class _Many(_Body):
    """Also what may be several prompts, not decoded yet."""

    prompt: msgspec.Raw = _NOTHING
    messages: msgspec.Raw = _NOTHING


_FIELDS = frozenset(name.encode() for name in _Body.__struct_fields__)
_body = msgspec.json.Decoder(_Body)
_many = msgspec.json.Decoder(_Many)
_elements = msgspec.json.Decoder(list[msgspec.Raw])


class Asked(msgspec.Struct, frozen=True):
    """What a request asks for."""

    model: str
    streams: bool
    most: int | None  # tokens of one answer at most, as it says or as vLLM's default is; None: as many as fit
    is_given: bool  # whether the client said so
    samples: int  # answers: `n` times the number of prompts
    binary: bool  # whether there are files in it, as data URLs
    options: Mapping[str, object] | None = (
        None  # its `stream_options`, where its stream does not tell the usage as it is
    )
    place: slice | None = None  # of the model's name in a large body

    @property
    def adds_usage(self) -> bool:
        """Whether it takes `with_usage` to have the usage told, and the event with it is not for the client."""
        return self.options is not None


def read(body: bytes, path: str) -> Asked:
    """What a body below `body.LARGE` asks for on the route `path`.

    Raises:
        RequestError: `invalid_json` or `missing_model`.

    """
    several = _MANY.get(path)
    try:
        found = (_many if several else _body).decode(body[3:] if body.startswith(BYTE_ORDER_MARK) else body)
        prompts = _prompts(found.prompt if several == b"prompt" else found.messages) if isinstance(found, _Many) else 1
    except msgspec.ValidationError:
        found, prompts = _Body(model_name(body)), 1  # no object, or a number that only the engine may refuse
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise no_json(error) from None
    except RecursionError:
        raise no_json("its values are nested too deeply") from None
    return _asked(found, path, prompts, binary=body.rfind(_BINARY) >= 0, place=None)


async def read_large(body: bytes, path: str) -> Asked:
    """As `read`, a slice at a time with the event loop in between."""
    check_encoding(body)
    several = _MANY.get(path)
    spans: Mapping[bytes, tuple[int, int]] = {}
    for spans in find_members(body, _FIELDS | {several} if several else _FIELDS):  # noqa: B007 - the last one counts
        await asyncio.sleep(0)
    found = _Body()
    try:
        for name in spans.keys() & _FIELDS:
            with contextlib.suppress(msgspec.ValidationError):  # a number that only the engine may refuse
                setattr(found, name.decode(), msgspec.json.decode(body[slice(*spans[name])]))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise no_json(error) from None
    except RecursionError:
        raise no_json("its values are nested too deeply") from None
    prompts = 1
    if several and several in spans and _are_several(body[slice(*spans[several])][:64]):
        for prompts in count_elements(body, *spans[several]):  # noqa: B007 - the last one counts
            await asyncio.sleep(0)
    place = slice(*spans[b"model"]) if b"model" in spans else None
    return _asked(found, path, prompts, binary=await _is_binary(body), place=place)


async def _is_binary(body: bytes) -> bool:
    for start in range(0, len(body), _SLICE):
        if body.find(_BINARY, start, start + _SLICE + len(_BINARY)) >= 0:
            return True
        await asyncio.sleep(0)
    return False


def _prompts(value: msgspec.Raw) -> int:
    """How many prompts there are: a list of texts or of lists is several, a list of tokens is one."""
    return max(len(_elements.decode(value)), 1) if _are_several(bytes(memoryview(value)[:64])) else 1


def _are_several(begin: bytes) -> bool:
    return begin[:1] == b"[" and begin[1:].lstrip()[:1] in {b'"', b"["}


def _asked(found: _Body, path: str, prompts: int, *, binary: bool, place: slice | None) -> Asked:
    streams = found.stream is True or (found.stream is not None and _is_true(found.stream))
    names = _MOST.get(path)
    if names is None:
        most, is_given = None if path == _OPEN else 0, False
    else:
        most = _number(getattr(found, names[0]))
        if most is None and names[-1] is not names[0]:
            most = _number(getattr(found, names[-1]))
        is_given = most is not None
        if not is_given and path == _COMPLETIONS:
            most = _COMPLETIONS_DEFAULT
    return Asked(
        usable(found.model),
        streams,
        most,
        is_given,
        prompts if found.n is None else prompts * max(_number(found.n) or 1, 1),
        binary,
        _options(found.stream_options) if streams and asks_for_usage(path) else None,
        place,
    )


def _options(given: object) -> Mapping[str, object] | None:
    """The options of a stream without usage; None of one that tells it, and of what vLLM refuses."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        return None
    include = given.get("include_usage")
    return given if include is None or include is False or _is_false(include) else None


def _is_true(value: object) -> bool:
    return value == 1 or (isinstance(value, str) and value.lower() in _TRUE)  # `True` is 1


def _is_false(value: object) -> bool:
    return value == 0 or (isinstance(value, str) and value.lower() in _FALSE)


def _number(value: object) -> int | None:
    """A whole number, also as a text; None for anything else, which vLLM refuses."""
    if value is None:
        return None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return int(value) if isinstance(value, str) else None
    except ValueError:
        return None


def with_usage(body: bytes, options: Mapping[str, object]) -> bytes:
    """The body of a request whose stream then tells its usage. `options`: what it has as `stream_options`.

    Raises:
        RequestError: as `body.with_member`.

    """
    # Without usage `continuous_usage_stats` had no effect, with it every event would have its own.
    asked = {**options, "include_usage": True, "continuous_usage_stats": False} if options else {"include_usage": True}
    return with_member(body, "stream_options", msgspec.json.encode(asked))


def with_most(body: bytes, path: str, tokens: int) -> bytes:
    """The body of a request to `path` whose answer has at most so many tokens; as it is where none are generated.

    Raises:
        RequestError: as `body.with_member`.

    """
    names = _MOST.get(path)
    return body if names is None else with_member(body, names[0], b"%d" % tokens)
