"""A request of the daemon's own to an engine, for a client's: it takes a lease, and its whole answer is a value.

For questions that may be asked again, such as what a guard thinks of a text: one that fails is sent to another
instance, else once more on a fresh connection, and no more than twice: it may be what kills engines. Whoever awaits it
may be cancelled at any time, which aborts it.
"""

import asyncio
from dataclasses import dataclass

import httptools

from vllm_proxy.errors import EngineFailedError
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.queue import Turn
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.routing import Route
from vllm_proxy.traffic.wire import EngineConnection

_MOST_BYTES = 4 * 2**20  # of an answer
_MOST_SENT = 2


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    body: bytes
    instance: str


async def ask(
    registry: Registry, route: Route, path: str, body: bytes, *, lines: bytes, client: str, turn: Turn | None
) -> Reply:
    """The answer of an instance of the model to a POST, whatever its status.

    `lines`: more lines of the head. `client`: for whom it is, as in the queue; `turn`: its turn there.

    Raises:
        RequestError: no instance is to be had; `engine_failed` where none gave an answer.

    """
    with registry.lease(route, turn) or await registry.wait(route, client, turn) as lease:
        sent = 0
        while True:
            endpoint = lease.endpoint
            answer, was_used = await _attempt(endpoint, path, body, lines, fresh=sent > 0)
            if answer.complete:
                endpoint.failures = 0
                return Reply(answer.status, b"".join(answer.parts), endpoint.instance)
            endpoint.failed()
            sent += answer.sent
            if sent == _MOST_SENT or not (lease.move() or was_used):
                raise EngineFailedError(f"cannot get an answer from {endpoint.instance}: {answer.why}")


async def _attempt(endpoint: Endpoint, path: str, body: bytes, lines: bytes, *, fresh: bool) -> "tuple[_Answer, bool]":
    """One try, and whether its connection had been used before."""
    answer = _Answer()
    connection = None if fresh else endpoint.pool.take()
    if connection is None:
        try:
            connection = await endpoint.pool.connect()
        except (OSError, TimeoutError):
            answer.why = "it takes no connection"
            return answer, False
    was_used = connection.used
    head = b"POST %s HTTP/1.1\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n" % (
        path.encode(),
        endpoint.own_headers,
        len(body),
        lines,
    )
    answer.connection = connection
    answer.sent = True
    try:
        connection.start(head + body, answer)
        await answer.ended
    finally:
        answer.abandon()
    return answer, was_used


class _Answer:
    """Takes the bytes of one answer until it is whole, or cannot become so."""

    def __init__(self) -> None:
        self.connection: EngineConnection | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.parts: list[bytes] = []
        self.sent = self.complete = False
        self.why = "it closed the connection without one"
        self._size = 0
        self._framed = self._keep = False
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    # httptools calls these

    def on_header(self, name: bytes, _value: bytes) -> None:
        """One header."""
        self._framed = self._framed or name.lower() in {b"content-length", b"transfer-encoding"}

    def on_headers_complete(self) -> None:
        """The head is whole."""
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        self._keep = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        """A piece of the body, without its framing."""
        self.parts.append(data)
        self._size += len(data)

    def on_message_complete(self) -> None:
        """It is whole; an interim one is not it."""
        self.complete = self._framed and self.status >= 200

    # The engine's connection calls these

    def feed(self, data: bytes) -> None:
        """Bytes of the engine."""
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.complete = False
            self._fail("what it sent is no answer")
            return
        if self.complete:
            connection, self.connection = self.connection, None
            if connection is not None:
                if self._keep:
                    connection.release()
                else:
                    connection.abort()
            self._end()
        elif self._size > _MOST_BYTES:
            self._fail(f"its answer is larger than {_MOST_BYTES // 2**20} MiB")

    def lost(self, _error: Exception | None) -> None:
        """The connection ended before the answer did."""
        self.connection = None
        self._end()

    def abandon(self) -> None:
        """Nobody waits for it any more: end the connection, so that the engine stops working on it."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()
        self._parser = None  # it refers back to this object

    def _fail(self, why: str) -> None:
        self.why = why
        self.abandon()
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
