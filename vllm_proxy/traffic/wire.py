"""The pool of keep-alive connections to one engine: bytes out, bytes in, with backpressure. No HTTP.

What an answer means is up to its receiver (`exchange`). An idle connection carries nothing: one that does is closed,
not reused. An own client, since aiohttp's took four times the CPU (docs/performance.md).
"""

import asyncio
import contextlib
import time
from functools import partial
from typing import Protocol, cast

from vllm_proxy.domain.address import Address
from vllm_proxy.traffic.dial import connector

_IDLE_SECONDS = 60.0  # less than ENGINE_KEEPALIVE_SECONDS: else the engine's close could race with a request
_CONNECT_SECONDS = 5.0


class Receiver(Protocol):
    """What takes the bytes of one answer."""

    def feed(self, data: bytes) -> None:
        """The next bytes."""

    def lost(self, error: Exception | None) -> None:
        """The connection ended: None, orderly; else how it broke."""


class EngineConnection(asyncio.Protocol):
    """One connection. It belongs to one receiver from `start` until `release` or `abort`."""

    __slots__ = ("_drained", "_paused", "_pool", "_receiver", "_transport", "idle_since", "used")

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._drained: asyncio.Future[None] | None = None
        self._paused = False
        self.used = False  # whether it has carried a whole answer before
        self.idle_since = 0.0

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The engine accepted."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer; from an idle connection they answer nothing, so it is not used again."""
        if self._receiver is None:
            self.abort()
        else:
            self._pool.reads += 1
            self._receiver.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection ended."""
        self._transport = None
        self._pool.forget(self)
        if self._drained is not None and not self._drained.done():
            self._drained.set_exception(exc or ConnectionResetError("the engine closed the connection"))
        if self._receiver is not None:
            receiver, self._receiver = self._receiver, None
            if exc is None and self._pool.closed:
                exc = ConnectionAbortedError("the engine is being stopped")
            receiver.lost(exc)

    def pause_writing(self) -> None:
        """The engine reads more slowly than we send: backpressure on `send`."""
        self._drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    # The request's side

    @property
    def open(self) -> bool:
        """Whether it can carry another request."""
        return self._transport is not None and not self._transport.is_closing()

    def start(self, request: bytes, receiver: Receiver) -> None:
        """Send a request's first bytes (often all of them); its answer goes to `receiver`."""
        assert self._transport is not None
        self._receiver = receiver
        self._transport.write(request)

    async def send(self, data: bytes) -> None:
        """More of a request's body, with backpressure: no faster than the engine takes it.

        Raises:
            ConnectionError: when the engine is gone.

        """
        if self._transport is None:
            raise ConnectionResetError("the engine closed the connection")
        self._transport.write(data)
        if self._drained is not None:
            await self._drained

    def pause_reading(self) -> None:
        """The client is slow: backpressure, so the engine has to wait."""
        if self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """The client has caught up."""
        if self._transport is not None and self._paused:
            self._paused = False
            self._transport.resume_reading()

    def release(self) -> None:
        """The answer was whole: keep the connection alive for another one."""
        self._receiver = None
        self.resume_reading()
        self._pool.keep(self)

    def abort(self) -> None:
        """Close at once; vLLM then aborts the request."""
        self._receiver = None
        if self._transport is not None:
            self._transport.abort()


class Pool:
    """The connections to one engine."""

    def __init__(self, address: Address) -> None:
        self._open = connector(address, partial(EngineConnection, self))
        self._idle: list[EngineConnection] = []
        self._busy: set[EngineConnection] = set()
        self.closed = False
        self.reads = 0  # how often bytes of an answer came

    def waiting(self) -> bool:
        """Whether a request waits for bytes of its engine, not for its own client to read them."""
        return any(not connection._paused for connection in self._busy)  # noqa: SLF001 - its own pool

    def take(self) -> EngineConnection | None:
        """An idle connection, None where there is none."""
        while self._idle:
            connection = self._idle.pop()
            transport = connection._transport  # noqa: SLF001 - its own pool
            fresh = time.monotonic() - connection.idle_since < _IDLE_SECONDS
            if fresh and transport is not None and not transport.is_closing():
                self._busy.add(connection)
                return connection
            connection.abort()
        return None

    async def connect(self) -> EngineConnection:
        """A new connection.

        Raises:
            OSError: when the engine does not accept.
            TimeoutError: when it does not answer at all.

        """
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, connection = await self._open()
        self._busy.add(connection)
        return connection

    def keep(self, connection: EngineConnection) -> None:
        """A connection has done its work."""
        self._busy.discard(connection)
        if self.closed or not connection.open:
            connection.abort()
            return
        connection.used = True
        connection.idle_since = time.monotonic()
        self._idle.append(connection)

    def forget(self, connection: EngineConnection) -> None:
        """A connection has ended."""
        self._busy.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def close(self) -> None:
        """End all of them, those that carry requests too: the engine is about to go."""
        self.closed = True
        for connection in [*self._idle, *self._busy]:
            if connection._transport is not None:  # noqa: SLF001 - its own pool
                connection._transport.abort()  # noqa: SLF001 - its receiver is notified
