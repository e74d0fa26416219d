"""Follows an event stream that is passed on in chunks: is it between two events, and did [DONE] come.

For `exchange`, which may append an error event only between two events. Exact, however the stream is cut into events,
chunks and reads (tests/traffic/test_exchange.py). Most reads end with an event and a chunk, which shows without a look
inside; only what does not is followed, until the stream is at such an end again. (Not detected: a [DONE] in several
chunks that come in one read with a usual event behind it, which no engine sends.)
"""

import re

import httptools

USUAL_END = b"}\n\n\r\n"  # of an event that ends with its chunk: the brace shows that no chunk begins in the line ends
_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_BOUNDARIES = (b"\n\n", b"\r\n\r\n", b"\r\r")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_DONE = (b"data: [DONE]", b"data:[DONE]")  # as OpenAI's clients see it: whatever follows in that line
_KEPT = 16  # bytes of a line: more than those


class Position:
    """A place in a stream. It is fed from the end of a chunk and of an event on; usual ends may be left out."""

    __slots__ = ("_end", "_line", "_parser", "_raw_end", "is_done")

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(_HEAD)
        self._raw_end = b""
        self._end = b""  # of the events
        self._line = b""  # how the line begins that has not ended
        self.is_done = False  # whether `data: [DONE]` came

    def feed(self, raw: bytes) -> None:
        """The next bytes, chunk framing included."""
        self._raw_end = (self._raw_end + raw)[-2:]
        self._parser.feed_data(raw)

    @property
    def is_boundary(self) -> bool:
        """Whether an event has ended here, and no chunk's size has begun."""
        return self._end.endswith(_BOUNDARIES) and self._raw_end == b"\r\n"

    def on_body(self, data: bytes) -> None:
        """A piece of a chunk: httptools calls this."""
        self._end = (self._end + data[-4:])[-4:]
        *lines, rest = _LINE_END.split(self._line + data)
        self._line = rest[:_KEPT]
        self.is_done = self.is_done or any(line.startswith(_DONE) for line in lines)
