"""Answers to metered callers: passed on as by `exchange`, and read for the tokens that they took.

A stream of chat or completions tells its usage only to who asks. Where the daemon asked, and not the client, that event
is taken out again: the client gets byte for byte what it would have got, chunk framing included. Most reads end with an
event and a chunk and have no usage in them, which shows without a look inside; they pass as they are. Only others are
taken apart: whole events without usage go on, a part of one waits for the rest. (tests/traffic/test_sieve.py)
"""

import re
from collections.abc import Callable

import httptools

from vllm_proxy.domain.tokens import KEPT, Tokens, asks_for_usage, mark, of_head, of_json, of_stream
from vllm_proxy.traffic.exchange import Exchange
from vllm_proxy.traffic.sse import USUAL_END

_CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_BOUNDARIES = (b"\n\n", b"\r\n\r\n", b"\r\r")
_BOUNDARY = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE_ENDS = b"\r\n"
_LONGEST_END = 3  # bytes of a boundary that has not come whole
_MOST_HELD = 16 * 1024  # bytes of an event that has not shown usage: so far from its beginning it has none
_MOST_WITH_USAGE = 64 * 1024  # of one that has, and does not end: it goes on as it is


class MeteredExchange(Exchange):
    """An exchange whose tokens are known when it has ended."""

    __slots__ = ("_chunks", "_chunks_seen", "_is_clear", "_on_body", "_path", "_reading", "_strip", "_whole")

    def meter(self, path: str, *, strip: bool, on_body: Callable[[], None] | None) -> None:
        """Once, before it is used. `path`: of the route. `strip`: the event with the usage is not for the client.

        `on_body` is called once, with the first bytes of the body: the head of a stream comes before the engine begins.
        """
        self._path = path
        self._strip = strip
        self._on_body = on_body
        self._whole = b""  # a body of JSON that came at once and without chunks, as most do
        self._reading: _Reading | None = None  # of any other body
        self._chunks = self._chunks_seen = 0
        self._is_clear = False  # in a stream of chunks: whether the next read begins with a chunk and with an event

    @property
    def tokens(self) -> Tokens | None:
        """What the answer took, once it has ended; None where it did not tell."""
        if not self._started:
            return None
        reading, whole = self._reading, self._whole
        return (of_json(self._path, whole, whole) if reading is None else reading.tokens) or of_head(self._raw_head)

    @property
    def events(self) -> int:
        """How many events of a stream came, about one for each token; 0 where the answer is no stream."""
        if self._reading is None or not self._reading.is_stream:
            return 0
        return self._chunks - self._complete  # the last chunk is none

    def on_chunk_complete(self) -> None:
        """As of an exchange; and an engine sends each event as a chunk."""
        self._in_chunk = False
        self._chunks += 1

    def _pass_on(self, data: bytes, body: bytes | None = None) -> None:
        reading = self._reading
        if (
            self._is_clear
            and data.endswith(USUAL_END)
            and reading is not None
            and data.rfind(reading.mark) < 0
            and data.rfind(b"[DONE]") < 0
            and not self._in_chunk
            and not self._client.is_closing()
        ):
            chunks, self._chunks_seen = self._chunks - self._chunks_seen, self._chunks
            if chunks == 1 or data.count(USUAL_END) == chunks:  # else an event may go over several chunks
                self.body_bytes += len(data)
                self._client.write(data)
                return
        payload = data if body is None else body
        if payload and self._on_body is not None:
            on_body, self._on_body = self._on_body, None
            on_body()
        if reading is None and self._complete and payload.endswith(b"}"):
            self._whole = payload
        elif payload:
            payload = self._read(payload)
        super()._pass_on(payload if body is None else data, None if body is None else payload)
        reading = self._reading
        if reading is not None and reading.is_stream:
            self._chunks_seen = self._chunks
            self._is_clear = reading.may_skip and self._is_events and not self._inside

    def _read(self, payload: bytes) -> bytes:
        """The next piece of the body; what of it the client gets."""
        reading = self._reading
        if reading is None:
            reading = self._reading = _Reading(self._path, self._raw_head, strip=self._strip, dechunk=self._dechunk)
        if self._dechunk:
            self.decoded = reading.feed(self.decoded, is_last=self._complete)
            return payload
        return reading.feed(payload, is_last=self._complete)

    def _truncate(self) -> None:
        sieve = None if self._reading is None else self._reading.sieve
        if sieve is not None and sieve.held and not self._client.is_closing():
            self._client.write(sieve.held)  # as it would have come: the stream cannot look whole
            self._inside = True
        super()._truncate()


class _Reading:
    """What is read of the body of one answer."""

    __slots__ = ("_decoder", "_path", "_tail", "is_stream", "mark", "sieve")

    def __init__(self, path: str, head: bytes, *, strip: bool, dechunk: bool) -> None:
        """`dechunk`: whether the body comes without its chunks, where there are any."""
        head = head.lower()
        self._path = path
        self.is_stream = head.rfind(b"text/event-stream") >= 0
        self.mark = mark(path, stream=self.is_stream)
        self._tail = _Tail(self.mark)
        self.sieve: _ChunkSieve | _TextSieve | None = None
        self._decoder: _Decoder | None = None
        is_chunked = head.rfind(b"\ntransfer-encoding:") >= 0
        if self.is_stream and is_chunked and strip and asks_for_usage(path):
            self.sieve = _TextSieve(self._tail) if dechunk else _ChunkSieve(self._tail)
        elif is_chunked and not dechunk:
            self._decoder = _Decoder()

    def feed(self, payload: bytes, *, is_last: bool) -> bytes:
        """The next piece; what of it the client gets."""
        if self.sieve is not None:
            return self.sieve.feed(payload, is_last=is_last)
        self._tail.feed(payload if self._decoder is None else self._decoder.text_of(payload))
        return payload

    @property
    def may_skip(self) -> bool:
        """Whether it needs not be fed what begins and ends with a chunk and with an event, and has no usage."""
        return self._decoder is not None if self.sieve is None else self.sieve.is_between_events

    @property
    def tokens(self) -> Tokens | None:
        """What the answer took, as far as it was fed."""
        last = self._tail.found or self._tail.last
        return of_stream(self._path, last) if self.is_stream else of_json(self._path, self._tail.first, last)


class _Tail:
    """What is kept of an answer's text: its beginning, its end, and what stands behind the last mark of the usage."""

    __slots__ = ("first", "found", "last", "mark")

    def __init__(self, mark: bytes) -> None:
        self.mark = mark
        self.first = self.last = self.found = b""

    def feed(self, text: bytes) -> None:
        """The next piece."""
        if len(self.first) < KEPT:
            self.first = (self.first + text)[:KEPT]
        text = self.last + text
        at = text.rfind(self.mark)
        if at >= 0:
            self.found = text[at : at + KEPT]
        self.last = text[-KEPT:]


class _Decoder:
    """A chunked body without its chunks. It is fed from the end of a chunk on; whole chunks may be left out."""

    __slots__ = ("_parser", "_pieces")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(_CHUNKED_HEAD)

    def text_of(self, raw: bytes) -> bytes:
        """The next bytes, chunk framing taken off."""
        self._pieces.clear()
        self._parser.feed_data(raw)
        return b"".join(self._pieces)

    def on_body(self, data: bytes) -> None:
        """A piece of a chunk: httptools calls this."""
        self._pieces.append(data)


class _TextSieve:
    """Takes events with usage out of a stream without framing. It is fed from an end of an event on."""

    __slots__ = ("_tail", "held", "is_between_events")

    def __init__(self, tail: _Tail) -> None:
        self._tail = tail
        self.held = b""  # the beginning of an event
        self.is_between_events = False  # as far as anybody needs to know

    def feed(self, text: bytes, *, is_last: bool) -> bytes:
        """What of the stream may go on."""
        text = self.held + text
        end = max((at + len(end) for end in _BOUNDARIES if (at := text.rfind(end)) >= 0), default=0)
        passed = text[:end] if text.rfind(self._tail.mark, 0, end) < 0 else _without_usage(text[:end], self._tail)
        rest = text[end:]
        if is_last or not rest.strip(_LINE_ENDS):
            self._tail.feed(rest)
            passed, rest = passed + rest, b""
        elif _goes_on(rest, self._tail.mark):  # but for what may begin its end
            self._tail.feed(rest)
            passed, rest = passed + rest[:-_LONGEST_END], rest[-_LONGEST_END:]
        self.held = rest
        return passed


class _ChunkSieve:
    """Takes events with usage out of a chunked stream. It is fed from an end of a chunk and an event on."""

    __slots__ = ("_at", "_long", "_tail", "_text", "held")

    def __init__(self, tail: _Tail) -> None:
        self._tail = tail
        self.held = b""  # the beginning of an event, with its chunks
        self._at = 0  # where in it the chunk begins that is not whole
        self._text = b""  # of its whole chunks
        self._long: tuple[_Decoder, _TextSieve] | None = None  # from an event on that is too long to be held

    @property
    def is_between_events(self) -> bool:
        """Whether it needs not be fed what begins and ends with a chunk and with an event."""
        return not self.held and self._long is None

    def feed(self, raw: bytes, *, is_last: bool) -> bytes:
        """What of the stream may go on."""
        if self._long is not None:
            return self._feed_long(*self._long, raw, is_last=is_last)
        raw = self.held + raw
        passed = []
        begin, at, text = 0, self._at, self._text
        while (line_end := raw.find(b"\r\n", at)) >= 0:
            size = int(raw[at:line_end].partition(b";")[0], 16)
            end = line_end + size + 4
            if not size or end > len(raw):
                break
            text += raw[line_end + 2 : end - 2]
            at = end
            if text.endswith(_BOUNDARIES) or not text.strip(_LINE_ENDS):
                has_usage = text.rfind(self._tail.mark) >= 0
                passed.append(_chunk(_without_usage(text, self._tail)) if has_usage else raw[begin:at])
                begin, text = at, b""
        if is_last:
            self._tail.feed(text)
            passed.append(raw[begin:])
            begin = at = len(raw)
        self.held, self._at, self._text = raw[begin:], at - begin, text
        if _goes_on(self.held, self._tail.mark):
            self._long = _Decoder(), _TextSieve(self._tail)
            passed.append(self._feed_long(*self._long, self.held, is_last=False))
        return b"".join(passed)

    def _feed_long(self, decoder: "_Decoder", texts: "_TextSieve", raw: bytes, *, is_last: bool) -> bytes:
        """In chunks of its own, since a part of one is passed on. A stream with such an event stays so to its end."""
        passed = _chunk(texts.feed(decoder.text_of(raw), is_last=is_last))
        self.held = _chunk(texts.held)
        return passed + _LAST_CHUNK if is_last else passed


def _goes_on(held: bytes, mark: bytes) -> bool:
    """Whether the beginning of an event is too long to be held until its end."""
    return len(held) > (_MOST_HELD if held.rfind(mark) < 0 else _MOST_WITH_USAGE)


def _chunk(text: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text), text) if text else b""


def _without_usage(text: bytes, tail: _Tail) -> bytes:
    """Whole events but for those with usage, which `tail` gets."""
    if text.find(b"\n\n") == len(text) - 2 and text.find(b"\r") < 0:  # one event, as usual
        tail.feed(text)
        return b""
    kept = []
    begin = 0
    for boundary in _BOUNDARY.finditer(text):
        event = text[begin : boundary.end()]
        begin = boundary.end()
        if event.rfind(tail.mark) < 0:
            kept.append(event)
        else:
            tail.feed(event)
    return b"".join(kept)
