"""Connections to an engine, against a server in this process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from tests.harness import at_unix_socket, free_port
from vllm_proxy.domain.address import TcpAddress, UnixAddress
from vllm_proxy.traffic import wire
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.wire import EngineConnection, Pool

type Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Receiver:
    """Takes the bytes of an answer."""

    def __init__(self) -> None:
        self.got = b""
        self.ends: list[Exception | None] = []
        self.changed = asyncio.Event()

    def feed(self, data: bytes) -> None:
        """More bytes."""
        self.got += data
        self.changed.set()

    def lost(self, error: Exception | None) -> None:
        """The end."""
        self.ends.append(error)
        self.changed.set()

    async def until(self, got: bytes | None = None, *, ends: bytes | None = None) -> None:
        """Wait for these bytes, for bytes that end so, or for the end."""
        async with asyncio.timeout(20):
            while not (self.got.endswith(ends) if ends else self.ends if got is None else self.got == got):
                self.changed.clear()
                await self.changed.wait()


@contextlib.asynccontextmanager
async def served(serve: Serve) -> AsyncIterator[Pool]:
    """A pool of connections to a server that does this with each."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    pool = Pool(TcpAddress("127.0.0.1", server.sockets[0].getsockname()[1]))
    try:
        yield pool
    finally:
        pool.close()
        server.close()
        await server.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says everything again."""
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()


async def connection_of(pool: Pool) -> EngineConnection:
    """An idle connection or a new one."""
    return pool.take() or await pool.connect()


async def gone(connection: EngineConnection) -> None:
    """Wait until a connection is closed."""
    async with asyncio.timeout(20):
        while connection.open:
            await asyncio.sleep(0)


async def test_a_released_connection_is_used_again() -> None:
    """The last one first; one that was never released is not."""
    async with served(echo) as pool:
        assert pool.take() is None
        first, second = await pool.connect(), await pool.connect()
        assert (first.used, second.used) == (False, False)
        for connection in (first, second):
            receiver = Receiver()
            connection.start(b"hello", receiver)
            await receiver.until(b"hello")
            connection.release()
        assert (first.used, second.used) == (True, True)
        assert pool.take() is second
        assert pool.take() is first
        assert pool.take() is None


async def test_an_aborted_connection_is_not_used_again() -> None:
    """The engine sees the end, its receiver hears nothing more."""
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        finally:
            ended.set()

    async with served(serve) as pool:
        connection, receiver = await pool.connect(), Receiver()
        connection.start(b"hello", receiver)
        connection.abort()
        async with asyncio.timeout(20):
            await ended.wait()
        assert pool.take() is None
        assert receiver.ends == []


async def test_an_idle_connection_that_the_engine_closed_is_not_used_again() -> None:
    """Nor counted as idle."""
    go = asyncio.Event()

    async def serve(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await go.wait()

    async with served(serve) as pool:
        connection = await pool.connect()
        connection.release()
        go.set()
        await gone(connection)
        assert pool.take() is None


async def test_an_idle_connection_that_speaks_is_closed() -> None:
    """Its bytes answer nothing and would be taken for the next answer."""
    go = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        writer.write(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await reader.read()

    async with served(serve) as pool:
        connection = await pool.connect()
        connection.release()
        go.set()
        await gone(connection)
        assert pool.take() is None


async def test_an_old_idle_connection_is_not_used_again() -> None:
    """Before the engine's own limit is reached, it is closed here."""
    async with served(echo) as pool:
        connection = await pool.connect()
        connection.release()
        connection.idle_since -= wire._IDLE_SECONDS
        assert pool.take() is None
        await gone(connection)


async def test_the_receiver_hears_how_a_connection_ended() -> None:
    """None for an orderly end, the error for a reset; once."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(5) == b"reset":
            writer.write(b"x")
            writer.transport.abort()  # the rest of the request is unread: the system resets

    async with served(serve) as pool:
        receiver = Receiver()
        connection = await pool.connect()
        connection.start(b"close", receiver)
        await receiver.until()
        assert receiver.ends == [None]
        reset = Receiver()
        connection = await pool.connect()
        connection.start(b"reset" + b"x" * 2**20, reset)
        await reset.until()
        assert len(reset.ends) == 1
        assert isinstance(reset.ends[0], ConnectionError)


async def test_an_engine_that_does_not_listen_refuses() -> None:
    """As OSError, at once."""
    pool = Pool(TcpAddress("127.0.0.1", free_port()))
    with pytest.raises(OSError, match=r"Connect|refused"):
        await pool.connect()


async def test_an_engine_at_a_unix_socket_is_asked_there(tmp_path: Path) -> None:
    """A real HTTP server: it takes the endpoint's headers, its connection is used again; nobody there is an OSError."""

    async def greet(request: web.Request) -> web.Response:
        return web.Response(text=f"{request.host} {request.headers['Authorization']}")

    app = web.Application()
    app.router.add_get("/", greet)
    async with at_unix_socket(app, tmp_path / "s") as address:
        endpoint, used = Endpoint("chat/0", address, "secret", None), []
        for _ in range(2):
            connection, receiver = await connection_of(endpoint.pool), Receiver()
            used.append(connection.used)
            connection.start(b"GET / HTTP/1.1\r\n" + endpoint.own_headers + b"\r\n", receiver)
            await receiver.until(ends=b"\r\n\r\nlocalhost Bearer secret")
            connection.release()
        assert used == [False, True]
        endpoint.pool.close()
    with pytest.raises(OSError, match=r"Connect|refused|No such file"):
        await Pool(UnixAddress(f"{tmp_path}/nobody")).connect()


async def test_a_body_is_sent_no_faster_than_the_engine_takes_it() -> None:
    """A sender waits while the engine reads nothing, and goes on when it does."""
    go, taken = asyncio.Event(), 0

    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        await go.wait()
        while data := await reader.read(2**16):
            taken += len(data)

    async with served(serve) as pool:
        connection = await pool.connect()
        connection.start(b"", Receiver())
        sent = 0

        async def send() -> None:
            nonlocal sent
            for _ in range(64):
                await connection.send(b"x" * 2**20)
                sent += 1

        sending = asyncio.create_task(send())
        async with asyncio.timeout(20):
            while connection._drained is None:  # asyncio has told it to wait
                await asyncio.sleep(0)
        assert sent < 32
        go.set()
        await asyncio.wait_for(sending, 20)
        connection.release()
        assert sent == 64


async def test_a_sender_hears_that_the_engine_is_gone() -> None:
    """While it waits, and when it comes later: ConnectionError, and the receiver is told too."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    async with served(serve) as pool:
        connection, receiver = await pool.connect(), Receiver()
        connection.start(b"x", receiver)

        async def send() -> None:
            for _ in range(1000):
                await connection.send(b"x" * 2**20)

        with pytest.raises(ConnectionError):
            await send()
        await receiver.until()
        with pytest.raises(ConnectionError):
            await connection.send(b"more")


async def test_a_paused_connection_reads_nothing_and_a_released_one_reads_again() -> None:
    """Both are harmless when repeated, and on a connection that has ended."""
    async with served(echo) as pool:
        connection, receiver = await pool.connect(), Receiver()
        connection.pause_reading()
        connection.pause_reading()
        connection.start(b"hello", receiver)
        other, heard = await pool.connect(), Receiver()
        for text in (b"a", b"ab", b"abc"):  # as long as three answers take
            other.start(text[-1:], heard)
            await heard.until(text)
        assert receiver.got == b""
        connection.resume_reading()
        connection.resume_reading()
        await receiver.until(b"hello")
        connection.pause_reading()
        connection.release()
        again = Receiver()
        taken = await connection_of(pool)
        assert taken is connection
        taken.start(b"again", again)
        await again.until(b"again")
        taken.abort()
        await gone(taken)
        taken.pause_reading()
        taken.resume_reading()
        taken.abort()


async def test_a_closed_pool_ends_every_connection_and_keeps_none() -> None:
    """Those that carry a request too: its receiver hears of it."""
    async with served(echo) as pool:
        idle, busy, late = await pool.connect(), await pool.connect(), await pool.connect()
        receiver = Receiver()
        idle.release()
        busy.start(b"", receiver)
        pool.close()
        await receiver.until()
        for connection in (idle, busy, late):
            await gone(connection)
        late.release()
        assert pool.take() is None
