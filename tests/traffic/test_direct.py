"""Two ways for a request: read past aiohttp's parser, or by it. Nobody can tell which one it went.

Both are driven with the same bytes in the same pieces; the server without targets has the usual way alone.
"""

import asyncio
import gc
import itertools
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from aiohttp import web
from hypothesis import example, given
from hypothesis import strategies as st

from tests.traffic.callers import goes_on
from vllm_proxy.domain.config import Server
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic import framing
from vllm_proxy.traffic.client import ClientConnection
from vllm_proxy.traffic.direct import SENT_CLOSE, SENT_KEEP_ALIVE, Heads, ReadRequest, Target
from vllm_proxy.traffic.front import Front, FrontRunner, client_of
from vllm_proxy.traffic.head import read_head

PATH = "/v1/chat/completions"
TURNS = 30  # of the event loop: more than anything here takes


class Wire(asyncio.Transport):
    """A client's connection: keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False
        self.reads = True
        self.pauses = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes for the client."""
        self.written += bytes(data)

    def is_closing(self) -> bool:
        """Whether it ends."""
        return self.closed

    def close(self) -> None:
        """End it."""
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        """Backpressure."""
        self.reads = False
        self.pauses += 1

    def resume_reading(self) -> None:
        """It is over."""
        self.reads = True

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0


@dataclass
class Seen:
    """What a handler saw of one request."""

    path: str
    mine: dict[bytes, bytes]
    forwarded: bytes
    body: bytes
    is_direct: bool = field(compare=False)


@dataclass
class Served:
    """A connection, and what came of it."""

    connection: ClientConnection
    wire: Wire
    seen: list[Seen]
    gone: list[str]  # how handlers ended that did not return

    async def send(self, *pieces: bytes) -> None:
        """Bytes of the client, with time in between."""
        for piece in pieces:
            if not self.wire.closed:
                self.connection.data_received(piece)
                await turns()


async def turns(count: int = TURNS) -> None:
    """Let everything happen that can."""
    for _ in range(count):
        await asyncio.sleep(0)


def handler_of(seen: list[Seen], gone: list[str], wait: Callable[[], Awaitable[None]]) -> Any:  # noqa: ANN401 - a Direct
    """Answers as the relay does, or as errors are answered; as the request's X-Do says."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        mine, forwarded = read_head(request.raw_headers)
        do = dict(request.raw_headers).get(b"X-Do", b"")
        length = request.headers.get("Content-Length")  # as those see it that ask aiohttp's request
        body = b""
        try:
            framing.check_codings(
                mine.get(b"transfer-encoding", b"chunked").decode(), mine.get(b"content-encoding", b"").decode()
            )
            if do == b"refuse":
                return web.Response(status=403, text="no")
            while not request.content.at_eof():
                body += await request.content.readany()
            if do == b"wait":
                await wait()
        except RequestError:
            return web.Response(status=400, text="framing")
        except (asyncio.CancelledError, ConnectionError) as error:
            gone.append(type(error).__name__)
            raise
        seen.append(Seen(request.path_qs, dict(mine), forwarded, body, isinstance(request, ReadRequest)))
        assert length is None or mine[b"content-length"].decode() == length
        if do == b"text":
            return web.Response(text=f"{len(body)} bytes by {request.method} {request.path}")
        assert request.transport is not None
        closes = do == b"close" or not request.keep_alive
        request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        return SENT_CLOSE if closes else SENT_KEEP_ALIVE

    return handle


@asynccontextmanager
async def served(*, direct: bool, wait: Callable[[], Awaitable[None]] = turns) -> AsyncIterator[Served]:
    """A client's connection. `direct`: both ways are open; else the usual one alone. `wait`: for X-Do: wait."""
    seen: list[Seen] = []
    gone: list[str] = []
    app = web.Application()

    async def other(request: web.Request) -> web.Response:
        return web.Response(text=f"other {request.path} {len(await request.read())}")

    app.router.add_route("*", "/other", other)
    runner = FrontRunner(app, {("POST", PATH): handler_of(seen, gone, wait)}, Server, goes_on, shutdown_timeout=0.1)
    await runner.setup()
    front = cast("Front", runner.server)
    if not direct:
        front.heads = Heads({})
    connection, wire = cast("ClientConnection", front()), Wire()
    connection.connection_made(wire)
    try:
        yield Served(connection, wire, seen, gone)
    finally:
        connection.connection_lost(None)
        await turns()
        await runner.cleanup()


def post(body: bytes = b"{}", *lines: bytes, path: str = PATH) -> bytes:
    """A plain request."""
    head = [b"POST %s HTTP/1.1" % path.encode(), b"Host: localhost", *lines, b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*head, b"", body])


def answers(wire: Wire) -> list[bytes]:
    """The status lines and bodies of what was written; dates and the daemon's own ids are left out."""
    lines = wire.written.split(b"\r\n")
    return [line for line in lines if not line.startswith((b"Date:", b"X-Request-Id:"))]


PLAIN = st.builds(
    lambda body, lines: post(body, *lines),
    st.binary(max_size=40),
    st.lists(st.sampled_from([b"X-A: b", b"X-Do: wait", b"x-do2: refuse", b"Connection: keep-alive"]), unique=True),
)
DO = st.builds(lambda do, body: post(body, b"X-Do: " + do), st.sampled_from([b"text", b"wait"]), st.binary(max_size=9))
# What only one of two readers might take, or take for something else.
ODD = st.sampled_from([
    post(b"{}", b"X-A:b"),
    post(b"{}", b"X-A:  b "),
    post(b"{}", b"X-A: "),
    post(b"{}", b"X-A: \xc3\xa9"),
    post(b"{}", b"X-A: a\x00b"),
    post(b"{}", b"X-A: a\tb"),
    post(b"{}", b"X-A : b"),
    post(b"{}", b"X-A: b", b" folded"),
    post(b"{}", b"Content-Length: 2"),
    post(b"{}", b"content-length: 3"),
    post(b"{}", b"CONTENT-LENGTH:2"),
    post(b"{}", b"Transfer-Encoding: chunked"),
    post(b"{}", b"Content-Encoding: gzip"),
    post(b"{}", b"X-A: b\nX-C: d"),
    post(b"{}", b"X-A: b\rX-C: d"),
    post(b"{}", b"garbage"),
    post(b"{}", b": b"),
    post(b"{}", b"Host: elsewhere"),
    post(b"{}", b"X-A: b", b"X-A: c"),
    post(b"{}", b"Connection: close"),
    post(b"{}", b"Connection: X-A", b"X-A: b"),
    post(b"{}", b"Connection: Keep-Alive"),
    post(b"{}", b"Expect: 100-continue"),
    post(b"{}", b"Upgrade: h2c"),
    post(b"{}", b"X-Do: refuse"),
    post(b"{}", b"X-Do: close"),
    post(b"{}", path=PATH + "?a=b"),
    post(b"{}", path=PATH + "/"),
    post(b"{}", path="http://localhost" + PATH),
    post(b"12345", path="/other"),
    post(b"{}", path="/nowhere"),
    b"\r\n" + post(),
    b"\n",
    b"\r\n\r\n",
    b"POST " + PATH.encode() + b" HTTP/1.0\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}",
    b"POST " + PATH.encode() + b" HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
    b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"POST " + PATH.encode() + b" HTTP/1.1\nHost: a\nContent-Length: 2\n\n{}",
    b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 0002\r\n\r\n{}",
    b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: +2\r\n\r\n{}",
    b"POST  " + PATH.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /other HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /other HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n" + post()[:50],
    b"GET /other HTTP/1.1\r\nHost: a\r\n\r\nPOST /oth",
    b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\nContent-Length: 27\r\n\r\nPOST /other HTTP/1.1\r\nX-A: ",
    b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST " + PATH.encode() + b" HTTP/1.1\r\nX-A: ",
])  # fmt: skip
STREAMS = st.lists(PLAIN | DO | ODD, min_size=1, max_size=4).map(b"".join)


@given(STREAMS, st.lists(st.integers(0, 400), max_size=5), st.sampled_from([0, TURNS]))
@example(b"GET /other HTTP/1.1\r\nHost: a\r\n\r\n" + post()[:30] + post(), [33, 63], TURNS)
def test_the_same_bytes_in_any_pieces_have_the_same_answers_on_both_ways(
    stream: bytes, cuts: Sequence[int], between: int
) -> None:
    """The handler sees the same requests, the client the same bytes, and the connection ends or lives on alike."""
    places = [0, *sorted({min(cut, len(stream)) for cut in cuts}), len(stream)]
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(places) if end > begin]

    async def run(*, direct: bool) -> tuple[list[Seen], list[bytes], bool]:
        async with served(direct=direct) as found:
            for piece in pieces:
                if not found.wire.closed:
                    found.connection.data_received(piece)
                    await turns(between)
            await turns(8 * TURNS)
            return found.seen, answers(found.wire), found.wire.closed

    usual, both = asyncio.run(run(direct=False)), asyncio.run(run(direct=True))
    assert both == usual
    assert not any(seen.is_direct for seen in usual[0])


@pytest.mark.parametrize("cut", [0, 20, len(post()) - 2, len(post()) - 1])
async def test_a_plain_request_is_read_past_the_parser_wherever_its_body_is_cut(cut: int) -> None:
    """Many clients send head and body apart. A head in two pieces goes the usual way, and so does what follows."""
    whole = post()
    async with served(direct=True) as found:
        await found.send(*filter(None, (whole[:cut], whole[cut:])))
        await found.send(whole)
        assert [seen.is_direct for seen in found.seen] == [cut != 20] * 2
        assert found.wire.written.count(b"HTTP/1.1 200 OK") == 2


async def test_a_connection_goes_on_directly_behind_another_route() -> None:
    """Of a plain head it is known where its request ends, whoever answers it."""
    async with served(direct=True) as found:
        await found.send(b"GET /other HTTP/1.1\r\nHost: a\r\n\r\n", post(b"12", path="/other"), post())
        assert [seen.is_direct for seen in found.seen] == [True]


async def test_what_comes_while_the_parser_is_at_work_is_not_taken_for_a_head() -> None:
    """A part of a head came behind a request of the parser: what follows is the rest of that line."""
    async with served(direct=True) as found:
        begun = b"POST /other HTTP/1.1\r\nHost: a\r\nX-A: "
        found.connection.data_received(b"GET /other HTTP/1.1\r\nHost: a\r\n\r\n")
        found.connection.data_received(begun)
        await turns()
        await found.send(post())
        assert found.seen == []


async def test_a_client_that_leaves_cancels_its_handler() -> None:
    """At once, as on the usual way: the engine stops working."""
    for direct in (True, False):
        never = asyncio.Event()

        async def wait(event: asyncio.Event = never) -> None:
            await event.wait()

        async with served(direct=direct, wait=wait) as found:
            await found.send(post(b"{}", b"X-Do: wait"))
            found.connection.connection_lost(None)
            await turns()
            assert found.gone == ["CancelledError"]


async def test_a_client_that_leaves_in_the_middle_of_its_body_cancels_its_handler() -> None:
    """Whoever waits for the rest waits no more."""
    for direct in (True, False):
        async with served(direct=direct) as found:
            await found.send(post(b"12345")[:-2])
            found.connection.connection_lost(None)
            await turns()
            assert len(found.gone) == 1
            assert found.seen == []


async def test_a_body_that_nobody_reads_pauses_its_client() -> None:
    """Backpressure on what comes faster than it is read; it is read on where somebody does."""
    size = 2**20
    async with served(direct=True) as found:
        whole = post(b"x" * size, b"X-Do: refuse")
        await found.send(whole[:1000])
        for start in range(1000, len(whole), 65_536):
            found.connection.data_received(whole[start : start + 65_536])
        await turns()
        assert found.wire.pauses
        assert found.wire.reads, "the rest of it was read and dropped"
        assert found.wire.written.startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize("cut", [2, 0])
async def test_a_client_that_left_is_forgotten_at_once_with_its_request(cut: int) -> None:
    """Neither its connection nor the collector's next turn keeps that, in the middle of its body or behind it."""
    never = asyncio.Event()

    async def wait() -> None:
        await never.wait()

    async with served(direct=True, wait=wait) as found:
        whole = post(b"12345", b"X-Do: wait")
        await found.send(whole[: len(whole) - cut])
        left = weakref.ref(cast("Any", found.connection._current_request))
        gc.disable()
        try:
            found.connection.connection_lost(None)
            await turns()
            assert left() is None
        finally:
            gc.enable()


async def test_a_client_that_leaves_is_seen_to_although_it_has_sent_more() -> None:
    """Small pieces behind its request do not stop its connection from being read."""
    never = asyncio.Event()

    async def wait() -> None:
        await never.wait()

    async with served(direct=True, wait=wait) as found:
        await found.send(post(b"{}", b"X-Do: wait"), *[b"P"] * 100, b"x" * 20_000)
        assert found.wire.reads


async def test_what_comes_behind_a_request_waits_bounded() -> None:
    """More than a few requests in advance pause the client, until the first one has its answer."""
    go = asyncio.Event()

    async def wait() -> None:
        await go.wait()

    async with served(direct=True, wait=wait) as found:
        await found.send(post(b"{}", b"X-Do: wait"))
        behind = post(b"x" * 10_000) * 80
        found.connection.data_received(behind)
        assert not found.wire.reads
        go.set()
        await turns(80 * TURNS)
        assert found.wire.reads
        assert len(found.seen) == 81


async def test_a_head_is_kept_without_its_length() -> None:
    """The next one that differs in its length alone is not read again; one with an id of its own is not kept."""
    heads = Heads({b"POST %s HTTP/1.1\r\n" % PATH.encode(): Target("POST", PATH, handler_of([], [], turns))})
    first, second = heads.read(post(b"1")), heads.read(post(b"22"))
    assert first is not None
    assert second is not None
    assert second.kept is first.kept
    assert (first.length, second.length) == (b"1", b"2")
    own = [heads.read(post(b"1", b"X-Request-Id: a")) for _ in range(2)]
    assert own[0] is not None
    assert own[1] is not None
    assert own[0].kept is not own[1].kept


async def test_an_end_of_the_daemon_waits_for_an_answer_and_cancels_what_takes_too_long() -> None:
    """As aiohttp does for its own."""
    for direct in (True, False):
        never = asyncio.Event()

        async def wait(event: asyncio.Event = never) -> None:
            await event.wait()

        async with served(direct=direct, wait=wait) as found:
            await found.send(post(b"{}", b"X-Do: wait"))
            found.connection.close()
            await found.connection.shutdown(0.01)
            await turns()
            assert found.gone == ["CancelledError"]


def test_an_idle_connection_is_one_without_an_answer() -> None:
    """A graceful end closes idle ones: not one whose request was read past the parser and is being answered."""

    async def run() -> None:
        go = asyncio.Event()

        async def wait() -> None:
            await go.wait()

        async with served(direct=True, wait=wait) as found:
            await found.send(post(b"{}", b"X-Do: wait"))
            assert not found.connection.is_idle
            assert not found.connection.is_receiving
            go.set()
            await turns()
            assert found.connection.is_idle
            assert client_of(cast("Any", type("R", (), {"protocol": found.connection}))) is found.connection

    asyncio.run(run())
