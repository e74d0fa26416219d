"""TLS handshakes of clients, served in this process: what is counted, what ends, and what comes with the last byte."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, cast

import pytest
import uvloop
from aiohttp import web

from tests import certificates
from tests.certificates import Pair
from tests.harness import Client, connected, request
from tests.traffic.callers import goes_on
from vllm_proxy import tls
from vllm_proxy.domain.config import Server
from vllm_proxy.domain.listener import Listener
from vllm_proxy.runtime.background import log_faults
from vllm_proxy.runtime.referenced import ReferencedFiles
from vllm_proxy.traffic.exchange import end_in_reset
from vllm_proxy.traffic.front import Front, FrontRunner
from vllm_proxy.traffic.handshake import Handshake


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One for all of them."""
    return certificates.make(tmp_path_factory.mktemp("handshake"))


class Served:
    """A server that speaks TLS on a port."""

    def __init__(self, runner: FrontRunner, port: int, pair: Pair, server: Server) -> None:
        self.runner = runner
        self.server = server
        self.port = port
        self.pair = pair

    @property
    def front(self) -> Front:
        """The server itself."""
        return cast("Front", self.runner.server)

    async def handshake(self, count: int = 1) -> Handshake:
        """One that has begun, once there are so many."""
        while len(self.front.handshakes) < count:
            await asyncio.sleep(0)
        return next(iter(self.front.handshakes))

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """One whose handshake is done."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.pair.trust(), server_hostname="localhost"
        )
        try:
            yield Client(reader, writer)
        finally:
            writer.transport.abort()


@asynccontextmanager
async def served(pair: Pair, **keys: Any) -> AsyncIterator[Served]:  # noqa: ANN401 - keys of [server]
    """It answers each request with its body."""

    async def take(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async def unframed(request: web.Request) -> web.StreamResponse:
        """An answer that only the connection's end frames, and that does not come to its end."""
        transport = cast("asyncio.Transport", request.transport)
        end_in_reset(transport, reset=True)
        transport.write(b"HTTP/1.1 200 OK\r\n\r\nhel")
        await asyncio.Event().wait()
        raise AssertionError

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/take", take)
    app.router.add_get("/unframed", unframed)
    server = Server(**keys)
    named = Server(tls_cert=str(pair.certificate), tls_key=str(pair.key))
    loaded = tls.load(named, ReferencedFiles(pair.key.parent, None))
    assert loaded is not None
    runner = FrontRunner(app, {}, lambda: server, goes_on, shutdown_timeout=0.1)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        await runner.accept(listening, Listener.at("127.0.0.1", port, tls=True), lambda: loaded.context)
        yield Served(runner, port, pair, server)
        await runner.cleanup()


async def test_a_client_that_only_connects_costs_no_tls_session_and_has_a_deadline(pair: Pair) -> None:
    """That of a head; it is counted from its first moment."""
    async with served(pair, head_timeout=5) as found, connected(found.port) as client:
        handshake = await found.handshake()
        handshake.enforce_deadlines(100.0, found.server)
        handshake.enforce_deadlines(105.0, found.server)
        assert handshake in found.front.handshakes
        handshake.enforce_deadlines(105.5, found.server)
        assert await client.closed()
        assert not found.front.handshakes


async def test_a_handshake_that_stops_halfway_has_the_same_deadline(pair: Pair) -> None:
    """It began with the first sweep that saw the client, whatever has come since."""
    async with served(pair, head_timeout=5) as found, connected(found.port) as client:
        handshake = await found.handshake()
        handshake.enforce_deadlines(100.0, found.server)
        await client.send(b"\x16\x03\x01\x02\x00")  # a record's head, and nothing of it
        while handshake._early is None:
            await asyncio.sleep(0)
        handshake.enforce_deadlines(105.5, found.server)
        assert await client.closed()
        while found.front.handshakes:
            await asyncio.sleep(0)


async def test_zero_is_no_deadline(pair: Pair) -> None:
    """Who wants none for heads has none here."""
    async with served(pair, head_timeout=0) as found, connected(found.port):
        handshake = await found.handshake()
        for now in (0.0, 1e9, 2e9):
            handshake.enforce_deadlines(now, found.server)
        assert handshake in found.front.handshakes


async def test_half_open_handshakes_count_as_connections(pair: Pair) -> None:
    """Who comes behind them is told that the daemon is full; far too many are closed at once."""
    async with served(pair, max_connections=4) as found, AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(connected(found.port))
        await found.handshake(4)
        async with found.client() as client:
            assert (await client.answer()).status == 503
            assert await client.closed()
        for number in range(5, 65):
            await stack.enter_async_context(connected(found.port))
            await found.handshake(number)
        too_many = await stack.enter_async_context(connected(found.port))
        assert await too_many.closed()
        assert len(found.front.handshakes) == 64


async def test_who_leaves_before_a_byte_is_not_counted_any_more(pair: Pair) -> None:
    """As health checks of load balancers do."""
    async with served(pair) as found:
        async with connected(found.port):
            await found.handshake()
        while found.front.handshakes:
            await asyncio.sleep(0)
        assert found.runner.connections == 0


async def test_a_request_without_tls_is_told_so(pair: Pair) -> None:
    """In plain HTTP, at once, and in the envelope."""
    async with served(pair) as found, connected(found.port) as client:
        await client.send(request("/take", b"x"))
        answer = await client.answer()
        assert answer.status == 400
        assert b"use https://" in answer.body
        assert await client.closed()


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x00\x05hello", b"\x16" * 1000])
async def test_what_only_looks_like_a_handshake_is_closed_at_once(pair: Pair, sent: bytes) -> None:
    """With nothing but TLS's own alert, and nothing in the log but at its lowest level."""
    faults: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: faults.append(context["message"]))
    try:
        async with served(pair) as found, connected(found.port) as client:
            await client.send(sent)
            async with asyncio.timeout(30):
                with suppress(ConnectionResetError):
                    await client.reader.read()
            while found.front.handshakes:
                await asyncio.sleep(0)
    finally:
        log_faults(loop)
    assert faults == []


async def test_a_first_byte_that_comes_alone_is_enough_to_begin(pair: Pair) -> None:
    """The rest of the client's hello comes byte by byte, and so does its request."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_tls = pair.trust().wrap_bio(to_client, to_server, server_hostname="localhost")
    async with served(pair) as found, connected(found.port) as client:

        async def bytewise() -> None:
            for byte in to_server.read():
                await client.send(bytes([byte]))
                await asyncio.sleep(0)

        async def through(step: Any) -> Any:  # noqa: ANN401 - as the step has it
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    await bytewise()
                    to_client.write(await client.reader.read(2**16))

        await through(client_tls.do_handshake)
        await bytewise()
        client_tls.write(request("/take", b"hello"))
        await bytewise()
        answer = b""
        while not answer.endswith(b"hello"):
            answer += await through(lambda: client_tls.read(2**16))


async def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(pair: Pair) -> None:
    """In the very packet that ends it: nothing of it is lost, though there is no connection for it yet."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_tls = pair.trust().wrap_bio(to_client, to_server, server_hostname="localhost")
    async with served(pair) as found, connected(found.port) as client:
        with pytest.raises(ssl.SSLWantReadError):
            client_tls.do_handshake()
        await client.send(to_server.read())
        while True:
            to_client.write(await client.reader.read(2**16))
            try:
                client_tls.do_handshake()
            except ssl.SSLWantReadError:
                continue
            break
        client_tls.write(request("/take", b"hello"))
        await client.send(to_server.read())
        answer = b""
        while not answer.endswith(b"hello"):
            try:
                answer += client_tls.read(2**16)
            except ssl.SSLWantReadError:
                to_client.write(await client.reader.read(2**16))


async def test_no_version_below_1_2_is_spoken(pair: Pair) -> None:
    """A client that knows no newer one ends with TLS's own error."""
    old = pair.trust()
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    async with served(pair) as found:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", found.port, ssl=old, server_hostname="localhost")


async def test_an_answer_that_is_cut_ends_without_a_goodbye(pair: Pair) -> None:
    """A close_notify would say that an answer which only the connection's end frames is whole."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_tls = pair.trust().wrap_bio(to_client, to_server, server_hostname="localhost")
    async with served(pair) as found, connected(found.port) as client:

        async def through(step: Any) -> Any:  # noqa: ANN401 - as the step has it
            while True:
                try:
                    result = step()
                except ssl.SSLWantReadError:
                    await client.send(to_server.read())
                    if not (data := await client.reader.read(2**16)):
                        raise EOFError from None
                    to_client.write(data)
                else:
                    await client.send(to_server.read())
                    return result

        await through(client_tls.do_handshake)
        await through(lambda: client_tls.write(request("/unframed", b"", method="GET", version="1.0")))
        got = b""
        while not got.endswith(b"hel"):
            got += await through(lambda: client_tls.read(2**16))
        (connection,) = cast("Any", found.front).connections
        connection.force_close()
        with pytest.raises((EOFError, ConnectionResetError)):
            await through(lambda: client_tls.read(2**16))


def test_all_of_this_holds_on_the_loop_that_the_daemon_runs_on(pair: Pair) -> None:
    """uvloop's TLS and sockets are others than asyncio's."""

    async def all_of_it() -> None:
        log_faults(asyncio.get_running_loop())
        for test in (
            test_a_client_that_only_connects_costs_no_tls_session_and_has_a_deadline,
            test_a_handshake_that_stops_halfway_has_the_same_deadline,
            test_half_open_handshakes_count_as_connections,
            test_who_leaves_before_a_byte_is_not_counted_any_more,
            test_a_request_without_tls_is_told_so,
            test_a_first_byte_that_comes_alone_is_enough_to_begin,
            test_a_request_that_comes_with_the_end_of_the_handshake_is_answered,
            test_an_answer_that_is_cut_ends_without_a_goodbye,
        ):
            await test(pair)
        for sent in (b"\x16\x03\x01\x00\x05hello", b"\x16" * 1000):
            await test_what_only_looks_like_a_handshake_is_closed_at_once(pair, sent)

    uvloop.run(all_of_it())
