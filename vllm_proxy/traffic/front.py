"""The seam to aiohttp's server: everything that touches its inside is here and in `client.py`, and tests pin it.

What it adds to `aiohttp.web`: routes that are found without the router and answer by writing to the client's
transport; a bound on connections, and a look at each of them once a second; request shapes that aiohttp's parser lets
pass and that a proxy must not.
"""

import asyncio
import resource
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from vllm_proxy.domain.config import Server
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.access import is_command
from vllm_proxy.traffic.client import ClientConnection, Refused, in_bytes
from vllm_proxy.traffic.envelope import refusal

log = structlog.get_logger()

_WIND_DOWN_SECONDS = 0.01  # between two looks for what still has to end
_SWEEP_SECONDS = 1.0
_OPEN_FILES = 2**20  # where there is no limit
_RESERVED_FILES = 256  # for the engines' logs and processes, files that are written, and clients that are refused
_REFUSED_AT_ONCE = 64  # so many stay until they have heard it; more are closed at once
_TOO_MANY = in_bytes(
    RequestError(
        "overloaded",
        "cannot take this connection: there are as many as server.max_connections or the limit of open files allows;"
        " try again",
        retry_after=1,
    )
)

type Direct = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def most_connections(open_files: int) -> int:
    """How many clients a limit of open files allows: a stream takes two, the client's connection and the engine's."""
    if open_files == resource.RLIM_INFINITY:
        open_files = _OPEN_FILES
    return max((open_files - _RESERVED_FILES) // 2, open_files // 4)


class Front(web.Server):
    """aiohttp's server with a bound on connections, and deadlines for what clients do."""

    def __init__(self, handler: Any, settings: Callable[[], Server], commands: str, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's options
        """`settings`: the `[server]` table now; `commands`: the address of the socket that is never full."""
        super().__init__(handler, **kwargs)
        self._settings = settings
        self._commands = commands
        self._most = most_connections(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._refused: set[Refused] = set()
        self._awake = 0.0  # seconds in which it could hear its clients
        self._swept_at = self._loop.time()
        self._next_sweep = self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    def __call__(self) -> RequestHandler:
        """A protocol for one more connection."""
        return ClientConnection(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """A client has come, and was not refused."""
        super().connection_made(handler, transport)
        cast("ClientConnection", handler).is_command = is_command(transport.get_extra_info("socket"), self._commands)

    def has_room(self, transport: asyncio.BaseTransport) -> bool:
        """Whether one more connection may be taken in."""
        most = min(self._settings().max_connections or self._most, self._most)
        return len(self._connections) < most or is_command(transport.get_extra_info("socket"), self._commands)

    def refuse(self, transport: asyncio.Transport) -> None:
        """Tell a client that there is no room, and close."""
        refused = Refused(transport, self._refused)
        transport.set_protocol(refused)
        transport.write(_TOO_MANY)
        if len(self._refused) > _REFUSED_AT_ONCE:
            transport.close()
        else:
            refused.linger()

    def stop_sweeping(self) -> None:
        """Set no more deadlines."""
        self._next_sweep.cancel()

    def _sweep(self) -> None:
        self._next_sweep = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        now = self._loop.time()
        self._awake += min(now - self._swept_at, 2 * _SWEEP_SECONDS)  # a daemon that was frozen blames nobody for it
        self._swept_at = now
        server = self._settings()
        for connection in self.connections:
            try:
                cast("ClientConnection", connection).enforce_deadlines(self._awake, server)
            except Exception:  # the others are to be looked at all the same
                log.exception("a fault of the daemon: a connection could not be looked at")


class FrontRunner(web.AppRunner):
    """Runs an application whose `direct` routes, exact (method, path) pairs, go past its router and middlewares."""

    __slots__ = ("_commands", "_direct", "_settings")

    def __init__(
        self,
        app: web.Application,
        direct: Mapping[tuple[str, str], Direct],
        settings: Callable[[], Server],
        commands: str = "",
        **kwargs: Any,  # noqa: ANN401 - aiohttp's options
    ) -> None:
        """`settings`, `commands`: as of `Front`."""
        super().__init__(app, access_log=None, handle_signals=False, handler_cancellation=True,
                         auto_decompress=False, **kwargs)  # fmt: skip
        self._direct = direct
        self._settings = settings
        self._commands = commands

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._clients())

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
            await asyncio.sleep(_WIND_DOWN_SECONDS)
            for connection in self._clients():
                if connection.is_idle:
                    connection.force_close()  # `close` alone would leave it to the server's end
            calm = 0 if any(connection.is_asking for connection in self._clients()) else calm + 1

    def _clients(self) -> list[ClientConnection]:
        return cast("list[ClientConnection]", self.server.connections) if self.server else []

    async def cleanup(self) -> None:
        """Close everything."""
        if self.server is not None:
            cast("Front", self.server).stop_sweeping()
        await super().cleanup()

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
            protocol.in_head = False  # type: ignore[attr-defined] # ours: a ClientConnection
            protocol.head_bytes = 0  # type: ignore[attr-defined] # as above
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

        return Front(
            handle,
            self._settings,
            self._commands,
            request_factory=make_request,
            handler_cancellation=True,
            loop=loop,
            **inner._kwargs,  # noqa: SLF001 - the seam
        )


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


class Sent(web.StreamResponse):
    """Stands for an answer whose bytes are on the wire already: of a response it has what the server asks for."""

    def __init__(self, *, keep_alive: bool) -> None:  # not aiohttp's: headers and cookies would be made for nobody
        self._keep_alive = keep_alive

    def prepare(self, request: web.BaseRequest) -> "_Done":  # type: ignore[override]  # noqa: ARG002 - aiohttp's signature
        """Nothing is left to send."""
        return _DONE

    def write_eof(self, data: bytes = b"") -> "_Done":  # type: ignore[override]  # noqa: ARG002 - as above
        """Nothing is left to send."""
        return _DONE


SENT_KEEP_ALIVE, SENT_CLOSE = Sent(keep_alive=True), Sent(keep_alive=False)  # the connection goes on, or ends


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
