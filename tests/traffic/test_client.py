"""Connections of clients, served in this process: what a client has to do next has a deadline."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest
from aiohttp import web

from tests.harness import connected, request
from tests.traffic.callers import goes_on
from vllm_proxy.domain.config import Server
from vllm_proxy.domain.listener import CONTROL, Kind, Listener
from vllm_proxy.traffic import front
from vllm_proxy.traffic.client import CLIENT_SECONDS, ClientConnection
from vllm_proxy.traffic.front import FrontRunner, most_connections


class Served:
    """A server on a port; `look(now)` is what it does once a second."""

    def __init__(self, runner: FrontRunner, port: int, server: Server) -> None:
        self.runner = runner
        self.port = port
        self.server = server
        self.asked = asyncio.Event()  # a handler has begun
        self.ended = asyncio.Event()  # it is over

    async def connection(self) -> ClientConnection:
        """The only one, once it is there."""
        while not (found := cast("Any", self.runner.server).connections):
            await asyncio.sleep(0)
        return cast("ClientConnection", found[0])

    async def look(self, *times: float) -> None:
        """Look at it at these times."""
        connection = await self.connection()
        for now in times:
            connection.enforce_deadlines(now, self.server)


@asynccontextmanager
async def served(**keys: Any) -> AsyncIterator[Served]:  # noqa: ANN401 - keys of [server]
    """A server that has a route for each thing that a handler may do."""

    async def take(request: web.Request) -> web.Response:
        found.asked.set()
        return web.Response(body=await request.read())

    async def flood(request: web.Request) -> web.StreamResponse:
        found.asked.set()
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65_536)
        finally:
            found.ended.set()

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/take", take)
    app.router.add_get("/flood", flood)
    server = Server(**keys)
    runner = FrontRunner(app, {}, lambda: server, goes_on, shutdown_timeout=0.1)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = Served(runner, listener.getsockname()[1], server)
        await web.SockSite(runner, listener).start()
        yield found
        await runner.cleanup()


async def test_a_client_that_takes_nothing_of_its_answer_is_cut() -> None:
    """After a minute without a byte; while it takes some, it is left alone."""
    async with served() as found, connected(found.port, receive_buffer=4096, limit=4096) as client:
        await client.send(request("/flood", b"", method="GET"))
        await found.asked.wait()
        connection = await found.connection()
        while not connection.writing_paused:
            await asyncio.sleep(0)
        await found.look(0.0, CLIENT_SECONDS)
        assert not found.ended.is_set()
        await client.reader.read(2**22)  # the whole of what the kernel holds: more is sent
        while connection.writing_paused:
            await client.reader.read(2**16)
        while not connection.writing_paused:
            await asyncio.sleep(0)
        await found.look(CLIENT_SECONDS + 1, 2 * CLIENT_SECONDS)
        assert not found.ended.is_set()
        await found.look(2 * CLIENT_SECONDS + 2)
        await found.ended.wait()


async def test_a_head_has_a_deadline_as_a_whole() -> None:
    """More of it does not buy more time; the answer says which key sets the time."""
    async with served(head_timeout=5) as found, connected(found.port) as client:
        await found.look(100.0)
        await client.send(b"GET /take HTTP/1.1\r\n")
        while not (await found.connection()).head_bytes:
            await asyncio.sleep(0)
        await found.look(105.0, 105.5)
        answer = await client.answer()
        error = json.loads(answer.body)["error"]
        assert (answer.status, error["code"]) == (408, "request_timeout")
        assert "server.head_timeout (5 s)" in error["message"]
        assert await client.closed()


async def test_the_time_of_a_head_begins_with_its_first_byte_on_a_kept_connection() -> None:
    """Between two requests nobody is hurried."""
    async with served(head_timeout=5) as found, connected(found.port) as client:
        await client.send(request("/take", b"one"))
        assert (await client.answer()).body == b"one"
        await found.look(0.0, 60.0)
        await client.send(b"POST /take")
        while not (await found.connection()).head_bytes:
            await asyncio.sleep(0)
        await found.look(61.0, 66.0)
        await client.send(b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\ntwo")
        assert (await client.answer()).body == b"two"
        await client.send(b"POST /take")
        while not (await found.connection()).head_bytes:
            await asyncio.sleep(0)
        await found.look(100.0, 106.0)
        assert (await client.answer()).status == 408


async def test_a_body_has_a_deadline_for_its_next_byte() -> None:
    """Each byte buys the whole time again."""
    async with served(body_timeout=5) as found, connected(found.port) as client:
        await client.send(request("/take", b"ab", "Content-Length: 4"))
        await found.asked.wait()
        await found.look(0.0, 5.0)
        await client.send(b"c")
        connection = await found.connection()
        while cast("Any", connection)._current_request.content.total_bytes < 3:
            await asyncio.sleep(0)
        await found.look(6.0, 11.0)
        await client.send(b"d")
        assert (await client.answer()).body == b"abcd"


@pytest.mark.parametrize("keys", [{"head_timeout": 0, "body_timeout": 0}])
@pytest.mark.parametrize("sent", [b"", b"POST /take HTTP/1.1\r\n", request("/take", b"ab", "Content-Length: 4")])
async def test_zero_is_no_deadline(keys: dict[str, float], sent: bytes) -> None:
    """Neither for a head nor for a body."""
    async with served(**keys) as found, connected(found.port) as client:
        await client.send(sent)
        await found.look(0.0, 1e9, 2e9)
        assert found.runner.connections == 1


async def test_a_head_that_does_not_end_is_refused_before_it_is_large() -> None:
    """64 KiB in all, whatever its lines: no client may let the daemon hold megabytes of headers."""
    async with served() as found, connected(found.port) as client:
        await client.send(b"GET /take HTTP/1.1\r\n")
        await client.send(b"".join(b"X-%d: %s\r\n" % (number, b"x" * 4000) for number in range(20)))
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (431, "headers_too_large")
        assert await client.closed()


async def test_a_daemon_that_was_frozen_lets_nobody_pay_for_it() -> None:
    """An hour in which it could hear nothing counts as a moment."""
    async with served(head_timeout=30) as found, connected(found.port):
        front = cast("Any", found.runner.server)
        await found.connection()
        front._sweep()
        front._swept_at -= 3600
        front._sweep()
        front._sweep()
        assert found.runner.connections == 1


async def test_many_clients_are_looked_at_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are served in between; each client is looked at once in a second."""
    monkeypatch.setattr(front, "_SWEPT_AT_ONCE", 2)
    looked_at: list[ClientConnection] = []
    monkeypatch.setattr(ClientConnection, "enforce_deadlines", lambda self, *_: looked_at.append(self))
    async with served() as found, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(found.port)) for _ in range(5)]
        server = cast("Any", found.runner.server)
        while len(server.connections) < len(clients):
            await asyncio.sleep(0)
        server._next_sweep.cancel()
        looked_at.clear()
        server._sweep()
        assert len(looked_at) == 2
        await clients[0].send(request("/take", b"between"))
        assert (await clients[0].answer()).body == b"between"
        assert sorted(map(id, looked_at)) == sorted(map(id, server.connections))


async def test_a_connection_knows_by_which_listener_it_came() -> None:
    """Each listening socket says it of its own, whatever other sockets there are."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        async with served() as found, connected(found.port):
            assert (await found.connection()).listener == Listener()  # of a socket of which nobody said anything
            await found.runner.accept(other, CONTROL)
            async with connected(other.getsockname()[1]):
                server = cast("Any", found.runner.server)
                while len(server.connections) < 2:
                    await asyncio.sleep(0)
                assert [one.listener.kind for one in server.connections] == [Kind.ELSEWHERE, Kind.CONTROL]


@pytest.mark.parametrize(
    ("open_files", "clients"), [(1024, 384), (524_288, 262_016), (256, 64), (-1, 524_160), (1_048_576, 524_160)]
)
def test_clients_are_as_many_as_descriptors_allow(open_files: int, clients: int) -> None:
    """Two for each stream, and some for the daemon's own work; -1 is no limit."""
    assert most_connections(open_files) == clients
