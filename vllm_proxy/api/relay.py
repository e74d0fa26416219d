"""Carries one request to an engine and its answer back: contract sections 4 to 6.

Its one rule: what a client sent is sent again only where the engine cannot have begun to answer it.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import structlog
from aiohttp import web

from vllm_proxy.api.call import Call
from vllm_proxy.api.exchange import HOP_BY_HOP, Ending, Exchange
from vllm_proxy.api.front import Written, client_is_slow, client_of
from vllm_proxy.engine.registry import Lease
from vllm_proxy.engine.wire import EngineConnection
from vllm_proxy.errors import EngineFailedError, RequestError

log = structlog.get_logger()

_PIECE = 256 * 1024
_ONE_WRITE = 64 * 1024
# Of a client's head: what ends here, and what the daemon says itself.
_DROPPED = HOP_BY_HOP | frozenset(
    b"host content-length authorization x-api-key api-key expect x-request-id".split()
)  # fmt: skip


class Body(Protocol):
    """A request's body that is not held in memory."""

    def __len__(self) -> int:
        """Bytes."""

    def pieces(self, size: int) -> Iterator[bytes]:
        """All of it, from the beginning, in pieces of at most `size` bytes."""


async def carry(
    call: Call, lease: Lease, body: bytes | Body, on_head: Callable[[int], bool] | None = None
) -> web.StreamResponse | None:
    """Send the request to the leased instance, or to others where contract section 5 says so, and pass the answer on.

    None when `on_head` declined the answer by its status.

    Raises:
        RequestError: `engine_failed` or `request_timeout`, while nothing of an answer was passed on.
        ConnectionResetError: when the answer broke off and the client has been cut.

    """
    seconds = lease.policy.request_timeout
    if not seconds:
        return await _carry(call, lease, body, on_head)
    try:
        async with asyncio.timeout(seconds):
            return await _carry(call, lease, body, on_head)
    except TimeoutError:
        if call.status:  # the answer has begun: cut it
            if call.request.transport is not None:
                call.request.transport.abort()
            raise ConnectionResetError from None
        raise RequestError("request_timeout", f"cannot answer within request_timeout ({seconds:g} s)") from None


async def _carry(
    call: Call, lease: Lease, body: bytes | Body, on_head: Callable[[int], bool] | None
) -> web.StreamResponse | None:
    fresh_breaks = 0
    if client_is_slow(call.request):
        await call.request.writer.drain()
    while True:
        exchange = _exchange(call, lease, on_head)
        call.model, call.instance = lease.model_id, lease.endpoint.instance
        ending, was_used = await _attempt(call, lease, exchange, body)
        if ending in {Ending.WHOLE, Ending.BROKEN}:
            lease.endpoint.failures = 0
            call.status, call.bytes_out, call.first_byte_at = (
                exchange.status,
                exchange.body_bytes,
                exchange.first_byte_at,
            )
            if ending is Ending.BROKEN:
                log.warning("the engine broke off its answer", instance=call.instance, request_id=call.request_id)
            return Written(keep_alive=not exchange.close)
        if ending is Ending.DECLINED:
            return None
        lease.endpoint.failed()
        fresh_breaks += ending is Ending.UNANSWERED and not was_used
        again = ending in {Ending.UNANSWERED, Ending.REFUSED} and fresh_breaks <= 1
        if not again or not lease.move():
            raise EngineFailedError(f"cannot get an answer from {call.instance}: {_WHY[ending]}")
        call.retries += 1


_WHY = {
    Ending.REFUSED: "it takes no connection",
    Ending.UNANSWERED: "it closed the connection without one",
    Ending.BROKEN_HEAD: "what it sent is no answer",
}


async def _attempt(call: Call, lease: Lease, exchange: Exchange, body: bytes | Body) -> tuple[Ending, bool]:
    """One try on one instance: how it ended, and whether its connection had been used before."""
    try:
        connection = await lease.endpoint.pool.connect()
    except (OSError, TimeoutError):
        return Ending.REFUSED, False
    was_used = connection.used
    client = client_of(call.request)
    client.exchange, exchange.connection = exchange, connection
    try:
        await _send(call, lease, exchange, connection, body)
        return await exchange.ended, was_used
    except ConnectionError:  # while sending: `lost` has told the exchange
        return await exchange.ended, was_used
    finally:
        client.exchange = None
        if not exchange.ended.done():  # the client has left, or took too long
            call.status = call.status or exchange.passed_status
            exchange.abandon()


async def _send(call: Call, lease: Lease, exchange: Exchange, connection: EngineConnection, body: bytes | Body) -> None:
    head = _request_head(call, lease, len(body))
    call.sent_at = time.monotonic()
    if isinstance(body, bytes) and len(body) <= _ONE_WRITE:
        connection.start(head + body, exchange)
        return
    exchange.sending = True
    connection.start(head, exchange)
    for piece in _pieces_of(body):
        if exchange.ended.done():  # an answer that does not wait for the whole request
            return
        await connection.send(piece)
    exchange.sending = False


def _pieces_of(body: bytes | Body) -> Iterator[bytes]:
    if isinstance(body, bytes):
        return (body[start : start + _PIECE] for start in range(0, len(body), _PIECE))
    return body.pieces(_PIECE)


def _request_head(call: Call, lease: Lease, length: int) -> bytes:
    """The client's head as the engine gets it."""
    request = call.request
    target = request.raw_path if request.raw_path.startswith("/") else request.rel_url.raw_path_qs
    lines = [f"{request.method} {target} HTTP/1.1\r\n".encode(), lease.endpoint.own_headers]
    dropped = _DROPPED
    if "Connection" in request.headers:
        named = ",".join(request.headers.getall("Connection")).lower().split(",")
        dropped = _DROPPED | {name.strip().encode() for name in named}
    for name, value in request.raw_headers:
        if name.lower() not in dropped:
            lines.append(b"%s: %s\r\n" % (name, value))
    lines.append(f"X-Request-Id: {call.request_id}\r\n".encode())
    if length or request.method != "GET":
        lines.append(b"Content-Length: %d\r\n" % length)
    lines.append(b"\r\n")
    return b"".join(lines)


def _exchange(call: Call, lease: Lease, on_head: Callable[[int], bool] | None) -> Exchange:
    request = call.request
    assert request.transport is not None
    return Exchange(
        request.transport,
        f"X-Request-Id: {call.request_id}\r\nX-Vllm-Proxy-Model: {lease.model_id}\r\n"
        f"X-Vllm-Proxy-Instance: {lease.endpoint.instance}\r\n".encode(),
        _ANTHROPIC_EVENT if call.is_anthropic else _OPENAI_EVENT,
        http10=request.version < (1, 1),
        no_body=request.method == "HEAD",
        close=not request.keep_alive or lease.closing,
        on_head=on_head,
    )


_FAILED = "the engine ended before its answer was complete"
_OPENAI_EVENT = b"data: %s\n\n" % msgspec.json.encode(
    {"error": {"message": _FAILED, "type": "server_error", "param": None, "code": "engine_failed"}}
)
_ANTHROPIC_EVENT = b"event: error\ndata: %s\n\n" % msgspec.json.encode(
    {"type": "error", "error": {"type": "api_error", "message": _FAILED}}
)
