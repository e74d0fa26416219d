"""Request bodies: read with a bound, and searched for the model's name without decoding the rest."""

import asyncio
from typing import Any

import msgspec

from vllm_proxy.api.call import Call
from vllm_proxy.api.front import ask_for_body, check_codings, check_expectation
from vllm_proxy.domain.scan import find_member
from vllm_proxy.errors import RequestError

LARGE = 1024 * 1024  # from here on a body is searched in slices, so that other streams go on


class _Named(msgspec.Struct):
    """The one field of a body that decides anything here; the others are skipped, not decoded."""

    model: Any = None


_named = msgspec.json.Decoder(_Named)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # not JSON's, but engines take it


def check_head(call: Call, limit: int) -> None:
    """Refuse a body that cannot be taken before any of it is read, and ask for one that waits to be asked for.

    Raises:
        RequestError: `request_too_large`, `unsupported_media_type`, `bad_request` or `expectation_failed`.

    """
    head = call.head
    length = head.get(b"content-length")
    if length is not None and int(length) > limit:
        raise too_large(limit)
    if b"transfer-encoding" in head or b"content-encoding" in head:
        check_codings(
            head.get(b"transfer-encoding", b"chunked").decode("latin-1"),
            head.get(b"content-encoding", b"").decode("latin-1"),
        )
    if b"expect" in head and check_expectation(call.request, head[b"expect"].decode("latin-1")):
        ask_for_body(call.request)


def too_large(limit: int) -> RequestError:
    """The refusal of a body over the limit, in bytes."""
    msg = f"cannot take this request: its body is larger than server.max_body_size ({limit} bytes)"
    return RequestError("request_too_large", msg)


def body_at_hand(call: Call, limit: int) -> bytes:
    """A body that came together with its head, as small ones do; b"" where there is more to wait for.

    Raises:
        RequestError: as `check_head`.

    """
    content = call.request.content
    if not content.is_eof() or b"expect" in call.head:
        return b""
    check_head(call, limit)
    data = content.read_nowait()
    if len(data) > limit:  # in chunks, which declare no length
        raise too_large(limit)
    return data


async def read_body(call: Call, limit: int) -> bytes:
    """The whole body.

    Raises:
        RequestError: as `check_head`.

    """
    check_head(call, limit)
    content = call.request.content
    parts, size = [], 0
    while not content.at_eof():
        part = await content.readany()
        parts.append(part)
        size += len(part)
        if size > limit:
            raise too_large(limit)
    return b"".join(parts)


def model_name(body: bytes) -> str:
    """The `model` of a JSON body.

    Raises:
        RequestError: `invalid_json` or `missing_model`.

    """
    try:
        name = _named.decode(body[3:] if body.startswith(_BYTE_ORDER_MARK) else body).model
    except msgspec.ValidationError:
        name = None  # JSON, but no object
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _no_json(error) from None
    except RecursionError:
        raise _no_json("its values are nested too deeply") from None
    return _usable(name)


async def model_name_of_large(body: bytes) -> tuple[str, slice]:
    """As `model_name`, a slice at a time with the event loop in between; and where the name stands."""
    span: tuple[int, int] | None = None
    for span in find_member(body, b"model"):  # noqa: B007 - the last one counts
        await asyncio.sleep(0)
    if span is None:
        return _usable(None), slice(0)
    try:
        return _usable(msgspec.json.decode(body[span[0] : span[1]])), slice(*span)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _no_json(error) from None
    except RecursionError:
        raise _no_json("its model is nested too deeply") from None


def _no_json(why: Exception | str) -> RequestError:
    return RequestError("invalid_json", f"cannot read the body: it is no JSON: {why}")


def _usable(name: object) -> str:
    if isinstance(name, str) and name:
        return name
    msg = "cannot route this request: its body names no model; GET /v1/models lists them"
    raise RequestError("missing_model", msg, param="model")


async def with_model(body: bytes, model_id: str, place: slice | None) -> bytes:
    """The body with another `model`, every other byte as it was. `place`: of the name, where that is known."""
    if place is None:
        _, place = await model_name_of_large(body)
    return b"".join((body[: place.start], msgspec.json.encode(model_id), body[place.stop :]))
