"""The seam to aiohttp's server: everything that touches its inside is in this file, and tests pin it.

What it adds to `aiohttp.web`: routes that are found without the router and answer by writing to the client's
transport; a slow client that slows its engine; errors of the HTTP parser in the envelope; request shapes that
aiohttp's parser lets pass and that a proxy must not.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from vllm_proxy.api.envelope import refusal
from vllm_proxy.api.exchange import Exchange, end_in_reset
from vllm_proxy.errors import RequestError

log = structlog.get_logger()

_LOOK_SECONDS = 0.01

type Direct = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class ClientConnection(RequestHandler):
    """One client's connection. `exchange` is the answer that is being written to it."""

    __slots__ = ("asked", "end_orderly", "exchange")

    def __init__(self, manager: web.Server, *, loop: asyncio.AbstractEventLoop, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's options
        super().__init__(manager, loop=loop, **kwargs)
        self.exchange: Exchange | None = None
        self.asked = False  # for anything yet
        self.end_orderly: asyncio.Transport | None = None  # its own, once an answer that its end frames is whole

    @property
    def is_idle(self) -> bool:
        """Whether it waits for another request. Closed in the middle of one, it would drop the rest of its body."""
        return self.asked and self._waiter is not None and not self._messages

    @property
    def is_asking(self) -> bool:
        """Whether its first request, or the rest of one, is still to come."""
        request = self._current_request
        return not self.asked or (request is not None and not request.content.is_eof())

    def pause_writing(self) -> None:
        """The client reads more slowly than its engine writes."""
        super().pause_writing()
        if self.exchange is not None:
            self.exchange.pause()

    def resume_writing(self) -> None:
        """It has caught up."""
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
            error = RequestError("headers_too_large", "cannot read the request: its head is too large")
        else:
            reason = (message or "it is no HTTP/1.1").strip().splitlines()[0].rstrip(":")
            error = RequestError("bad_request", f"cannot read the request: {reason}")
        response = refusal(request, error)
        response.force_close()
        return response


class Front(web.Server):
    """aiohttp's server with a short way for some routes."""

    def __call__(self) -> RequestHandler:
        """A protocol for one more connection."""
        return ClientConnection(self, loop=self._loop, **self._kwargs)


class FrontRunner(web.AppRunner):
    """Runs an application whose `direct` routes, exact (method, path) pairs, go past its router and middlewares."""

    __slots__ = ("_direct",)

    def __init__(self, app: web.Application, direct: Mapping[tuple[str, str], Direct], **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's options
        super().__init__(app, access_log=None, handle_signals=False, handler_cancellation=True,
                         auto_decompress=False, **kwargs)  # fmt: skip
        self._direct = direct

    async def wind_down(self, seconds: float) -> None:
        """Accept no more connections and close those that idle, as soon as they do.

        Those that have not asked for anything yet, or not to the end, get `seconds` to do so: their clients know of
        no end to come.
        """
        for site in list(self.sites):
            await site.stop()
        loop = asyncio.get_running_loop()
        deadline, calm = loop.time() + seconds, 0
        # Twice calm: what was asked a moment ago has been taken up by then, and what was accepted is a connection.
        while calm < 2 and loop.time() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
            for connection in self._clients():
                if connection.is_idle:
                    connection.force_close()  # `close` alone would leave it to the server's end
            calm = 0 if any(connection.is_asking for connection in self._clients()) else calm + 1

    def _clients(self) -> list[ClientConnection]:
        return cast("list[ClientConnection]", self.server.connections) if self.server else []

    async def _make_server(self) -> web.Server:
        inner = await super()._make_server()
        routes, app_handler, app_request = self._direct, inner.request_handler, inner.request_factory
        loop = inner._loop  # noqa: SLF001 - the seam

        def make_request(
            message: RawRequestMessage,
            payload: StreamReader,
            protocol: RequestHandler,
            writer: AbstractStreamWriter,
            task: "asyncio.Task[None]",
        ) -> web.BaseRequest:
            protocol.asked = True  # type: ignore[attr-defined] # ours: a ClientConnection
            route = routes.get((message.method, message.path))
            if route is None:
                return app_request(message, payload, protocol, writer, task)
            request = DirectRequest(message, payload, protocol, writer, task, loop)
            request.route = route
            return request

        def handle(request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
            if type(request) is DirectRequest:
                return request.route(request)
            return _checked(request, app_handler)

        return Front(handle, request_factory=make_request, handler_cancellation=True, loop=loop, **inner._kwargs)  # noqa: SLF001 - the seam


class DirectRequest(web.BaseRequest):
    """A request for a direct route."""

    route: Direct


async def _checked(
    request: web.BaseRequest, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        check_codings(
            request.headers.get("Transfer-Encoding", "chunked"), request.headers.get("Content-Encoding", "identity")
        )
        if "Expect" in request.headers:
            check_expectation(request, request.headers["Expect"])
    except RequestError as error:
        response = refusal(request, error)
        response.force_close()
        return response
    return await handler(request)


def check_codings(transfer: str, content: str) -> None:
    """What a body may not come in: a framing that the next server could read in another way, or compressed.

    Raises:
        RequestError: `bad_request` or `unsupported_media_type`.

    """
    if transfer.strip().lower() != "chunked":
        raise RequestError("bad_request", f"cannot read a body of transfer-encoding {transfer!r}: only chunked")
    if content.strip().lower() not in {"", "identity"}:
        raise RequestError(
            "unsupported_media_type", f"cannot take a body of content-encoding {content!r}: send it plain"
        )


def check_expectation(request: web.BaseRequest, expectation: str) -> bool:
    """Whether the client waits to be told to send its body. Those of HTTP/1.0 may not, and would not understand.

    Raises:
        RequestError: `expectation_failed`.

    """
    if request.version < (1, 1):
        return False
    if expectation.strip().lower() != "100-continue":
        msg = "cannot meet what the header Expect asks for: 100-continue is all that is known"
        raise RequestError("expectation_failed", msg)
    return True


class _Done:
    """What can be awaited and is done already, without a coroutine for it."""

    def __await__(self) -> Iterator[None]:
        return iter(())


_DONE = _Done()


class Written(web.StreamResponse):
    """Stands for an answer whose bytes are on the wire already: of a response it has what the server asks for."""

    def __init__(self, *, keep_alive: bool) -> None:  # not aiohttp's: headers and cookies would be made for nobody
        self._keep_alive = keep_alive

    def prepare(self, request: web.BaseRequest) -> "_Done":  # type: ignore[override]  # noqa: ARG002 - aiohttp's signature
        """Nothing is left to send."""
        return _DONE

    def write_eof(self, data: bytes = b"") -> "_Done":  # type: ignore[override]  # noqa: ARG002 - as above
        """Nothing is left to send."""
        return _DONE


WRITTEN, WRITTEN_LAST = Written(keep_alive=True), Written(keep_alive=False)  # the connection goes on, or ends


def client_of(request: web.BaseRequest) -> ClientConnection:
    """The connection that a request came on."""
    return cast("ClientConnection", request.protocol)


def client_is_slow(request: web.BaseRequest) -> bool:
    """Whether bytes of an earlier answer still wait for this client to read them."""
    return client_of(request).writing_paused


def ask_for_body(request: web.BaseRequest) -> None:
    """Tell a client that sent `Expect: 100-continue` to go on. The router has done this for its own routes."""
    if type(request) is DirectRequest and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
