"""What a metered request asks for: its model, whether it streams, how much it may put out; and what is added to it.

Only for callers whose tokens are counted; for all others `body.model_name` is enough. Values are read as vLLM reads
them, which takes "5.0" for 5 and "yes" for true: nobody gets past a limit by another spelling, and what cannot be read
bounds nothing. What is added to a body becomes its last member: of members of one name vLLM takes the last one, so what
the client sent stays as it is.
"""

import asyncio
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_proxy.domain.tokens import asks_for_usage
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.body import (
    BYTE_ORDER_MARK,
    members_of_large,
    model_name,
    no_json,
    usable,
    value_at,
    with_member,
)
from vllm_proxy.traffic.prompt import NAMES, NOTHING, Members, members_at
from vllm_proxy.traffic.scan import count_elements

_BINARY = b";base64,"  # of a data URL
_SLICE = 1024 * 1024
_COMPLETIONS = "/v1/completions"
_RESPONSES = "/v1/responses"
_BATCH = "/v1/chat/completions/batch"
_COMPLETIONS_DEFAULT = 16  # vLLM's `max_tokens` of /v1/completions
_MANY = {_COMPLETIONS: ("prompt", "prompt_embeds"), _BATCH: ("messages",)}  # where several prompts may stand
_SEVERAL = re.compile(rb'\[[ \t\r\n]*+["\[]')  # a list of texts or of lists; a list of tokens is one prompt
# A text that pydantic may take for a whole number, without the space around it: also "0__5", and "0-5" for -5.
_WHOLE = re.compile(r"([0-9_+-]*[0-9])(?:\.0+)?")
_NO_DIGITS = str.maketrans("", "", "_+-")
_HUGE = 2**53  # more than any engine has, and a float still
_MOST = {  # in which members a route takes the most tokens of an answer, what counts most at first
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    _BATCH: ("max_completion_tokens", "max_tokens"),
    _COMPLETIONS: ("max_tokens",),
    "/v1/messages": ("max_tokens",),
    _RESPONSES: ("max_output_tokens",),
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
    enable_response_messages: Any = None
    n: Any = None


class _Whole(Members):
    """The same, and the members of its prompt, which may be several, not decoded yet."""

    stream: Any = None
    stream_options: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    enable_response_messages: Any = None
    n: Any = None
    prompt_embeds: msgspec.Raw = NOTHING


_FIELDS = frozenset(name.encode() for name in _Body.__struct_fields__)
_body = msgspec.json.Decoder(_Body)
_whole = msgspec.json.Decoder(_Whole)
_elements = msgspec.json.Decoder(list[msgspec.Raw])


class Asked(msgspec.Struct, frozen=True):
    """What a request asks for."""

    model: str
    streams: bool
    most: (
        int | None
    )  # tokens of one answer at most, as it says or as vLLM's default is; None: as many as fit, or unread
    is_given: bool  # whether the client said so, or something there that is no number
    samples: int  # answers: `n` times the number of prompts
    binary: bool  # whether there are files in it, as data URLs
    options: Mapping[str, object] | None = (
        None  # its `stream_options`, where its stream does not tell the usage as it is
    )
    place: slice | None = None  # of the model's name in a large body
    members: Members | None = None  # of its prompt, where they were wanted
    is_quoted: bool = False  # whether the answer has, behind its usage, texts of the client's that may look like one


def read(body: bytes, path: str, *, whole: bool = False) -> Asked:
    """What a body below `body.LARGE` asks for on the route `path`. `whole`: the members of its prompt too.

    Raises:
        RequestError: `invalid_json`, `missing_model` or `bad_request`.

    """
    several = _MANY.get(path)
    try:
        found = (_whole if whole or several else _body).decode(body[3:] if body.startswith(BYTE_ORDER_MARK) else body)
        prompts = 1
        if several and isinstance(found, _Whole):
            prompts = _prompts(found.messages) if path == _BATCH else _prompts(found.prompt, found.prompt_embeds)
    except msgspec.ValidationError:
        model_name(body)  # tells of what is no object
        raise no_json("a number in it is out of range") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise no_json(error) from None
    except RecursionError:
        raise no_json("its values are nested too deeply") from None
    members = found if whole and isinstance(found, _Whole) else None
    return _asked(found, path, prompts, binary=body.rfind(_BINARY) >= 0, place=None, members=members)


async def read_large(body: bytes, path: str, *, whole: bool = False) -> Asked:
    """As `read`, a slice at a time with the event loop in between."""
    several = [name.encode() for name in _MANY.get(path, ())]
    spans = await members_of_large(body, _FIELDS.union(several, NAMES if whole else ()))
    found = _Body()
    for name in spans.keys() & _FIELDS:
        setattr(found, name.decode(), value_at(body, spans, name))
    prompts = 0
    for name in spans.keys() & several:
        count = 1
        for count in count_elements(body, *spans[name]):  # noqa: B007 - the last one counts
            await asyncio.sleep(0)
        prompts += count
    place = slice(*spans[b"model"]) if b"model" in spans else None
    members = members_at(body, spans) if whole else None
    return _asked(found, path, prompts, binary=await _is_binary(body), place=place, members=members)


async def _is_binary(body: bytes) -> bool:
    for start in range(0, len(body), _SLICE):
        if body.find(_BINARY, start, start + _SLICE + len(_BINARY)) >= 0:
            return True
        await asyncio.sleep(0)
    return False


def _prompts(*values: msgspec.Raw) -> int:
    """How many prompts there are in the values of these members."""
    count = 0
    for value in values:
        if value is not NOTHING:
            count += len(_elements.decode(value)) if _SEVERAL.match(value) else 1
    return count


def _asked(
    found: _Body | _Whole, path: str, prompts: int, *, binary: bool, place: slice | None, members: Members | None
) -> Asked:
    streams = found.stream is True or (found.stream is not None and _is_true(found.stream))
    names = _MOST.get(path)
    if names is None:
        most, is_given = None if path == _OPEN else 0, False
    else:
        value = getattr(found, names[0])
        if value is None:
            value = getattr(found, names[-1])
        is_given = value is not None
        most = _bound(value, least=0) if is_given else _COMPLETIONS_DEFAULT if path == _COMPLETIONS else None
    return Asked(
        usable(found.model),
        streams,
        most,
        is_given,
        max(prompts, 1) * (1 if found.n is None else _answers(found.n)),
        binary,
        _options(found.stream_options) if streams and asks_for_usage(path) else None,
        place,
        members,
        path == _RESPONSES and _is_true(found.enable_response_messages),
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


def _answers(value: object) -> int:
    number = _bound(value, least=1)
    if number is None:
        raise RequestError("bad_request", "cannot answer: `n` is no whole number", param="n")
    return number


def _bound(value: object, *, least: int) -> int | None:
    """A number that is there, within what can be counted; None where it cannot be read."""
    number = _number(value)
    return None if number is None else min(max(number, least), _HUGE)


def _number(value: object) -> int | None:
    """A whole number as pydantic takes it, also as a text; None for anything else, which vLLM refuses."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if not isinstance(value, str) or (whole := _WHOLE.fullmatch(value.strip())) is None:
        return None
    try:
        number = int(whole[1].translate(_NO_DIGITS).lstrip("0") or 0)
    except ValueError:
        return None  # more digits than Python takes
    return -number if "-" in whole[1] else number


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
