"""Requests for direct routes, read from a client's bytes without aiohttp's parser and server loop.

Only a head of the plainest shape is read here, one that can mean one thing alone; all other bytes go to aiohttp's
parser, which takes them or says what is wrong: nobody can tell the two ways apart (tests/traffic/test_direct.py). What
a request lacks here of aiohttp's is made when it is asked for. Clients send the same head again and again but for its
length, so what was read of a head is kept.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.http_writer import StreamWriter
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from vllm_proxy.traffic.head import read_head

type Fields = list[tuple[bytes, bytes]]  # of a head, as they came
type Direct = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_MOST_HEAD = 8000  # bytes, so that no line is longer than aiohttp takes
_MOST_FIELDS = 100
_MOST_DIGITS = 10  # of a length
_KEPT = 256  # heads
_MOST_KEPT = 2000  # bytes of each
_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: ([0-9]{1,%d})(?=\r\n)" % _MOST_DIGITS, re.IGNORECASE)
_FIELD = re.compile(rb"(?<=\n)([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([!-~](?:[ -~]*[!-~])?)\r\n")
# What says how a body is framed or a connection is used, beside a plain length.
_UNUSUAL = frozenset(
    b"content-length transfer-encoding content-encoding expect upgrade te trailer keep-alive proxy-connection"
    b" sec-websocket-key1".split()
)
_UNLIKE_OTHERS = frozenset({b"x-request-id", b"traceparent", b"tracestate"})  # such a head comes once


class DirectRequest(web.BaseRequest):
    """A request for a direct route, whoever has read it."""

    route: Direct


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests with one request line go."""

    method: str
    path: str
    route: Direct

    @property
    def line(self) -> bytes:
        """The request line."""
        return f"{self.method} {self.path} HTTP/1.1\r\n".encode()


@dataclass(frozen=True, slots=True)
class _Kept:
    """What was read of a head, its Content-Length left out."""

    target: Target | None  # None: of a route that is not direct
    fields: Fields
    mine: Mapping[bytes, bytes]  # as `head.read_head` gives both
    forwarded: bytes


@dataclass(slots=True)
class Head:
    """A head that was read here."""

    kept: _Kept
    length: bytes | None  # as it came
    start: int  # where the body begins
    end: int  # and where it ends

    def mine(self) -> Mapping[bytes, bytes]:
        """The headers that end here."""
        return self.kept.mine if self.length is None else {**self.kept.mine, b"content-length": self.length}

    def fields(self) -> Fields:
        """All headers."""
        return self.kept.fields if self.length is None else [*self.kept.fields, (b"Content-Length", self.length)]


class Heads:
    """Reads heads. `targets`: the direct routes."""

    def __init__(self, targets: Mapping[bytes, Target]) -> None:
        self._targets = targets
        self._kept: dict[bytes, _Kept] = {}

    def read(self, data: bytes) -> Head | None:
        """The head at the beginning of `data`; None where it is not whole, or not of the plainest shape."""
        end = data.find(_END, 0, _MOST_HEAD)
        if end < 0:
            return None
        found = _LENGTH.search(data, 0, end + 2)
        if found is None:
            text, length, size = data[: end + 2], None, 0
        else:
            text, length = data[: found.start()] + data[found.end() : end + 2], found[1]
            size = int(length)
        kept = self._kept.get(text) or self._parse(text)
        return None if kept is None else Head(kept, length, end + 4, end + 4 + size)

    def _parse(self, text: bytes) -> _Kept | None:
        start = text.find(b"\n") + 1
        fields = _FIELD.findall(text, start - 1)
        # Each field begins behind a line's end and has one: as many as there are, so nothing stands between them.
        if text.count(b"\n") - 1 != len(fields) or len(fields) > _MOST_FIELDS:
            return None
        by_name = {name.lower(): value for name, value in fields}
        if len(by_name) != len(fields) or b"host" not in by_name or not _UNUSUAL.isdisjoint(by_name):
            return None
        if by_name.get(b"connection", b"keep-alive").lower() != b"keep-alive":
            return None
        target = self._targets.get(text[:start])
        kept = _Kept(None, [], {}, b"") if target is None else _Kept(target, fields, *read_head(fields))
        if len(text) <= _MOST_KEPT and _UNLIKE_OTHERS.isdisjoint(by_name):
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[text] = kept
        return kept

    def clear(self) -> None:
        """Keep none: what is allowed has changed, and there are keys in them."""
        self._kept.clear()


class Whole:
    """A body that came together with its head, with what handlers use of a StreamReader."""

    __slots__ = ("_data", "total_bytes")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.total_bytes = len(data)

    def is_eof(self) -> bool:
        """All of it has come."""
        return True

    def at_eof(self) -> bool:
        """Whether all of it was read."""
        return not self._data

    def read_nowait(self, n: int = -1) -> bytes:  # noqa: ARG002 - aiohttp's signature
        """The body."""
        data, self._data = self._data, b""
        return data

    async def readany(self) -> bytes:
        """The body."""
        return self.read_nowait()

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:
        """The request has ended: nobody reads it any more."""


class _Message:
    """What a request is asked of its message on the usual way."""

    __slots__ = ("head", "path")
    should_close = False  # as HTTP/1.1 has it

    def __init__(self, path: str, head: Head) -> None:
        self.path = path
        self.head = head

    @property
    def raw_headers(self) -> Fields:
        """The headers as they came, but for the place of the length."""
        return self.head.fields()


class ReadRequest(DirectRequest):
    """One that was read here."""

    def __init__(
        self,
        target: Target,
        head: Head,
        payload: Whole | StreamReader,
        protocol: RequestHandler,
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # not aiohttp's: most of what that makes is needed by nobody
        self._message = _Message(target.path, head)  # type: ignore[assignment]
        self._payload = payload  # type: ignore[assignment]
        self._protocol = protocol
        self._method = target.method
        self._version = HttpVersion11
        self._transport_peername = protocol.peername
        self._loop = loop
        self.route = target.route
        self.head = head

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - what aiohttp's request has
        """What is made when it is asked for: called where there is nothing of that name yet."""
        make = _MADE.get(name)
        if make is None:
            raise AttributeError(name)
        made = make(self)
        setattr(self, name, made)
        return made


def _headers(request: ReadRequest) -> CIMultiDictProxy[str]:
    fields = ((name.decode(), value.decode()) for name, value in request.raw_headers)  # ASCII, as they were read
    return CIMultiDictProxy(CIMultiDict(fields))


_MADE: Mapping[str, Callable[[ReadRequest], Any]] = {
    "_headers": _headers,
    "_cache": lambda _: {},
    "_state": lambda _: {},
    "_rel_url": lambda request: URL(request.raw_path, encoded=True),
    "_payload_writer": lambda request: StreamWriter(request.protocol, request._loop),  # noqa: SLF001 - its own
    "_transport_sslcontext": lambda request: request.protocol.ssl_context,
    "_transport_sockname": lambda request: request.protocol.sockname,
    "_client_max_size": lambda _: 0,
}


class _Done:
    """What can be awaited and is done already, without a coroutine for it."""

    def __await__(self) -> Iterator[None]:
        return iter(())


_DONE = _Done()


class Sent(web.StreamResponse):
    """Stands for an answer whose bytes are on the wire already: it has what the server reads of a response."""

    def __init__(self, *, keep_alive: bool) -> None:  # not aiohttp's: headers and cookies would be made for nobody
        self._keep_alive = keep_alive

    def prepare(self, request: web.BaseRequest) -> "_Done":  # type: ignore[override]  # noqa: ARG002 - aiohttp's signature
        """Nothing is left to send."""
        return _DONE

    def write_eof(self, data: bytes = b"") -> "_Done":  # type: ignore[override]  # noqa: ARG002 - as above
        """Nothing is left to send."""
        return _DONE


SENT_KEEP_ALIVE, SENT_CLOSE = Sent(keep_alive=True), Sent(keep_alive=False)  # the connection goes on, or ends
