"""A request of the daemon's own to an engine, in this process, with engines that are a few lines each."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from vllm_proxy.domain.address import TcpAddress
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.subrequest import Reply, ask

type Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
BODY = b'{"input": "x"}'
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def says(*answers: bytes, end: bool = False) -> Behaviour:
    """An engine that gives these answers on each of its connections, and then closes it; at once at the `end`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for each in answers:
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"Authorization: Bearer key\r\n" in head
            assert b"Content-Length: 14\r\n" in head
            assert await reader.readexactly(len(BODY)) == BODY
            writer.write(each)
            await writer.drain()
        if not end:
            await reader.read()

    return answer


async def hangs(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """An engine that says nothing."""
    await reader.read()


class Engines:
    """The instances of one model."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.connections: list[str] = []  # the instance of each that was made
        self.gone = asyncio.Event()  # a connection has ended

    async def ask(self) -> Reply:
        """Ask one of them; afterwards every permit is back."""
        try:
            route = self.registry.find("guard")
            return await ask(self.registry, route, "/classify", BODY, lines=b"X-A: b\r\n", client="", turn=None)
        finally:
            assert self.registry.counts("guard") == (0, 0)


@asynccontextmanager
async def engines(*behaviours: Behaviour) -> AsyncIterator[Engines]:
    """A model with an instance for each behaviour."""
    found = Engines()
    spec = parse_config(b'[models.guard]\nmodel = "m"\nmax_in_flight = 1', "f").models["guard"]
    found.registry.declare(spec, lambda: None)
    async with AsyncExitStack() as stack:
        for index, behaviour in enumerate(behaviours):
            name = f"guard/{index}"

            async def serve(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                name: str = name,
                does: Behaviour = behaviour,
            ) -> None:
                found.connections.append(name)
                try:
                    await does(reader, writer)
                except asyncio.IncompleteReadError:
                    pass
                finally:
                    writer.close()
                    found.gone.set()

            server = await stack.enter_async_context(await asyncio.start_server(serve, "127.0.0.1", 0))
            endpoint = Endpoint(name, TcpAddress(*server.sockets[0].getsockname()), "key", None)
            stack.callback(endpoint.pool.close)
            found.registry.add_endpoint("guard", endpoint)
        found.registry.report("guard", State.READY, None)
        yield found


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 500 Bad\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_an_answer_is_a_value_and_its_connection_is_used_again(answer: bytes) -> None:
    """However it is framed and whatever its status."""
    async with engines(says(answer, answer)) as found:
        for _ in range(2):
            reply = await found.ask()
            assert (reply.status, reply.body, reply.instance) == (500 if b"500" in answer else 200, b"ok", "guard/0")
        assert found.connections == ["guard/0"]


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        (says(end=True), "closed the connection without one"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", end=True), "closed the connection without one"),
        (says(b"HTTP/1.1 200 OK\r\n\r\nok", end=True), "closed the connection without one"),
        (says(b"HELO\r\n\r\n"), "what it sent is no answer"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 5_000_000), "larger than 4 MiB"),
    ],
)
async def test_what_is_no_whole_answer_is_asked_of_another_instance(behaviour: Behaviour, why: str) -> None:
    """Of one alone: it may be what kills them. One whose end only the connection's shows is never whole."""
    async with engines(behaviour, behaviour, behaviour) as found:
        with pytest.raises(RequestError, match=why) as error:
            await found.ask()
        assert error.value.code == "engine_failed"
        assert len(set(found.connections)) == len(found.connections) == 2
    async with engines(behaviour, says(OK)) as found:
        assert (await found.ask()).body == b"ok"


async def test_a_connection_that_closed_while_it_was_idle_is_no_failure() -> None:
    """The only instance is asked once more, on a fresh one."""
    async with engines(says(OK, end=True)) as found:
        for _ in range(3):
            assert (await found.ask()).body == b"ok"
        assert found.connections == ["guard/0"] * 3


async def test_an_engine_that_takes_no_connection_is_an_error() -> None:
    """At once."""
    async with engines() as found:
        found.registry.add_endpoint("guard", Endpoint("guard/0", TcpAddress("127.0.0.1", 1), "key", None))
        with pytest.raises(RequestError, match="takes no connection"):
            await found.ask()


async def test_who_gives_up_aborts_the_question() -> None:
    """The engine sees the end of the connection, and the permit is back."""
    async with engines(hangs) as found:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await found.ask()
        await found.gone.wait()
