"""One answer of an engine on its way to a client: parsed for its framing, passed on byte for byte.

A truncated answer must never look whole (tests/traffic/test_exchange.py). llhttp (through httptools) follows the
framing, chunks included, so the bytes behind the head go to the client's transport as they came, in one write for each
read. `pause` and `resume` are backpressure: they stop reading from the engine.

Where only the connection's end tells a client that it has all of an answer, that connection is set to end in a reset as
the answer begins, and set back when it is whole: so a cut, a stop and a kill of the daemon do not look like the end.
Over TLS a whole answer ends with TLS's own close_notify, and what is cut without. Unix sockets have no reset; over them
such a client (HTTP/1.0) cannot tell.
"""

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from enum import Enum
from http import HTTPStatus
from typing import Any, Protocol

import httptools

from vllm_proxy.traffic.head import AnswerHead, passes_as_it_is
from vllm_proxy.traffic.sse import USUAL_END, Position
from vllm_proxy.traffic.wire import EngineConnection

_HEAD_LIMIT = 64 * 1024
_NO_ROUTE = b'{"detail":"Not Found"}'
_NO_ROUTE_LENGTH = b"\ncontent-length: %d\r" % len(_NO_ROUTE)
_LAST_CHUNK = b"0\r\n\r\n"
_NOT_BUFFERED = b"X-Accel-Buffering: no\r\n"  # nginx would collect events
_RESET, _ORDERLY = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)  # for SO_LINGER


class Ending(Enum):
    """How an exchange ended."""

    WHOLE = "whole"  # the client has all of it
    REFUSED = "refused"  # no connection was to be had
    UNANSWERED = "unanswered"  # not one byte came: the request may be sent elsewhere
    BROKEN_HEAD = "broken head"  # bytes came, but no head that could be passed on
    BROKEN = "broken"  # the client has a part, and can see that
    DECLINED = "declined"  # a whole head came that the caller did not want
    NO_ROUTE = "no route"  # FastAPI's bare 404: an engine without such a route; nothing of it was passed on


class Client(Protocol):
    """Where the answer goes: a client's transport."""

    def write(self, data: bytes) -> None:
        """Send bytes."""

    def abort(self) -> None:
        """Cut the connection."""

    def is_closing(self) -> bool:
        """Whether nothing can be sent any more."""

    def get_extra_info(self, name: str) -> Any:  # noqa: ANN401 - asyncio's signature
        """Its `socket`."""


def end_in_reset(client: Client, *, reset: bool) -> None:
    """Whether the connection, whatever ends it, ends in a reset from now on, what was not sent yet being dropped.

    Not to be called once the transport has reported the end of the connection: its descriptor may be reused by then.
    """
    connection = client.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET if reset else _ORDERLY)


def ends_in_reset(client: Client) -> bool:
    """Whether that is so now."""
    connection = client.get_extra_info("socket")
    return connection is not None and connection.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(_RESET)) == _RESET


class Exchange:
    """One request's answer. `ended` is its result; a slow client's connection calls `pause` and `resume`."""

    __slots__ = ("_buffer", "_client", "_complete", "_dechunk", "_event_error", "_extra", "_garbage", "_in_chunk",
                 "_inside", "_interim", "_is_events", "_on_head", "_parser", "_position", "_raw_head", "_reusable",
                 "_started", "before", "body_bytes", "by_closing", "close", "connection", "decoded", "ended",
                 "ended_early", "ending", "first_byte_at", "http10", "last", "no_body", "orderly", "sending",
                 "status")  # fmt: skip

    def __init__(
        self,
        client: Client,
        extra_headers: bytes,
        event_error: bytes,
        *,
        http10: bool,
        no_body: bool,
        close: bool,
        on_head: Callable[[int], bool] | None = None,
    ) -> None:
        """`extra_headers`: whole lines for the client. `event_error`: the event that ends a broken event stream.

        `on_head` may decline an answer by its status. `close`: the client's connection ends behind this answer.
        """
        self._client = client
        self._extra = extra_headers
        self._event_error = event_error
        self.http10 = http10
        self.no_body = no_body
        self.close = close
        self._on_head = on_head
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(
            _Decoding(self) if http10 else self
        )
        self.connection: EngineConnection | None = None
        self.status = 0
        self.first_byte_at = 0.0  # time.monotonic()
        self.sending = False  # whether some of the request is still to be sent
        self.body_bytes = 0  # on the wire, chunk framing included
        self.decoded = b""  # the body without its chunks, for a client that knows none
        self.ending: Ending | None = None  # None while it has not ended, and where nobody waits for its end any more
        self._raw_head = b""
        self._buffer = b""
        self.by_closing = False  # whether only the connection's end marks the end of the answer for the client
        self.ended_early = False  # whether the daemon ended it, and not the engine
        self.last = b""  # the last read of the body, which may say what it took
        self.before = b""  # what came in front of that at the end of a stream of events
        self.orderly = False  # whether the client has all that there will be, and may see an orderly end
        self._position: Position | None = (
            None  # in an event stream, from the first read on that ends in an unusual place
        )
        self._interim = 0  # 1xx answers in front of the real one
        self._started = self._complete = self._garbage = self._in_chunk = False
        self._reusable = self._dechunk = self._is_events = self._inside = False

    @property
    def passed_status(self) -> int:
        """The status that the client has been sent, 0 while it has none."""
        return self.status if self._started else 0

    # httptools calls these

    def on_message_begin(self) -> None:
        """A head begins; behind a complete answer it is garbage."""
        if self._complete:
            self._garbage = True

    def on_headers_complete(self) -> None:
        """The head is whole."""
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        if self.status < 100:
            self._garbage = True
        self._reusable = self._parser.should_keep_alive()  # llhttp has forgotten it once the answer is complete

    def on_chunk_header(self) -> None:
        """A chunk's size line is through: what follows belongs to the chunk."""
        self._in_chunk = True

    def on_chunk_complete(self) -> None:
        """A chunk's last byte is through."""
        self._in_chunk = False

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was an interim one."""
        if self.status < 200:
            self._interim += 1
        else:
            self._complete = True

    # The engine connection calls these

    def feed(self, data: bytes) -> None:
        """Bytes from the engine."""
        if not self.first_byte_at:
            self.first_byte_at = time.monotonic()
        assert self._parser is not None, "an exchange that ended has released its connection"
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._garbage = True
        if self._garbage:
            self._truncate()
        elif self._started:
            self._pass_on(data)
        else:
            self._head(data)

    def lost(self, error: Exception | None) -> None:
        """The engine's connection ended before the answer was known to be whole."""
        if self.ended.done():
            return
        if not self.first_byte_at:
            self._end(Ending.UNANSWERED)
        elif self._started and error is None and not self._is_framed():
            self.orderly = True
            self._end(Ending.WHOLE)  # by the connection's end
        else:
            self._truncate()

    # The client's side calls these

    def pause(self) -> None:
        """The client's buffer is full: backpressure."""
        if self.connection is not None:
            self.connection.pause_reading()

    def resume(self) -> None:
        """The client's buffer has room."""
        if self.connection is not None:
            self.connection.resume_reading()

    def end_early(self, event: bytes) -> None:
        """The client may have no more of it: an event stream ends with `event`, anything else is cut."""
        if not self.ended.done():
            self._event_error = event
            self.ended_early = True
            self._truncate()

    def abandon(self) -> None:
        """The client is gone: close the engine's connection, so that the engine stops working on it."""
        if self.connection is not None:
            self.connection.abort()
            self.connection = None

    def _head(self, data: bytes) -> None:
        self._buffer += data
        if self.status < 200:
            if len(self._buffer) > _HEAD_LIMIT:
                self._truncate()
            return
        end = -4
        for _ in range(self._interim + 1):
            end = self._buffer.find(b"\r\n\r\n", end + 4)
        if end < 0 or (self._on_head is not None and not self._on_head(self.status)):
            self.abandon()
            self._end(Ending.BROKEN_HEAD if end < 0 else Ending.DECLINED)
            return
        begin = 0 if not self._interim else self._buffer.rfind(b"\r\n\r\n", 0, end) + 4
        self._raw_head = self._buffer[begin : end + 2]
        if self.status == HTTPStatus.NOT_FOUND and self._is_no_route(self._buffer[end + 4 :]):
            return
        body, self._buffer = self._buffer[end + 4 :], b""
        is_json = self._complete and body.startswith(b"{")  # as most answers: no need to look closer
        if not is_json and self._raw_head.lower().find(b"text/event-stream") >= 0:  # `in` costs ten times as much
            self._is_events = not self._complete
            self._extra += _NOT_BUFFERED
        head = self._client_head()
        if head is None:
            self._truncate()
            return
        self._started = True
        if self.by_closing:
            end_in_reset(self._client, reset=True)
        if self.no_body:  # an answer to HEAD: its length is that of a body that does not come
            self._complete = True
            self.abandon()
            body = b""
        self._pass_on(head, body)

    def _is_no_route(self, body: bytes) -> bool:
        """Whether the answer is, or may become, that of an engine which has no such route; so it is not passed on."""
        if self.no_body or not _NO_ROUTE.startswith(body) or _NO_ROUTE_LENGTH not in self._raw_head.lower():
            return False
        if self._complete:
            self._give_back()
            self._end(Ending.NO_ROUTE)
        return True  # else it waits for the rest

    def _client_head(self) -> bytes | None:
        """The head for the client: the engine's with some lines added, taken apart only where it must be."""
        if self._reusable and not (self.close or self.http10 or self.no_body) and passes_as_it_is(self._raw_head):
            return b"%s%s\r\n" % (self._raw_head, self._extra)
        head = AnswerHead.of(self._raw_head)
        if head is None or head.value(b"transfer-encoding") not in {b"", b"chunked"}:  # it would look like another body
            return None
        if self.http10 and head.has(b"transfer-encoding"):
            self._dechunk = self.close = True
            self.by_closing = not self.no_body
        elif not (self.no_body or self._is_framed()):
            self.by_closing = self.close = True
        lines = [self._extra]
        if head.has(b"transfer-encoding") and not self.http10:
            lines.append(b"Transfer-Encoding: chunked\r\n")
        if self.close:
            lines.append(b"Connection: close\r\n")
        elif self.http10:
            lines.append(b"Connection: keep-alive\r\n")
        return head.rewritten(*lines)

    def _is_framed(self) -> bool:
        """Whether the answer says itself where it ends."""
        head = AnswerHead.of(self._raw_head)
        assert head is not None, "checked before anything is passed on"
        return self.status in {204, 304} or head.has(b"content-length") or head.has(b"transfer-encoding")

    def _pass_on(self, data: bytes, body: bytes | None = None) -> None:
        """Write to the client: `data` as it came, or a head with the beginning of its body."""
        if self._client.is_closing():  # it has left; the handler's cancellation is on its way
            self.abandon()
            return
        payload = data if body is None else body
        self.body_bytes += len(payload)
        if self._is_events and (
            self._inside or self._in_chunk or not payload.endswith(USUAL_END) or payload.find(b"[DONE]") >= 0
        ):
            self._track(payload)
        self.last = payload
        if self._dechunk:
            decoded, self.decoded = self.decoded, b""
            self._client.write(decoded if body is None else data + decoded)
        else:
            self._client.write(data if body is None else data + body)
        if self._complete:
            self._finish()

    def _track(self, payload: bytes) -> None:
        """Look closely at where an event stream stands, as long as it is not at the end of an event."""
        if self._complete or not payload:
            self.before = self.last
            return
        if self._position is None:
            self._position = Position()
        self._position.feed(payload)
        self._inside = self._in_chunk or not self._position.is_boundary
        if self._position.is_done:
            self._is_events = False  # nothing is added any more, so it need not be followed
            self.before = self.last + payload

    def _finish(self) -> None:
        self.orderly = True
        self._give_back()
        self._end(Ending.WHOLE)

    def _give_back(self) -> None:
        """The engine's connection, behind a whole answer."""
        connection, self.connection = self.connection, None
        if connection is not None:
            if self._reusable and not self.sending:
                connection.release()
            else:
                connection.abort()

    def _truncate(self) -> None:
        """The answer cannot become whole: append an error event where the stream allows it, else cut the connection."""
        self.abandon()
        if not self._started:
            self._end(Ending.BROKEN_HEAD)
            return
        if self._can_append_event():
            self.close = self.close or not self.ended_early
            event = self._event_error
            framed = event if self._dechunk else b"%x\r\n%s\r\n" % (len(event), event) + _LAST_CHUNK
            self._client.write(framed)
            self.orderly = True
        else:
            self.close = True
            self._client.abort()
        self._end(Ending.BROKEN)

    def _can_append_event(self) -> bool:
        """Whether an event stream stands at an event's boundary, with a framing that takes one more, before [DONE]."""
        if not self._is_events or self._inside or self._garbage:
            return False
        head = AnswerHead.of(self._raw_head)
        if head is None or not head.value(b"content-type").startswith(b"text/event-stream"):
            return False
        return head.has(b"transfer-encoding") and not head.has(b"content-encoding")

    def _end(self, ending: Ending) -> None:
        self._parser = None  # it refers back to this object: without the cycle both go at once
        if not self.ended.done():
            self.ending = ending
            self.ended.set_result(ending)


class _Decoding:
    """What httptools calls where the client, of HTTP/1.0, knows no chunks: the exchange, with the body decoded."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __getattr__(self, name: str) -> object:
        return getattr(self._exchange, name)

    def on_body(self, data: bytes) -> None:
        """A piece of the body without its framing."""
        self._exchange.decoded += data
