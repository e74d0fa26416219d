"""Forwards one request to an engine and relays its answer; retries on another instance where that is safe.

Inference is not idempotent (it may be billed, logged or acted upon): a request is retried only where the engine cannot
have begun to answer it. `Ending` in `exchange` names the cases. It may also be what kills engines: whatever their
connections looked like, no more than two of them get it.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol

import msgspec
import structlog
from aiohttp import web

from vllm_proxy.domain.tasks import lacks
from vllm_proxy.domain.tokens import KEPT
from vllm_proxy.errors import EngineFailedError, RequestError
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.direct import SENT_CLOSE, SENT_KEEP_ALIVE
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.exchange import Ending, Exchange
from vllm_proxy.traffic.front import client_is_slow, client_of
from vllm_proxy.traffic.head import engine_id
from vllm_proxy.traffic.lease import Lease
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.routes import TOKENIZER_INFO
from vllm_proxy.traffic.routing import Route
from vllm_proxy.traffic.sieve import MeteredExchange
from vllm_proxy.traffic.wire import EngineConnection

log = structlog.get_logger()

_TOKENIZER_OPTION = "enable-tokenizer-info-endpoint"
_PIECE = 256 * 1024
_ONE_WRITE = 64 * 1024
_RACE_SECONDS = 1.0  # a kept-alive connection that ends later than that has brought the engine the request
_MOST_UNANSWERED = 2
_USAGE = b'"usage":'  # not in a text, whose quotes are escaped


class Body(Protocol):
    """A request's body that is not held in memory."""

    def __len__(self) -> int:
        """Bytes."""

    def pieces(self, size: int) -> Iterator[bytes]:
        """All of it, from the beginning, in pieces of at most `size` bytes."""


async def with_deadline(
    seconds: float, call: Call, answered: Coroutine[Any, Any, web.StreamResponse]
) -> web.StreamResponse:
    """What `answered` returns, if that is done `seconds` after the request's head came: `request_timeout`.

    Raises:
        RequestError: `request_timeout`, while nothing of an answer was passed on.
        ConnectionResetError: when the answer had begun; the client has been cut.

    """
    left = call.started_at + seconds - time.monotonic()
    if left <= 0:  # its body took that long
        answered.close()
        raise _deadline_passed(seconds)
    try:
        async with asyncio.timeout(left):
            return await answered
    except TimeoutError:
        if call.status:  # the answer has begun: cut it
            if call.request.transport is not None:
                call.request.transport.abort()
            raise ConnectionResetError from None
        raise _deadline_passed(seconds) from None


def _deadline_passed(seconds: float) -> RequestError:
    return RequestError("request_timeout", f"cannot answer within request_timeout ({seconds:g} s)")


def forward(
    call: Call, registry: Registry, route: Route, body: bytes | Body
) -> Coroutine[Any, Any, web.StreamResponse]:
    """Send the request to an instance of the model, retry on others where that is safe, and relay the answer.

    Raises:
        RequestError: no instance is to be had, `engine_failed` or `request_timeout`, while nothing of an answer was
            passed on.
        ConnectionResetError: when the answer broke off and the client has been cut.

    """
    seconds = route.spec.policy.request_timeout
    forwarding = _forward(call, registry, route, body)
    return with_deadline(seconds, call, forwarding) if seconds else forwarding


async def _forward(call: Call, registry: Registry, route: Route, body: bytes | Body) -> web.StreamResponse:
    tries: _Retries | None = None  # made where one failed
    call.model = route.spec.id
    with registry.lease(route, call.metered, call.prompt) or await _wait(call, registry, route) as lease:
        if client_is_slow(call.request):
            await call.request.writer.drain()
        while True:
            call.instance = lease.endpoint.instance
            exchange = _exchange(call, lease)
            ending, is_race = await _attempt(call, lease, exchange, body, fresh=tries is not None and tries.fresh)
            if ending is Ending.WHOLE or ending is Ending.BROKEN:
                return _finished(call, lease, exchange, ending)
            if ending is Ending.NO_ROUTE:
                raise _no_route(call, lease)
            lease.endpoint.failed()
            tries = tries or _Retries()
            if not tries.next_target(lease, ending, is_race=is_race):
                raise EngineFailedError(f"cannot get an answer from {call.instance}: {_WHY[ending]}")
            call.retries += 1
            call.engine_id = engine_id(call.request_id)  # the engine may still work on the previous attempt


def _no_route(call: Call, lease: Lease) -> RequestError:
    endpoint = lease.endpoint
    endpoint.failures = 0
    what = f"{call.request.method} {call.route}"
    if call.route == TOKENIZER_INFO:
        msg = f"cannot {what}: the engine of {call.model} does not offer it; args.{_TOKENIZER_OPTION} = true does"
    else:
        msg = lacks(what, call.model, endpoint.tasks)
    return RequestError("not_found", msg, param="model")


async def _wait(call: Call, registry: Registry, route: Route) -> Lease:
    began = time.monotonic()
    try:
        return await registry.wait(route, call.request.remote or "", call.metered, call.prompt)
    finally:
        call.queue_seconds = time.monotonic() - began


class _Retries:
    """What was tried for one request, to know whether it may be retried, and where."""

    def __init__(self) -> None:
        self.fresh = False  # whether the next try wants a fresh connection, whose end is none of an idle one
        self._unanswered = 0
        self._stale: Endpoint | None = None  # where perhaps only an idle connection ended

    def next_target(self, lease: Lease, ending: Ending, *, is_race: bool) -> bool:
        """Move the lease to where the request may be retried; False where it may not, or there is no such instance."""
        if ending is Ending.UNANSWERED:
            self._unanswered += 1
            if self._unanswered == _MOST_UNANSWERED:
                return False
            self.fresh = True
            self._stale = lease.endpoint if is_race else None
        elif ending is not Ending.REFUSED:
            return False
        if lease.move():
            return True
        stale, self._stale = self._stale, None
        return stale is not None and lease.move_back(stale)


def _finished(call: Call, lease: Lease, exchange: Exchange, ending: Ending) -> web.StreamResponse:
    """The answer has been passed on, or as much of it as there was."""
    lease.endpoint.failures = 0
    call.status = exchange.status
    call.bytes_out = exchange.body_bytes
    call.first_byte_at = exchange.first_byte_at
    if call.metered is None:
        call.usage = usage_of(exchange)
    if exchange.by_closing and exchange.orderly:
        client_of(call.request).end_orderly = call.request.transport
    if exchange.ended_early and call.revoked is not None:
        call.code = call.revoked.code
        log.info("an answer was ended early", why=call.code, instance=call.instance,
                 id=call.request_id.decode())  # fmt: skip
    elif ending is Ending.BROKEN:
        call.code = "engine_failed"
        log.warning("the engine broke off its answer", instance=call.instance, id=call.request_id.decode(),
                    engine_id=call.engine_id.decode())  # fmt: skip
    return SENT_CLOSE if exchange.close else SENT_KEEP_ALIVE


def usage_of(exchange: Exchange) -> bytes:
    """What says which tokens the answer took, where that is at hand: of one that nobody counts."""
    text = exchange.last
    at = text.rfind(_USAGE, -KEPT)
    if at < 0 and exchange.before:
        text = exchange.before
        at = text.rfind(_USAGE, -KEPT)
    return text[at : at + KEPT] if at >= 0 else b""


async def forward_to_one(
    call: Call, lease: Lease, body: bytes, wanted: Callable[[int], bool]
) -> web.StreamResponse | None:
    """Send the request to the leased instance alone; pass its answer on if the status is `wanted`, None if it is not.

    Raises:
        RequestError: `engine_failed`, when there is no answer.
        ConnectionResetError: as `forward`.

    """

    def on_head(status: int) -> bool:
        if not wanted(status):
            return False
        client_of(call.request).exchange = exchange
        return True

    call.model, call.instance = lease.model_id, lease.endpoint.instance
    fresh = False
    while True:
        exchange = _exchange(call, lease, on_head)
        ending, is_race = await _attempt(call, lease, exchange, body, fresh=fresh, alone=False)
        if ending is Ending.WHOLE or ending is Ending.BROKEN:
            return _finished(call, lease, exchange, ending)
        if ending is Ending.DECLINED:
            return None
        lease.endpoint.failed()
        if ending is not Ending.UNANSWERED or not is_race:
            raise EngineFailedError(f"cannot get an answer from {call.instance}: {_WHY[ending]}")
        fresh = True


_WHY = {
    Ending.REFUSED: "it takes no connection",
    Ending.UNANSWERED: "it closed the connection without one",
    Ending.BROKEN_HEAD: "what it sent is no answer",
}


async def _attempt(
    call: Call, lease: Lease, exchange: Exchange, body: bytes | Body, *, fresh: bool = False, alone: bool = True
) -> tuple[Ending, bool]:
    """One try on one instance: how it ended, and whether the engine may have closed an idle connection as we used it.

    `fresh`: on a connection of its own.
    `alone`: the request goes to no other instance, so the client's connection belongs to this exchange.
    """
    pool = lease.endpoint.pool
    connection = None if fresh else pool.take()
    if connection is None:
        try:
            connection = await pool.connect()
        except (OSError, TimeoutError):
            return Ending.REFUSED, False
    was_used = connection.used
    client = client_of(call.request)
    exchange.connection = connection
    if alone:
        client.exchange = exchange
    head = _request_head(call, lease, len(body))
    call.sent_at = time.monotonic()
    try:
        if isinstance(body, bytes) and len(body) <= _ONE_WRITE:
            connection.start(head + body, exchange)
        else:
            await _send(head, body, exchange, connection)
        ending = await exchange.ended
    except ConnectionError:  # while sending: `lost` has notified the exchange
        ending = await exchange.ended
    finally:
        if client.exchange is exchange:
            client.exchange = None
        if not exchange.ended.done() or exchange.ended.cancelled():  # the client has left, or it took too long
            call.status = call.status or exchange.passed_status
            call.bytes_out, call.first_byte_at = exchange.body_bytes, exchange.first_byte_at
            exchange.abandon()
    is_race = ending is Ending.UNANSWERED and was_used and time.monotonic() - call.sent_at < _RACE_SECONDS
    return ending, is_race


async def _send(head: bytes, body: bytes | Body, exchange: Exchange, connection: EngineConnection) -> None:
    """A large body, with backpressure: no faster than the engine takes it."""
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
    framing = b"Content-Length: %d\r\n" % length if length or call.request.method != "GET" else b""
    own = lease.endpoint.own_headers
    # In half of the time that `%` takes.
    return b"".join((call.start_line, own, framing, call.forwarded, b"X-Request-Id: ", call.engine_id, b"\r\n\r\n"))


def _exchange(call: Call, lease: Lease, on_head: Callable[[int], bool] | None = None) -> Exchange:
    request = call.request
    assert request.transport is not None
    metered = call.metered
    exchange = (Exchange if metered is None else MeteredExchange)(
        request.transport,
        lease.answer_headers + call.own_lines(),
        _ANTHROPIC_EVENT if call.is_anthropic else _OPENAI_EVENT,
        http10=request.version < _HTTP_11,
        no_body=request.method == "HEAD",
        close=not request.keep_alive or lease.closing,
        on_head=on_head,
    )
    if metered is not None:
        assert type(exchange) is MeteredExchange
        metered.follow(exchange)
    return exchange


_HTTP_11 = (1, 1)
_FAILED = "the engine ended before its answer was complete"
_OPENAI_EVENT = b"data: %s\n\n" % msgspec.json.encode(
    {"error": {"message": _FAILED, "type": "server_error", "param": None, "code": "engine_failed"}}
)
_ANTHROPIC_EVENT = b"event: error\ndata: %s\n\n" % msgspec.json.encode(
    {"type": "error", "error": {"type": "api_error", "message": _FAILED}}
)
