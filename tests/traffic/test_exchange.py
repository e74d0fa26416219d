"""One answer on its way from an engine to a client, fed by hand: whatever the pieces, what comes out is the same.

All of it holds of an exchange whose tokens are counted, too, whether or not its usage is taken out.
"""

import asyncio
import itertools
import re
import socket
from collections.abc import Iterator
from typing import ClassVar, cast

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_proxy.traffic.exchange import Ending, Exchange
from vllm_proxy.traffic.sieve import MeteredExchange
from vllm_proxy.traffic.wire import EngineConnection

EVENT_ERROR = b"data: broke\n\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = b"9\r\ndata: a\n\n\r\nb;x=y\r\ndata: bcd\n\n\r\n"
DONE = b"e\r\ndata: [DONE]\n\n\r\n"
LAST = b"0\r\n\r\n"
LENGTH = b"HTTP/1.1 201 Made\r\nX-A: 1\r\nContent-Length: 5\r\nx-a: 2\r\n\r\nhello"
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"


class Client:
    """A transport that remembers, and its own socket."""

    def __init__(self) -> None:
        self.got = b""
        self.cut = False
        self.linger = b""  # SO_LINGER as it was set last

    def get_extra_info(self, name: str) -> "Client":
        """The socket."""
        assert name == "socket"
        return self

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        """How its end is told."""
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER)
        self.linger = value

    def write(self, data: bytes) -> None:
        """Bytes for the client."""
        assert not self.cut
        self.got += data

    def is_closing(self) -> bool:
        """Whether it was cut."""
        return self.cut

    def abort(self) -> None:
        """The connection is cut."""
        self.cut = True


class Engine:
    """An engine's connection that remembers."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        return lambda: self.calls.append(name)


class Run:
    """An exchange with both ends."""

    kind: ClassVar[type[Exchange]] = Exchange
    strips: ClassVar[bool] = False  # where it is metered, whether the usage is taken out

    def __init__(self, *, http10: bool = False, no_body: bool = False, close: bool = False, declined: int = 0) -> None:
        self.loop = asyncio.new_event_loop()
        self.client, self.engine = Client(), Engine()

        async def make() -> Exchange:
            made = Run.kind(
                self.client,
                b"X-Extra: 1\r\n",
                EVENT_ERROR,
                http10=http10,
                no_body=no_body,
                close=close,
                on_head=(lambda status: status != declined) if declined else None,
            )
            if isinstance(made, MeteredExchange):
                made.meter("/v1/chat/completions", strip=self.strips, on_body=None)
            return made

        self.exchange = self.loop.run_until_complete(make())
        self.exchange.connection = cast("EngineConnection", self.engine)
        self.loop.close()

    def feed(self, *pieces: bytes) -> "Run":
        """Bytes from the engine, as long as the exchange wants them."""
        for piece in pieces:
            if piece and not self.exchange.ended.done():
                self.exchange.feed(piece)
        return self

    def lost(self, error: Exception | None = None) -> "Run":
        """The engine's connection ends."""
        self.exchange.lost(error)
        return self

    @property
    def ending(self) -> Ending | None:
        """How it ended, None while it goes on."""
        return self.exchange.ended.result() if self.exchange.ended.done() else None

    @property
    def head(self) -> list[bytes]:
        """The lines of the head that the client got."""
        return self.client.got.partition(b"\r\n\r\n")[0].split(b"\r\n")

    @property
    def body(self) -> bytes:
        """What the client got behind the head."""
        return self.client.got.partition(b"\r\n\r\n")[2]


@pytest.fixture(params=["exchange", "metered", "usage taken out"], autouse=True, scope="module")
def kind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each fact holds of all three."""
    if request.param != "exchange":
        Run.kind, Run.strips = MeteredExchange, request.param == "usage taken out"
    yield
    Run.kind = Exchange


def cut_at(data: bytes, places: list[int]) -> list[bytes]:
    """The same bytes in pieces."""
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


PLACES = st.lists(st.integers(0, 400), max_size=8)


@pytest.mark.parametrize(
    "answer",
    [CHUNKED + EVENTS + DONE + LAST, LENGTH, EARLY + EARLY + LENGTH, b"HTTP/1.1 204 No Content\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", CHUNKED + LAST,
     EARLY + CHUNKED + EVENTS + b"0\r\nTrailer: x\r\n\r\n",
     b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"],
    ids="stream length early no-content empty no-chunks trailer http10 not-modified".split(),
)  # fmt: skip
@pytest.mark.parametrize("http10", [False, True])
@given(places=PLACES)
def test_a_whole_answer_comes_out_the_same_however_it_comes_in(
    answer: bytes,
    places: list[int],
    http10: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """Byte by byte or at once: the same head, the same body, the whole ending."""
    at_once, piecewise = Run(http10=http10).feed(answer), Run(http10=http10).feed(*cut_at(answer, places))
    assert at_once.ending is piecewise.ending is Ending.WHOLE
    assert at_once.client.got == piecewise.client.got
    assert at_once.engine.calls == piecewise.engine.calls
    assert not piecewise.client.cut


@given(places=PLACES)
def test_a_chunked_body_passes_with_its_framing_and_decoded_for_http10(places: list[int]) -> None:
    """A client of HTTP/1.1 gets the very bytes, extensions included; one of 1.0 the events alone."""
    body = EVENTS + DONE + LAST
    assert Run().feed(*cut_at(CHUNKED + body, places)).body == body
    plain = Run(http10=True).feed(*cut_at(CHUNKED + body, places))
    assert plain.body == b"data: a\n\ndata: bcd\n\ndata: [DONE]\n\n"
    assert not any(line.lower().startswith(b"transfer-encoding") for line in plain.head)
    assert plain.exchange.close


NO_ROUTE = (
    b"HTTP/1.1 404 Not Found\r\nserver: uvicorn\r\ncontent-length: 22\r\ncontent-type: application/json\r\n\r\n"
    b'{"detail":"Not Found"}'
)


@given(places=PLACES)
def test_an_engine_without_the_route_is_told_apart_however_its_answer_comes(places: list[int]) -> None:
    """Nothing of it is passed on, and its connection is used again."""
    run = Run().feed(*cut_at(NO_ROUTE, places))
    assert run.ending is Ending.NO_ROUTE
    assert (run.client.got, run.engine.calls) == (b"", ["release"])


@pytest.mark.parametrize(
    "answer",
    [NO_ROUTE.replace(b'Not Found"}', b'Not found"}'), NO_ROUTE.replace(b"404", b"410"),
     b'HTTP/1.1 404 Not Found\r\nContent-Length: 23\r\n\r\n{"detail":"Not Found"}\n'],
    ids=["words", "status", "length"],
)  # fmt: skip
@given(places=PLACES)
def test_any_other_404_passes_unchanged(answer: bytes, places: list[int]) -> None:
    """An engine's own errors are its own."""
    run = Run().feed(*cut_at(answer, places))
    assert run.ending is Ending.WHOLE
    assert run.body == answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("coding", [b"gzip", b"identity", b"gzip, chunked"])
@pytest.mark.parametrize("http10", [False, True])
def test_a_body_in_another_transfer_coding_is_no_answer(coding: bytes, *, http10: bool) -> None:
    """Passed on as one of chunks it could look whole, and be another one."""
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\n5\r\nhello\r\n0\r\n\r\n" % coding
    run = Run(http10=http10, close=True).feed(answer).lost()
    assert (run.ending, run.client.got) == (Ending.BROKEN_HEAD, b"")


@pytest.mark.parametrize("places", [[], [*range(100)]], ids=["at once", "bytewise"])
@pytest.mark.parametrize("status", [b"000", b"042", b"099"])
def test_a_status_that_http_does_not_have_is_no_answer(status: bytes, places: list[int]) -> None:
    """It is neither one to pass on nor an interim one, behind which the answer would come."""
    run = Run().feed(*cut_at(b"HTTP/1.1 %s OK\r\nContent-Length: 2\r\n\r\n{}" % status, places))
    assert (run.ending, run.client.got) == (Ending.BROKEN_HEAD, b"")


def test_an_engine_cannot_take_the_length_of_its_answer_away() -> None:
    """By naming it a header of one connection: the next answer would be read as more of this one."""
    run = Run().feed(b"HTTP/1.1 200 OK\r\nConnection: Content-Length, X-Own\r\nX-Own: 1\r\nContent-Length: 2\r\n\r\n{}")
    assert run.ending is Ending.WHOLE
    assert [line for line in run.head if b"X-Own" in line or b"Content-Length" in line] == [b"Content-Length: 2"]


def test_what_begins_as_that_answer_and_breaks_off_is_no_answer() -> None:
    """Nothing has been passed on."""
    run = Run().feed(NO_ROUTE[:-1]).lost()
    assert (run.ending, run.client.got) == (Ending.BROKEN_HEAD, b"")
    assert Run(no_body=True).feed(NO_ROUTE.removesuffix(b'{"detail":"Not Found"}')).ending is Ending.WHOLE


def is_boundary(body: bytes) -> bool:
    """Whether a chunked body was cut behind a whole chunk that ends an event, and before [DONE]."""
    whole = [b"", EVENTS[:14], EVENTS]
    return body in whole


@pytest.mark.parametrize("cut", range(len(EVENTS + DONE + LAST)))
@pytest.mark.parametrize("places", [[], [*range(100)], [*range(0, 100, 7)]], ids=["at once", "bytewise", "sevens"])
def test_a_stream_cut_anywhere_never_looks_whole(cut: int, places: list[int]) -> None:
    """At an event's boundary it says so and ends properly, elsewhere the connection is cut; [DONE] is never made up."""
    body = (EVENTS + DONE + LAST)[:cut]
    run = Run().feed(CHUNKED).feed(*cut_at(body, places)).lost()
    assert run.ending is Ending.BROKEN
    assert run.exchange.close
    if is_boundary(body):
        assert run.body == body + b"%x\r\n%s\r\n0\r\n\r\n" % (len(EVENT_ERROR), EVENT_ERROR)
        assert not run.client.cut
    else:
        assert (run.body, run.client.cut) == (body, True)


@given(
    parts=st.lists(
        st.sampled_from([b"data: x", b"\n", b"\r\n", b"\n\n", b"5", b"a\r\n", b": c\n"]), min_size=1, max_size=6
    )
)
def test_a_boundary_is_one_of_the_events_and_not_of_the_chunks(parts: list[bytes]) -> None:
    """However the events are cut into chunks: the last event is added exactly where a blank line came before."""
    run = Run().feed(CHUNKED, *(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)).lost()
    text = b"".join(parts)
    assert (EVENT_ERROR in run.client.got) == text.endswith((b"\n\n", b"\r\n\r\n"))


@pytest.mark.parametrize(
    "pieces", [(b"data: [DONE]\n\n",), (b"data: [DO", b"NE]\n\n"), (b"data: ", b"[DONE]", b"\n\n")]
)
def test_after_done_nothing_is_added_however_it_was_cut_into_chunks(pieces: tuple[bytes, ...]) -> None:
    """The stream is cut instead."""
    run = Run().feed(CHUNKED, EVENTS, *(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)).lost()
    assert run.client.cut
    assert EVENT_ERROR not in run.client.got


@settings(max_examples=400)
@given(
    parts=st.lists(
        st.sampled_from(
            [
                b'data: {"a": "data: [DONE]"}\n\n',
                b"data: [DONE]\n\n",
                b"data:[DONE]\r\n\r\n",
                b": [DONE]\n\n",
                b"event: x\ndata: {}\n\n",
                b"data: a\r\r",
                b"\n",
                b"data: [DONE]",
            ]
        ),
        max_size=5,
    ),
    chunks=PLACES,
    places=PLACES,
    bytewise=st.booleans(),
)
def test_an_error_event_is_added_behind_an_event_and_before_done_however_all_is_cut(
    parts: list[bytes], chunks: list[int], places: list[int], *, bytewise: bool
) -> None:
    """Into chunks of any size, and into reads of any size. Behind [DONE] no engine sends another JSON event."""
    ends = [n for n, part in enumerate(parts) if b"[DONE]" in part and part.startswith((b"data: [", b"data:["))]
    usual = [n for n, part in enumerate(parts) if part.endswith(b"}\n\n")]
    assume(not ends or not usual or usual[-1] < ends[0])
    text = b"".join(parts)
    pieces = [text[n : n + 1] for n in range(len(text))] if bytewise else [p for p in cut_at(text, chunks) if p]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    run = Run().feed(CHUNKED).feed(*cut_at(framed, places)).lost()
    lines = re.split(rb"\r\n|\n|\r", text)[:-1]
    done = any(line.startswith((b"data: [DONE]", b"data:[DONE]")) for line in lines)
    at_an_end = not text or text.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
    assert (EVENT_ERROR in run.client.got) is (at_an_end and not done)
    assert run.client.cut is (EVENT_ERROR not in run.client.got)


@given(cut=st.integers(1, len(LENGTH) - 1), places=PLACES, reset=st.booleans())
def test_an_answer_of_known_length_that_breaks_is_cut_or_never_began(
    cut: int, places: list[int], *, reset: bool
) -> None:
    """Inside the head nothing reaches the client, inside the body the connection is cut."""
    run = Run().feed(*cut_at(LENGTH[:cut], places)).lost(ConnectionResetError() if reset else None)
    if cut < LENGTH.index(b"\r\n\r\n") + 4:
        assert (run.ending, run.client.got, run.client.cut) == (Ending.BROKEN_HEAD, b"", False)
    else:
        assert (run.ending, run.client.cut) == (Ending.BROKEN, True)


def test_a_connection_that_ends_before_any_byte_is_unanswered() -> None:
    """The only ending that lets a request be sent again; in order or not."""
    assert Run().lost().ending is Ending.UNANSWERED
    assert Run().lost(ConnectionResetError()).ending is Ending.UNANSWERED
    assert Run().feed(b"H").lost().ending is Ending.BROKEN_HEAD


def test_an_answer_without_framing_ends_with_its_connection() -> None:
    """Whole at an orderly end, cut at a reset; the client's connection closes behind it."""
    head = b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n"
    run = Run().feed(head, b"some", b"thing").lost()
    assert (run.ending, run.body, run.exchange.close, run.client.cut) == (Ending.WHOLE, b"something", True, False)
    assert b"Connection: close" in run.head
    assert Run().feed(head, b"some").lost(ConnectionResetError()).ending is Ending.BROKEN
    reset = Run().feed(head, b"some").lost(ConnectionResetError())
    assert reset.client.cut


@pytest.mark.parametrize(
    ("answer", "call"),
    [
        (LENGTH, "release"),
        (CHUNKED + LAST, "release"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", "abort"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", "abort"),
        (LENGTH + b"HTTP/1.1 200 OK\r\n", "abort"),
        (LENGTH + b"x", "abort"),
    ],
)
def test_an_engines_connection_is_kept_only_where_it_can_carry_more(answer: bytes, call: str) -> None:
    """Not after `Connection: close`, nor in HTTP/1.0, nor with bytes behind the answer."""
    assert Run().feed(answer).engine.calls == [call]


def test_a_connection_that_still_sends_the_request_is_not_kept() -> None:
    """An answer that came before the end of the request leaves the rest unread."""
    run = Run()
    run.exchange.sending = True
    assert run.feed(LENGTH).engine.calls == ["abort"]


def test_an_answer_to_head_ends_with_its_head() -> None:
    """Its length stays and no body is waited for."""
    run = Run(no_body=True).feed(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
    assert (run.ending, run.body) == (Ending.WHOLE, b"")
    assert b"Content-Length: 500" in run.head
    assert not run.client.cut


def test_a_declined_answer_leaves_no_trace() -> None:
    """The client gets nothing, the engine's connection is closed."""
    run = Run(declined=404).feed(b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\n{")
    assert (run.ending, run.client.got, run.engine.calls) == (Ending.DECLINED, b"", ["abort"])
    assert Run(declined=404).feed(LENGTH).ending is Ending.WHOLE


def test_the_head_keeps_what_is_the_engines_and_drops_what_is_the_connections() -> None:
    """Names that `Connection` lists count also when it comes last; the daemon's own lines stand once."""
    run = Run(close=True).feed(
        b"HTTP/1.1 299 Odd\r\nX-Named: 1\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nKeep-Alive: 5\r\nX-Request-Id: other\r\n"
        b"Content-Length: 0\r\nConnection: x-named, keep-alive\r\n\r\n"
    )
    assert run.head[:4] == [b"HTTP/1.1 299 Odd", b"Set-Cookie: a", b"Set-Cookie: b", b"Content-Length: 0"]
    assert sorted(run.head[4:]) == [b"Connection: close", b"X-Extra: 1"]


@pytest.mark.parametrize(
    "garbage", [b"\0", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000]
)
def test_what_is_no_answer_never_reaches_the_client(garbage: bytes) -> None:
    """Nor does an endless head: at 64 KiB it is given up."""
    run = Run().feed(garbage)
    assert (run.ending, run.client.got, run.engine.calls) == (Ending.BROKEN_HEAD, b"", ["abort"])


def test_a_slow_client_pauses_its_engine() -> None:
    """And lets it go on; without a connection both mean nothing."""
    run = Run()
    run.exchange.pause()
    run.exchange.resume()
    assert run.engine.calls == ["pause_reading", "resume_reading"]
    run.exchange.abandon()
    run.exchange.pause()
    run.exchange.resume()
    run.exchange.abandon()
    assert run.engine.calls == ["pause_reading", "resume_reading", "abort"]
