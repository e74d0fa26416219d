"""WebSocket sessions whose other end is gone without a word, in this process, with a short heartbeat."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
from aiohttp import web

from tests.harness import connected, request
from tests.traffic.callers import admit, get, goes_on
from vllm_proxy.domain.address import TcpAddress, UnixAddress
from vllm_proxy.domain.config import Server
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.call import Call, observed
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.front import FrontRunner
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.realtime import Sessions, realtime
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.usage import Usage

PATH = "/v1/realtime"
HEARTBEAT = 0.2
UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
           "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")  # fmt: skip


class Running:
    """The route with one engine behind it."""

    def __init__(self, port: int, registry: Registry) -> None:
        self.port = port
        self.registry = registry
        self.noted = asyncio.Event()  # a session has been written down
        self.engine_gone = asyncio.Event()

    async def is_over(self) -> None:
        """Wait until the session has ended and its place is free."""
        await self.noted.wait()
        await self.engine_gone.wait()
        assert self.registry.counts("chat") == (0, 0)


@asynccontextmanager
async def running(*, engine_answers: bool = True, at: Path | None = None) -> AsyncIterator[Running]:
    """The route; the engine greets, takes what comes, and answers pings or does not. `at`: its Unix socket."""

    async def engine(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(autoping=engine_answers)
        await socket.prepare(request)
        await socket.send_json({"type": "session.created"})
        try:
            async for _ in socket:
                pass
        finally:
            found.engine_gone.set()
        return socket

    def observe(_call: Call) -> None:
        found.noted.set()

    upstream = web.Application()
    upstream.router.add_get(PATH, engine)
    upstream_runner = web.AppRunner(upstream, shutdown_timeout=0.1)
    await upstream_runner.setup()
    site = web.UnixSite(upstream_runner, str(at)) if at else web.TCPSite(upstream_runner, "127.0.0.1", 0)
    await site.start()
    listens = UnixAddress(str(at)) if at else TcpAddress(*upstream_runner.addresses[0])
    registry = Registry()
    spec = parse_config(b'[models.chat]\nmodel = "m"', "models.toml").models["chat"]
    registry.declare(spec, lambda: None)
    registry.add_endpoint("chat", Endpoint("chat/0", listens, "key", None))
    registry._routes["chat"].accepts = True
    async with aiohttp.ClientSession() as engines:
        sessions = Sessions(registry, engines, Server, Budget(), Metering(registry, Usage()), HEARTBEAT)
        cors: Any = SimpleNamespace()
        app = web.Application()
        app.router.add_get(PATH, observed(get(PATH), realtime(sessions), admit, observe, cors, active={}))
        runner = FrontRunner(app, {}, Server, goes_on, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found = Running(runner.addresses[0][1], registry)
        yield found
        await runner.cleanup()
    await upstream_runner.cleanup()


async def test_a_client_that_answers_no_ping_loses_its_session() -> None:
    """Its machine is gone, no packet says so: the engine's place is free after a heartbeat and a half."""
    async with running() as found, connected(found.port) as client:
        await client.send(request(f"{PATH}?model=chat", b"", *UPGRADE, method="GET"))
        await client.reader.readuntil(b"session.created")
        assert found.registry.counts("chat") == (1, 0)
        await found.is_over()


async def test_an_engine_that_answers_no_ping_loses_its_session() -> None:
    """The client, which is there, is told: 1011."""
    async with running(engine_answers=False) as found, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{found.port}{PATH}?model=chat"
        async with session.ws_connect(url) as client:
            assert (await client.receive_json())["type"] == "session.created"
            message = await client.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1011)
        await found.is_over()


async def test_a_session_reaches_an_engine_at_a_unix_socket(tmp_path: Path) -> None:
    """Both ways, and it ends on both sides."""
    async with running(at=tmp_path / "s") as found, aiohttp.ClientSession() as session:
        async with session.ws_connect(f"http://127.0.0.1:{found.port}{PATH}?model=chat") as client:
            assert (await client.receive_json())["type"] == "session.created"
        await found.is_over()


async def test_a_session_in_which_nothing_is_said_lives_on() -> None:
    """As long as both sides answer pings; here for a dozen heartbeats."""
    async with running() as found, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{found.port}{PATH}?model=chat"
        async with session.ws_connect(url, autoping=False) as client:
            await client.receive()
            for _ in range(12):
                message = await client.receive()
                assert message.type is aiohttp.WSMsgType.PING
                await client.pong(message.data)
            assert found.registry.counts("chat") == (1, 0)
        await found.is_over()
