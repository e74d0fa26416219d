"""One client's connection, as aiohttp's server sees it: deadlines for the client, backpressure for its engine.

A client that reads slowly pauses the connection of its engine; one that is silent is closed. Whatever a client has to
do next has a deadline, which a sweep each second enforces (cheaper than a timer for each). Also here: errors of the
HTTP parser in the envelope, and the refusal of connections beyond the limit.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from vllm_proxy.domain.config import Server
from vllm_proxy.domain.keys import Scope
from vllm_proxy.domain.listener import Kind, Listener
from vllm_proxy.errors import LateRequestError, RequestError
from vllm_proxy.traffic.direct import Heads
from vllm_proxy.traffic.direct_connection import DirectConnection
from vllm_proxy.traffic.envelope import error_event, error_response, refusal
from vllm_proxy.traffic.exchange import Exchange, end_in_reset, ends_in_reset
from vllm_proxy.traffic.head import request_id
from vllm_proxy.traffic.keyring import Caller
from vllm_proxy.traffic.routes import is_anthropic

log = structlog.get_logger()

CLIENT_SECONDS = 60.0  # a client that takes nothing of its answer for so long is cut
_HEAD_BYTES = 64 * 1024  # of a head that is not complete
_REFUSED_SECONDS = 1.0
_HEAD_TOO_LARGE = RequestError("headers_too_large", "cannot read the request: its head is too large")
_HEAD, _BODY, _ANSWER = "head", "body", "answer"


_received = RequestHandler.data_received


class Admitted(Protocol):
    """A request that was let in."""

    caller: Caller
    scope: Scope | None
    model: str  # "" where it is not known
    committed: bool
    revoked: RequestError | None  # why it ends before its time


class Manager(Protocol):
    """The server of a connection, as the connection sees it."""

    heads: Heads

    def has_room(self, listener: Listener) -> bool:
        """Whether one more connection of this listener may be taken in."""

    def refuse(self, transport: asyncio.Transport) -> None:
        """Answer that there is no room, and close."""


class ClientConnection(DirectConnection):
    """One client's connection. `exchange` is the answer that is being written to it."""

    __slots__ = ("_mark", "_resumed", "_since", "admission", "end_orderly", "exchange", "held", "listener",
                 "on_message_bytes", "wire")  # fmt: skip

    def __init__(
        self,
        manager: "Manager",
        listener: Listener,
        wire: asyncio.Transport | None = None,
        *,
        loop: asyncio.AbstractEventLoop,
        **kwargs: Any,  # noqa: ANN401 - aiohttp's options
    ) -> None:
        """`listener`: where it was accepted; `wire`: what its bytes go through, below TLS where there is TLS."""
        super().__init__(cast("web.Server", manager), manager.heads, loop=loop, **kwargs)
        self.listener = listener
        self.wire = wire
        self.exchange: Exchange | None = None
        self.admission: Admitted | None = None  # of the last request that was let in
        self.end_orderly: asyncio.Transport | None = None  # its own, once an answer that its end frames is whole
        self.held = 0  # bytes of a body that are counted in the budget, where no call holds them
        self.on_message_bytes: Callable[[int], None] | None = (
            None  # called with the size of what a WebSocket session receives
        )
        self._resumed = 0  # how often its client caught up
        self._mark: tuple[object, ...] | None = None  # the progress of what is awaited, at the last sweep
        self._since = 0.0  # the time of the first sweep that saw it so

    @property
    def is_idle(self) -> bool:
        """Whether it waits for another request. Closed in the middle of one, it would drop the rest of its body."""
        return not self.in_head and self._waiter is not None and not self._messages and not self.is_direct

    @property
    def is_receiving(self) -> bool:
        """Whether its first request, or the rest of one, is still to come."""
        request = self._current_request
        return self.in_head or (request is not None and not request.content.is_eof())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come: taken in, if there is room for it."""
        manager = cast("Manager", self._manager)
        if not manager.has_room(self.listener):
            manager.refuse(cast("asyncio.Transport", transport))
            return
        self.wire = self.wire or cast("asyncio.Transport", transport)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client. aiohttp bounds each line of a head and their number; here the head as a whole."""
        if self.take(data):
            return
        _received(self, data)  # not by `super()`, which is looked up anew for each read
        if self._messages:
            return
        if self._waiter is not None:
            self.in_head = True
            self.head_bytes += len(data)
            if self.head_bytes > _HEAD_BYTES:
                self._refuse(_HEAD_TOO_LARGE)
        elif self.on_message_bytes is not None:
            self.on_message_bytes(len(data))

    @property
    def in_progress(self) -> Admitted | None:
        """The request that is being answered, once it was let in."""
        return self.admission if self._current_request is not None else None

    def revoke(self, admission: Admitted, error: RequestError) -> None:
        """End the request that is being answered: what it was let in for is not allowed any more.

        A stream that has begun ends with the error as its last event; where nothing was sent, it is the answer.
        """
        request, task = self._current_request, self.task
        if request is None or admission.revoked is not None or task is None:
            return
        admission.revoked = error
        if self.exchange is not None and self.exchange.passed_status:
            self.exchange.end_early(error_event(error, anthropic=is_anthropic(request.path)))
            return
        if self.exchange is not None:
            self.exchange.abandon()  # or what its engine sends until the task has its turn would begin an answer
        task.cancel()

    def pause_writing(self) -> None:
        """The client reads more slowly than its engine writes: backpressure on the engine."""
        super().pause_writing()
        if self.exchange is not None:
            self.exchange.pause()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._resumed += 1
        super().resume_writing()
        if self.exchange is not None:
            self.exchange.resume()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client has left: its engine stops now, not when the handler's cancellation gets its turn."""
        if self.exchange is not None:
            self.exchange.abandon()
        if self.end_orderly is not None and exc is None and not self.end_orderly.get_write_buffer_size():
            end_in_reset(self.end_orderly, reset=False)
        super().connection_lost(exc)

    def enforce_deadlines(self, now: float, server: Server) -> None:
        """Enforce the deadline of what the client is to do next. `now`: seconds in which the daemon could read."""
        mark, limit, end = self._deadline(server)
        if not limit:
            self._mark = None
        elif mark != self._mark:
            self._mark, self._since = mark, now
        elif now - self._since > limit:
            self._mark = None
            end()

    def _deadline(self, server: Server) -> tuple[tuple[object, ...], float, Callable[[], None]]:
        """What the client is to do next, as a value that changes when it does some of it; within how many seconds."""
        request = self._current_request
        if request is None:
            if self.in_head:
                return (_HEAD, self._request_count), server.head_timeout, lambda: self._refuse(_late_head(server))
        elif not request.content.is_eof():
            if not self._reading_paused and not self._upgraded:
                mark = (_BODY, self._request_count, request.content.total_bytes)
                return mark, server.body_timeout, lambda: self._time_out_body(request, server)
        elif self._paused and self.transport is not None and self.listener.kind is not Kind.CONTROL:
            mark = (_ANSWER, self._resumed, self._unsent())
            return mark, CLIENT_SECONDS, self._abort_slow_client
        return (), 0.0, self._abort_slow_client

    def _unsent(self) -> int:
        """Bytes that the kernel has not taken yet, those that TLS has encrypted already among them."""
        found = {transport for transport in (self.transport, self.wire) if transport is not None}
        return sum(transport.get_write_buffer_size() for transport in found)

    def force_close(self) -> None:
        """Close at once. Over TLS an answer that is not whole must not end in a close_notify, which says that it is."""
        if self.listener.tls and self.transport is not None and ends_in_reset(self.transport):
            self.transport.abort()
        super().force_close()

    def _process_keepalive(self) -> None:
        """The time of an idle connection is over; that of a head has a bound of its own."""
        if self.in_head or self.is_direct:
            self._keepalive_handle = None
        else:
            super()._process_keepalive()

    def _refuse(self, error: RequestError) -> None:
        """Answer a head that is not there."""
        if self.transport is not None:
            self.transport.write(as_bytes(error))
        self.force_close()

    def _time_out_body(self, request: web.BaseRequest, server: Server) -> None:
        msg = (
            f"cannot read the request: nothing of its body came within server.body_timeout ({server.body_timeout:g} s)"
        )
        self._lingering_time = 0.0  # there is nothing to wait for behind the answer
        request.content.set_exception(LateRequestError(msg))

    def _abort_slow_client(self) -> None:
        if self.transport is not None:
            log.info("a client was cut: it reads nothing of its answer", seconds=CLIENT_SECONDS)
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """A request that the parser refused, or a fault that no handler caught, in the envelope."""
        if request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        if status >= 500:
            log.error("a request failed by a fault of the daemon", path=request.path, exc_info=exc)
            error = RequestError("internal_error", "cannot answer: a fault of the daemon, see its log")
        elif isinstance(exc, LineTooLong) or (message or "").startswith("Too many headers"):
            error = _HEAD_TOO_LARGE
        else:
            reason = (message or "it is no HTTP/1.1").strip().splitlines()[0].rstrip(":")
            error = RequestError("bad_request", f"cannot read the request: {reason}")
        response = refusal(request, error)
        response.force_close()
        return response


class Refused(asyncio.Protocol):
    """A connection beyond the limit. What its client sends is dropped, so that no reset overtakes the answer."""

    def __init__(self, transport: asyncio.Transport, others: "set[Refused]") -> None:
        self._transport = transport
        self._others = others
        self._end: asyncio.TimerHandle | None = None
        others.add(self)

    def linger(self) -> None:
        """End the answer, and give its client a moment to read it."""
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:  # TLS: it says goodbye, and waits for the same
            self._transport.close()
        self._end = asyncio.get_running_loop().call_later(_REFUSED_SECONDS, self._transport.abort)

    def connection_lost(self, exc: BaseException | None) -> None:  # noqa: ARG002 - asyncio's signature
        """It is gone."""
        self._others.discard(self)
        if self._end is not None:
            self._end.cancel()


def as_bytes(error: RequestError) -> bytes:
    """An error as an answer on the wire, the last of its connection."""
    answer = error_response(error)
    answer.headers["X-Request-Id"] = request_id(None).decode()
    assert isinstance(answer.body, bytes)
    lines = [
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
        *(f"{name}: {value}" for name, value in answer.headers.items()),
        f"Content-Length: {len(answer.body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + answer.body


def _late_head(server: Server) -> RequestError:
    msg = f"cannot read the request: its head was not there within server.head_timeout ({server.head_timeout:g} s)"
    return LateRequestError(msg)
