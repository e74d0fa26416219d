"""A question to all instances at once, in this process, with engines that are a few lines each."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web

from tests.harness import Answer, connected, request
from tests.traffic.callers import admit, get, goes_on
from vllm_proxy.domain.address import TcpAddress
from vllm_proxy.domain.config import ModelSpec, Server
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.traffic.call import Call, observed
from vllm_proxy.traffic.client import ClientConnection
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.fan_out import fan_out
from vllm_proxy.traffic.front import FrontRunner
from vllm_proxy.traffic.registry import Registry

PATH = "/v1/responses/r"
type Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def says(status: int, body: bytes = b"{}") -> Behaviour:
    """An engine that answers so."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
        await reader.read()

    return answer


async def hangs(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """An engine that takes the question and says nothing."""
    await reader.read()


async def breaks(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """An engine that takes the question and closes."""
    await reader.readuntil(b"\r\n\r\n")


class Fleet:
    """Engines, one model each, and the front that asks them."""

    def __init__(self, runner: FrontRunner, registry: Registry, gone: Mapping[str, asyncio.Event]) -> None:
        self.port = runner.addresses[0][1]
        self.runner = runner
        self.registry = registry
        self.gone = gone  # by engine: whoever asked it has left
        self.calls: list[Call] = []
        self.noted = asyncio.Event()

    async def ask(self) -> Answer:
        """The answer to the question, once the call was written down and every permit is back."""
        async with connected(self.port) as client:
            await client.send(request(PATH, b"", method="GET"))
            answer = await client.answer()
        await self.noted.wait()
        assert {self.registry.counts(name.partition("/")[0]) for name in self.gone} <= {(0, 0)}
        return answer

    @property
    def client(self) -> ClientConnection:
        """The only client's connection."""
        (found,) = cast("Any", self.runner.server).connections
        return cast("ClientConnection", found)


@asynccontextmanager
async def fleet(
    engines: Mapping[str, Behaviour],
    seconds: float = 60.0,
    policy: str = "",
    work: Callable[[Call, Registry], Any] | None = None,
) -> AsyncIterator[Fleet]:
    """These engines, by model, or by instance as "chat/1". `work`: instead of asking all of them."""
    gone = {name: asyncio.Event() for name in engines}
    registry = Registry()
    for model in {name.partition("/")[0] for name in engines}:
        registry.declare(spec(model, policy), lambda: None)
    async with AsyncExitStack() as stack:
        for name, behaviour in engines.items():

            async def serve(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                name: str = name,
                does: Behaviour = behaviour,
            ) -> None:
                try:
                    await does(reader, writer)
                finally:
                    gone[name].set()
                    writer.close()

            server = await stack.enter_async_context(await asyncio.start_server(serve, "127.0.0.1", 0))
            model, _, replica = name.partition("/")
            endpoint = Endpoint(f"{model}/{replica or 0}", TcpAddress(*server.sockets[0].getsockname()), "key", None)
            stack.callback(endpoint.pool.close)
            registry.add_endpoint(model, endpoint)

        async def ask(call: Call) -> web.StreamResponse:
            return await (work(call, registry) if work is not None else fan_out(call, registry, b"", seconds))

        def observe(call: Call) -> None:
            found.calls.append(call)
            found.noted.set()

        cors: Any = SimpleNamespace()
        handler = observed(get(PATH), ask, admit, observe, cors, active={})
        runner = FrontRunner(web.Application(), {("GET", PATH): handler}, Server, goes_on)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found = Fleet(runner, registry, gone)
        yield found


def spec(name: str, policy: str) -> ModelSpec:
    """A model."""
    return parse_config(f'[models.{name}]\nmodel = "m"\n{policy}'.encode(), "models.toml").models[name]


async def test_one_that_hangs_hides_nobody() -> None:
    """Whoever knows it answers at once, and the question to the other is taken back."""
    async with fleet({"a": hangs, "b": says(200, b'{"id": "r"}'), "c": says(404), "d": breaks}) as found:
        answer = await found.ask()
        assert (answer.status, answer.body) == (200, b'{"id": "r"}')
        assert answer.all("X-Vllm-Proxy-Instance") == ["b/0"]
        await found.gone["a"].wait()
        (call,) = found.calls
        assert (call.model, call.instance, call.status, call.bytes_out) == ("b", "b/0", 200, 11)


@pytest.mark.parametrize(
    ("engines", "status", "code", "named"),
    [
        ({"a": says(404), "b": says(501)}, 404, "not_found", "no ready instance knows it"),
        ({}, 404, "not_found", "no ready instance knows it"),
        ({"a": says(404), "b": hangs}, 504, "request_timeout", "b/0"),
        ({"a": says(404), "b": breaks}, 502, "engine_failed", "b/0"),
        ({"a": says(404), "b": says(503)}, 502, "engine_failed", "b/0"),
        ({"a": breaks, "b": hangs}, 504, "request_timeout", "b/0"),
    ],
)
async def test_not_found_is_said_only_when_everybody_said_so(
    engines: dict[str, Behaviour], status: int, code: str, named: str
) -> None:
    """One that hangs, broke off or failed might have known it."""
    async with fleet(engines, 0.2 if hangs in engines.values() else 60.0) as found:
        answer = await found.ask()
        error = json.loads(answer.body)["error"]
        assert (answer.status, error["code"]) == (status, code)
        assert named in error["message"]


async def test_an_error_of_the_one_that_knows_is_its_answer() -> None:
    """vLLM refuses to cancel what is complete."""
    async with fleet({"a": says(404), "b": says(400, b'{"error": "complete"}')}) as found:
        answer = await found.ask()
        assert (answer.status, answer.body) == (400, b'{"error": "complete"}')


async def test_a_refused_connection_is_no_not_found() -> None:
    """502: that instance could not be asked."""
    async with fleet({"a": says(404)}) as found:
        found.registry.declare(spec("b", ""), lambda: None)
        found.registry.add_endpoint("b", Endpoint("b/0", TcpAddress("127.0.0.1", 1), "key", None))
        assert (await found.ask()).status == 502
        assert found.registry.counts("b") == (0, 0)


async def test_a_client_that_leaves_takes_all_questions_back() -> None:
    """Every engine sees the end, and every permit is given back."""
    async with fleet({"a": hangs, "b": hangs}) as found:
        async with connected(found.port) as client:
            await client.send(request(PATH, b"", method="GET"))
            while sum(found.registry.counts(name)[0] for name in "ab") < 2:
                await asyncio.sleep(0)
            client.leave()
            for event in (*found.gone.values(), found.noted):
                await event.wait()
        assert [found.registry.counts(name) for name in "ab"] == [(0, 0), (0, 0)]


async def test_the_one_that_knows_has_the_time_of_its_model() -> None:
    """`request_timeout` cuts an answer that began and does not end."""

    async def begins(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe")
        await reader.read()

    async with fleet({"a": begins, "b": says(404)}, policy='request_timeout = "200ms"') as found:
        answer = await found.ask()
        assert (answer.body, answer.whole) == (b"he", False)
