"""The seam to aiohttp's server: its internals are used here and in `client` only (tests/traffic/test_front.py).

Adds to `aiohttp.web`: routes that bypass the router and answer by writing to the client's transport; a limit on
connections, and a sweep over their deadlines each second; a graceful shutdown of connections; and the refusal of what
`framing` does not take.
"""

import asyncio
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from vllm_proxy.domain.config import Server
from vllm_proxy.domain.listener import Kind, Listener
from vllm_proxy.errors import RequestError
from vllm_proxy.listen import BACKLOG
from vllm_proxy.traffic import framing
from vllm_proxy.traffic.client import Admitted, ClientConnection, Refused, as_bytes
from vllm_proxy.traffic.direct import Direct, DirectRequest, Heads, Target
from vllm_proxy.traffic.envelope import refusal
from vllm_proxy.traffic.handshake import Handshake
from vllm_proxy.traffic.keyring import Caller

log = structlog.get_logger()

_DRAIN_POLL_SECONDS = 0.01  # between two polls for connections that are still to end
_SWEEP_SECONDS = 1.0
_SWEPT_AT_ONCE = 200  # a third of a millisecond
_OPEN_FILES = 2**20  # where there is no limit
_RESERVED_FILES = 256  # for the engines' logs and processes, files that are written, and clients that are refused
_REFUSED_AT_ONCE = 64  # so many linger until they have read the answer; more are closed at once
_TOO_MANY = as_bytes(
    RequestError(
        "overloaded",
        "cannot take this connection: there are as many as server.max_connections or the limit of open files allows;"
        " try again",
        retry_after=1,
    )
)

_UNKNOWN = Listener()  # where nobody says: nothing is taken for local

type Refusal = Callable[[Admitted, ClientConnection], RequestError | None]


def most_connections(open_files: int) -> int:
    """How many clients a limit of open files allows: a stream takes two, the client's connection and the engine's."""
    if open_files == resource.RLIM_INFINITY:
        open_files = _OPEN_FILES
    return max((open_files - _RESERVED_FILES) // 2, open_files // 4)


class Front(web.Server):
    """aiohttp's server with a bound on connections, and deadlines for what clients do."""

    def __init__(
        self,
        handler: Any,  # noqa: ANN401 - aiohttp's options
        settings: Callable[[], Server],
        refusal_of: Refusal,
        targets: Iterable[Target] = (),
        **kwargs: Any,  # noqa: ANN401 - as above
    ) -> None:
        """`settings`: the `[server]` table now; `refusal_of`: why a request that was let in may not go on.

        `targets`: whose requests are read past aiohttp's parser.
        """
        super().__init__(handler, **kwargs)
        self.heads = Heads({target.line: target for target in targets})
        self._settings = settings
        self._refusal_of = refusal_of
        self._most = most_connections(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._refused: set[Refused] = set()
        self.handshakes: set[Handshake] = set()  # of clients that are not connected yet
        self._awake_seconds = 0.0  # seconds in which the daemon could read from its clients
        self._swept_at = self._loop.time()
        self._unswept: list[ClientConnection | Handshake] = []  # who is still to be looked at in this second
        self._next_sweep = self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    def __call__(self, listener: Listener = _UNKNOWN) -> RequestHandler:
        """A protocol for one more connection, which came by `listener`."""
        return ClientConnection(self, listener, loop=self._loop, **self._kwargs)

    def connection(self, listener: Listener, wire: asyncio.Transport) -> RequestHandler:
        """A protocol for one more connection, whose TLS goes through `wire`."""
        return ClientConnection(self, listener, wire, loop=self._loop, **self._kwargs)

    def head_seconds(self) -> float:
        """The deadline for a request's head now; 0: none."""
        return self._settings().head_timeout

    def has_room(self, listener: Listener) -> bool:
        """Whether one more connection of this listener may be taken in; the control socket is never full."""
        most = min(self._settings().max_connections or self._most, self._most)
        return len(self._connections) + len(self.handshakes) < most or listener.kind is Kind.CONTROL

    def refuse(self, transport: asyncio.Transport, answer: bytes = _TOO_MANY) -> None:
        """Answer that there is no room, or what else is in the way, and close."""
        refused = Refused(transport, self._refused)
        transport.set_protocol(refused)
        transport.write(answer)
        if len(self._refused) > _REFUSED_AT_ONCE:
            transport.close()
        else:
            refused.linger()

    def close(self) -> None:
        """Set no more deadlines, and take no one in who is still in a handshake."""
        self._next_sweep.cancel()
        for handshake in list(self.handshakes):
            handshake.abort()

    def revoke(self) -> None:
        """End what may not go on, since a key has changed or expired."""
        self.heads.clear()
        for connection in cast("list[ClientConnection]", self.connections):
            self._check_again(connection)

    def _check_again(self, connection: ClientConnection) -> None:
        admission = connection.in_progress
        try:
            if admission is not None and (error := self._refusal_of(admission, connection)) is not None:
                connection.revoke(admission, error)
        except Exception:  # the other connections are looked at all the same
            log.exception("a fault of the daemon: a request could not be ended")

    def _sweep(self) -> None:
        """Look at every client once a second, a few at a time: no request waits until all have been looked at."""
        now = self._loop.time()
        if not self._unswept:
            # After a freeze of the daemon, clients are not blamed for the time in which it could not read.
            self._awake_seconds += min(now - self._swept_at, 2 * _SWEEP_SECONDS)
            self._swept_at = now
            self._unswept = [*self.handshakes, *cast("list[ClientConnection]", self.connections)]
        some, self._unswept = self._unswept[:_SWEPT_AT_ONCE], self._unswept[_SWEPT_AT_ONCE:]
        wait = 0.0 if self._unswept else max(self._swept_at + _SWEEP_SECONDS - now, 0.0)
        self._next_sweep = self._loop.call_later(wait, self._sweep)
        server = self._settings()
        for client in some:
            try:
                client.enforce_deadlines(self._awake_seconds, server)
                if isinstance(client, ClientConnection):
                    self._check_expiry(client)
            except Exception:  # the other connections are checked all the same
                log.exception("a fault of the daemon: a connection could not be looked at")

    def _check_expiry(self, connection: ClientConnection) -> None:
        admission = connection.in_progress
        if admission is not None and admission.caller.is_bounded:
            self._check_again(connection)


class FrontRunner(web.AppRunner):
    """Runs an application whose `direct` routes, exact (method, path) pairs, go past its router and middlewares."""

    __slots__ = ("_direct", "_refusal_of", "_settings")

    def __init__(
        self,
        app: web.Application,
        direct: Mapping[tuple[str, str], Direct],
        settings: Callable[[], Server],
        refusal_of: Refusal,
        **kwargs: Any,  # noqa: ANN401 - aiohttp's options
    ) -> None:
        """`settings`, `refusal_of`: as of `Front`."""
        super().__init__(app, access_log=None, handle_signals=False, handler_cancellation=True,
                         auto_decompress=False, **kwargs)  # fmt: skip
        self._direct = direct
        self._settings = settings
        self._refusal_of = refusal_of

    async def accept(
        self, listening: socket.socket, listener: Listener, context: Callable[[], ssl.SSLContext] | None = None
    ) -> None:
        """Take in the clients of a listening socket, after `setup`. `context`: the TLS of one more client."""
        front = cast("Front", self.server)
        if listener.tls and context is not None:
            await _ListenerSite(self, listening, partial(Handshake, front, listener, context)).start()
        else:
            await _ListenerSite(self, listening, partial(front, listener)).start()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._clients())

    def revoke(self) -> None:
        """End what may not go on, since a key has changed."""
        if self.server is not None:
            cast("Front", self.server).revoke()

    async def drain(self, seconds: float) -> None:
        """Shut connections down gracefully: accept no more, and close idle ones.

        Those whose first request has not come, or not to its end, get `seconds` for it: their clients cannot know of
        the end.
        """
        for site in list(self.sites):
            await site.stop()
        loop = asyncio.get_running_loop()
        deadline, calm = loop.time() + seconds, 0
        # Calm in two polls: by then a request that has just come is being handled, and what was accepted is connected.
        while calm < 2 and loop.time() < deadline:
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
            for connection in self._clients():
                if connection.is_idle:
                    connection.force_close()  # `close` alone would leave it to the server's end
            receiving = any(connection.is_receiving for connection in self._clients())
            calm = 0 if receiving or self._handshakes() else calm + 1

    def _clients(self) -> list[ClientConnection]:
        return cast("list[ClientConnection]", self.server.connections) if self.server else []

    def _handshakes(self) -> int:
        return len(cast("Front", self.server).handshakes) if self.server else 0

    async def cleanup(self) -> None:
        """Close everything."""
        if self.server is not None:
            cast("Front", self.server).close()
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
                expected, message = framing.without_expectation(message)
                routed = app_request(message, payload, protocol, writer, task)
                if expected is not None:
                    routed[framing.EXPECTATION] = expected
                return routed
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
            self._refusal_of,
            [Target(method, path, route) for (method, path), route in routes.items()],
            request_factory=make_request,
            handler_cancellation=True,
            loop=loop,
            **inner._kwargs,  # noqa: SLF001 - the seam
        )


class _ListenerSite(web.SockSite):
    """A listening socket with protocols of its own, so that its connections know by which they came."""

    __slots__ = ("_protocol",)

    def __init__(self, runner: FrontRunner, listening: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        super().__init__(runner, listening, backlog=BACKLOG)
        self._protocol = protocol

    async def start(self) -> None:
        """Accept: as aiohttp does, but for the protocols."""
        await web.BaseSite.start(self)  # registers it with the runner
        self._server = await asyncio.get_running_loop().create_server(self._protocol, sock=self._sock, backlog=BACKLOG)


async def _checked(
    request: web.BaseRequest, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        framing.check(request)
    except RequestError as error:
        response = refusal(request, error)
        response.force_close()
        return response
    return await handler(request)


def client_of(request: web.BaseRequest) -> ClientConnection:
    """The connection that a request came on."""
    return request.protocol  # type: ignore[return-value] # `cast` takes as long as the rest


def withdraw_cancellation() -> bool:
    """Go on although this task was cancelled, as `ClientConnection.revoke` does; whether that is possible."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
    return task is not None


def caller_of(request: web.BaseRequest) -> Caller:
    """Who sent a request that was let in."""
    admission = client_of(request).in_progress
    assert admission is not None, "every route lets callers in first"
    return admission.caller


def client_is_slow(request: web.BaseRequest) -> bool:
    """Whether bytes of an earlier answer still wait for this client to read them."""
    return client_of(request).writing_paused
