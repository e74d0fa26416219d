"""Request bodies: read with a bound, and searched for the model's name without decoding the rest."""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from vllm_proxy.api.front import ask_for_body
from vllm_proxy.domain.scan import find_member
from vllm_proxy.errors import RequestError

_LARGE = 1024 * 1024  # from here on a body is searched in slices, so that other streams go on


class _Named(msgspec.Struct):
    """The one field of a body that decides anything here; the others are skipped, not decoded."""

    model: Any = None


_named = msgspec.json.Decoder(_Named)
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def check_length(request: web.BaseRequest, limit: int) -> None:
    """Refuse a body that is declared too large, before any of it is read.

    Raises:
        RequestError: `request_too_large`.

    """
    if (request.content_length or 0) > limit:
        raise too_large(limit)


def too_large(limit: int) -> RequestError:
    """The refusal of a body over the limit, in bytes."""
    msg = f"cannot take this request: its body is larger than server.max_body_size ({limit} bytes)"
    return RequestError("request_too_large", msg)


async def read_body(request: web.BaseRequest, limit: int) -> bytes:
    """The whole body.

    Raises:
        RequestError: `request_too_large`.

    """
    check_length(request, limit)
    ask_for_body(request)
    content = request.content
    data = await content.readany()
    if content.at_eof():
        if len(data) > limit:
            raise too_large(limit)
        return data
    parts, size = [data], len(data)
    while not content.at_eof():
        part = await content.readany()
        parts.append(part)
        size += len(part)
        if size > limit:
            raise too_large(limit)
    return b"".join(parts)


async def model_name(body: bytes) -> str:
    """The `model` of a JSON body.

    Raises:
        RequestError: `invalid_json` or `missing_model`.

    """
    try:
        name = _named.decode(body).model if len(body) < _LARGE else await _search(body)
    except msgspec.ValidationError:
        name = None  # JSON, but no object
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError("invalid_json", f"cannot read the body: it is no JSON: {error}") from None
    if not isinstance(name, str) or not name:
        msg = "cannot route this request: its body names no model; GET /v1/models lists them"
        raise RequestError("missing_model", msg, param="model")
    return name


async def _search(body: bytes) -> object:
    """As `_named`, for a large body: a slice at a time, the event loop in between."""
    span: tuple[int, int] | None = None
    for span in find_member(body, b"model"):  # noqa: B007 - the last one counts
        await asyncio.sleep(0)
    return None if span is None else msgspec.json.decode(body[span[0] : span[1]])


def with_model(body: bytes, model_id: str) -> bytes:
    """The body with another `model`; every other value keeps its bytes."""
    fields = _raw_fields.decode(body)
    return msgspec.json.encode(fields | {"model": msgspec.Raw(msgspec.json.encode(model_id))})
