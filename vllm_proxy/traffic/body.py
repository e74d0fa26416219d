"""Reads the bodies of requests up to a limit, and finds the `model` in them without decoding the rest.

For the inference routes and for writes of the configuration. A large body is searched in slices, so that other streams
go on. Which endpoint serves the model is up to `registry`.
"""

import asyncio
from collections.abc import Collection
from typing import Any

import msgspec
from aiohttp import StreamReader

from vllm_proxy.domain.config import Server
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.budget import Budget, Holder
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.framing import check_codings, check_expectation, send_continue
from vllm_proxy.traffic.prompt import Members
from vllm_proxy.traffic.scan import Spans, find_members

_LONGEST_VALUE = 64 * 1024  # bytes of a member that is looked at: a name, a number, options
LARGE = 1024 * 1024  # from here on a body is searched in slices, so that other streams are not blocked


class _Named(msgspec.Struct):
    """The one field of a body that is needed here; the others are skipped, not decoded."""

    model: Any = None


_named = msgspec.json.Decoder(_Named)
_members = msgspec.json.Decoder(Members)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # not JSON's, but engines take it
# Engines would take these too, as UTF-16 or UTF-32: a text may then mean one thing to them and another one here.
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF_8 = "expected UTF-8, got another encoding"


def check_head(call: Call, server: Server, budget: Budget) -> None:
    """Refuse a body that cannot be taken before any of it is read; send 100 Continue to a client that waits for it.

    Raises:
        RequestError: `request_too_large`, `overloaded`, `unsupported_media_type`, `bad_request` or
            `expectation_failed`.

    """
    length = call.head.get(b"content-length")
    if length is not None:
        budget.check_length(int(length), server)
    _check_framing(call)
    if b"expect" in call.head and check_expectation(call.request, call.head[b"expect"].decode("latin-1")):
        send_continue(call.request)


def _check_framing(call: Call) -> None:
    head = call.head
    if b"transfer-encoding" in head or b"content-encoding" in head:
        check_codings(
            head.get(b"transfer-encoding", b"chunked").decode("latin-1"),
            head.get(b"content-encoding", b"").decode("latin-1"),
        )


def body_at_hand(call: Call, server: Server, budget: Budget) -> bytes:
    """A body that came together with its head, as small ones do; b"" where there is more to wait for.

    Raises:
        RequestError: as `check_head`.

    """
    content = call.request.content
    if not content.is_eof() or b"expect" in call.head:
        return b""
    _check_framing(call)
    data = content.read_nowait()
    call.held = len(data)  # inlined from `budget.take`, which is called where there is something to refuse
    budget.held += call.held
    if call.held > server.max_body_size or budget.held > server.max_buffered:
        budget.take(call, 0, server)
    return data


async def read_body(call: Call, server: Server, budget: Budget) -> bytes:
    """The whole body.

    Raises:
        RequestError: as `check_head`, and `request_timeout` where it stops coming.

    """
    check_head(call, server, budget)
    return await read_content(call.request.content, call, server, budget)


async def read_content(content: StreamReader, holder: Holder, server: Server, budget: Budget) -> bytes:
    """As `read_body`, of a request whose head has been looked at."""
    parts = []
    while not content.at_eof():
        part = await content.readany()
        budget.take(holder, len(part), server)
        parts.append(part)
    return b"".join(parts)


def model_name(body: bytes) -> str:
    """The `model` of a JSON body.

    Raises:
        RequestError: `invalid_json` or `missing_model`.

    """
    try:
        name = _named.decode(body[3:] if body.startswith(BYTE_ORDER_MARK) else body).model
    except msgspec.ValidationError:
        name = None  # JSON, but no object
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise no_json(error) from None
    except RecursionError:
        raise no_json("its values are nested too deeply") from None
    return usable(name)


def members(body: bytes) -> Members:
    """The members of its prompt, of a body below `LARGE`, with its model, which has yet to be looked at.

    Raises:
        RequestError: `invalid_json` or `missing_model`.

    """
    try:
        return _members.decode(body[3:] if body.startswith(BYTE_ORDER_MARK) else body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Members(model_name(body))  # tells what is wrong


async def model_name_of_large(body: bytes) -> tuple[str, slice]:
    """As `model_name`, a slice at a time with the event loop in between; and where the name stands."""
    spans = await members_of_large(body, frozenset({b"model"}))
    return named_at(body, spans), slice(*spans.get(b"model", (0,)))


async def members_of_large(body: bytes, names: Collection[bytes]) -> Spans:
    """Where these members of a large body stand, those that it has.

    Raises:
        RequestError: `invalid_json`.

    """
    check_encoding(body)
    spans: Spans = {}
    for spans in find_members(body, names):  # noqa: B007 - the last one counts
        await asyncio.sleep(0)
    return spans


def named_at(body: bytes, spans: Spans) -> str:
    """As `model_name`, of a body whose members stand there."""
    return usable(value_at(body, spans, b"model") if b"model" in spans else None)


def value_at(body: bytes, spans: Spans, name: bytes) -> Any:  # noqa: ANN401 - JSON
    """The value of a member of a large body, which is decoded in one step: one that is large is refused.

    Raises:
        RequestError: `invalid_json`, `bad_request`.

    """
    begin, end = spans[name]
    if end - begin > _LONGEST_VALUE:
        msg = f"cannot read the body: its {name.decode()} takes more than {_LONGEST_VALUE // 1024} KiB"
        raise RequestError("bad_request", msg, param=name.decode())
    try:
        return msgspec.json.decode(body[begin:end])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise no_json(error) from None
    except RecursionError:
        raise no_json(f"its {name.decode()} is nested too deeply") from None


def check_encoding(body: bytes) -> None:
    """Refuse a large body that is not UTF-8, of which no decoder would tell.

    Raises:
        RequestError: `invalid_json`.

    """
    if body.startswith(_UTF_16_MARKS) or b"\0" in body[:2]:
        raise no_json(_UTF_8)


def no_json(why: Exception | str) -> RequestError:
    """The error of a body that cannot be read."""
    return RequestError("invalid_json", f"cannot read the body: it is no JSON: {why}")


def usable(name: object, where: str = "its body") -> str:
    """A `model` as a body gives it, or what else `where` is.

    Raises:
        RequestError: `missing_model`.

    """
    if isinstance(name, str) and name:
        return name
    msg = f"cannot route this request: {where} names no model; GET /v1/models lists them"
    raise RequestError("missing_model", msg, param="model")


async def with_model(body: bytes, model_id: str, place: slice | None) -> bytes:
    """The body with another `model`, every other byte as it was. `place`: of the name, where that is known."""
    if place is None:
        _, place = await model_name_of_large(body)
    return b"".join((body[: place.start], msgspec.json.encode(model_id), body[place.stop :]))


def with_salt(body: bytes, salt: bytes) -> bytes:
    """The body of a request with a `cache_salt`.

    Raises:
        RequestError: as `with_member`.

    """
    return with_member(body, "cache_salt", b'"%s"' % salt)


def with_member(body: bytes, name: str, value: bytes) -> bytes:
    """The body with one more member, its last: of members of one name, the last one counts.

    Raises:
        RequestError: `invalid_json`, where it does not end as an object; a large body is not read as a whole.

    """
    end = body.rstrip()
    if not end.endswith(b"}"):
        raise no_json("expected an object, which ends in }")
    return b'%s,"%s":%s}' % (end[:-1], name.encode(), value)
