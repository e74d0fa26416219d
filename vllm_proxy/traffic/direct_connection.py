"""A connection whose requests for direct routes are read by `direct`, and answered without aiohttp's server loop.

aiohttp's `start` waits meanwhile, and its parser sees none of those bytes. The rule is that its parser may stand only
between two requests when a head is read here: what may be the rest of something goes to it, from then on for good.
"""

import asyncio
import contextlib
from typing import Any

import structlog
from aiohttp import web
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from vllm_proxy.traffic.direct import Heads, ReadRequest, Sent, Whole

log = structlog.get_logger()

_MOST_BEHIND_BYTES = 512 * 1024  # of requests behind the one that is being answered: more pauses the client
_MOST_BEHIND = 4096  # reads
_CONNECT = b"CONNECT "  # whose head is the whole message for aiohttp's parser, whatever length it gives


class DirectConnection(RequestHandler):
    """One client's connection, as far as its requests are read here."""

    __slots__ = (
        "_arriving",
        "_behind",
        "_behind_bytes",
        "_between",
        "_heads",
        "_missing",
        "_task",
        "head_bytes",
        "in_head",
        "is_direct",
    )

    def __init__(
        self,
        manager: web.Server,
        heads: Heads,
        *,
        loop: asyncio.AbstractEventLoop,
        **kwargs: Any,  # noqa: ANN401 - aiohttp's options
    ) -> None:
        """`heads`: reads them."""
        super().__init__(manager, loop=loop, **kwargs)
        self.in_head = True  # a request's head is still to come: the first one, or the rest of another
        self.head_bytes = 0  # of a head that is not complete
        self.is_direct = False  # whether a request that was read here is being answered
        self._heads = heads
        self._between = True  # whether aiohttp's parser stands between two requests
        self._task: asyncio.Task[None] | None = None  # answers a request that was read here
        self._arriving: StreamReader | None = None  # the body of that, where it is not whole yet
        self._missing = 0  # bytes of it
        self._behind: list[bytes] = []  # what came behind that request
        self._behind_bytes = 0

    def take(self, data: bytes) -> bool:
        """Bytes of the client; False where they are for aiohttp's parser."""
        if self.is_direct:
            self._receive_more(data)
            return True
        if not self._between or not data:  # none: aiohttp wants its parser to go on
            return False
        if self._waiter is None or self._messages:
            self._between = False  # they come while aiohttp answers another request
            return False
        return self._read(data)

    def _read(self, data: bytes) -> bool:
        """Begin to answer a request for a direct route whose head is whole; False where that is left to aiohttp."""
        head = self._heads.read(data)
        if head is None or self._force_close or self._close:
            self._between = False  # or as good as that: nobody knows where aiohttp's parser will stand
            return False
        missing, target = head.end - len(data), head.kept.target
        if target is None or missing < 0:
            self._between = missing == 0 and not data.startswith(_CONNECT)
            return False
        self.is_direct, self._task = True, None
        payload: Whole | StreamReader
        if not missing:
            payload = Whole(data[head.start :])
        else:
            payload = self._arriving = StreamReader(self, self._read_bufsize, loop=self._loop)
            payload.feed_data(data[head.start :])
            self._missing = missing
        self.in_head, self.head_bytes = False, 0
        self._request_count += 1
        request = ReadRequest(target, head, payload, self, self._loop)
        task = asyncio.Task(self._answer(request), loop=self._loop, eager_start=True)
        if not task.done():
            self._task = task
        return True

    def _receive_more(self, data: bytes) -> None:
        """Bytes while a request that was read here is answered: the rest of its body, and what comes behind it."""
        if self._arriving is not None:
            part, data = data[: self._missing], data[self._missing :]
            self._missing -= len(part)
            self._arriving.feed_data(part)
            if not self._missing:
                body, self._arriving = self._arriving, None
                body.feed_eof()
        if data:
            self._behind.append(data)  # apart, as aiohttp's parser would have been given it
            self._behind_bytes += len(data)
            # As late as aiohttp does it: whoever is not read from is not seen to leave.
            if not self._buffer_paused and (
                self._behind_bytes > _MOST_BEHIND_BYTES or len(self._behind) > _MOST_BEHIND
            ):
                self._pause_reading_for_buffer()

    async def _answer(self, request: ReadRequest) -> None:
        """As aiohttp's `start` does it, for one request."""
        self._keepalive = False
        self._request_in_progress, self._current_request = True, request
        try:
            try:
                response = await request.route(request)
            finally:
                self._current_request = None
            if type(response) is Sent:
                self._keepalive = bool(response.keep_alive)
            else:
                _, reset = await self.finish_response(request, response, None)
                self._keepalive = bool(response.keep_alive) and not reset
            if self._arriving is not None:
                self._keepalive = await self._linger(self._arriving) and self._keepalive
        except ConnectionError:
            pass  # the client has left
        except asyncio.CancelledError:
            self.force_close()
            raise
        except Exception:
            log.exception("a fault of the daemon: a request could not be ended")
            self.force_close()
        finally:
            self._request_in_progress = False
            # Both refer back to this connection, the task by the traceback of what it ended with: without the cycle a
            # request that was cancelled goes at once, with its body.
            self._task = self._arriving = None
            if (waiter := self._handler_waiter) is not None and not waiter.done():
                waiter.set_result(None)
        self._go_on()

    async def _linger(self, body: StreamReader) -> bool:
        """Read the rest of a body that nobody wants: its client may read the answer only behind it. Whether it came."""
        if self._lingering_time and not self._force_close:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lingering_time):
                    while not body.is_eof():
                        await body.readany()
        return body.is_eof()

    def _go_on(self) -> None:
        """A request that was read here has its answer: wait for the next one, or close."""
        if self._force_close:
            return
        if not self._keepalive or self._close:
            if self.transport is not None:
                self.transport.close()
            return
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        if self._behind:
            self._loop.call_soon(self._read_behind)  # not now: there may be many more behind it
        else:
            self.is_direct = False

    def _read_behind(self) -> None:
        pieces, self._behind, self._behind_bytes, self.is_direct = self._behind, [], 0, False
        if self._buffer_paused:
            self._resume_reading_for_buffer()
        for data in pieces:
            self.data_received(data)

    def pause_reading(self) -> None:
        """A body comes faster than it is read."""
        if self._arriving is None:
            super().pause_reading()
        else:  # aiohttp's parser has no part in it
            self._reading_paused = True
            self._pause_transport_reading()

    @property
    def task(self) -> "asyncio.Task[None] | None":
        """What answers the request that is in progress, to be cancelled where that ends early."""
        return self._task if self.is_direct else self._task_handler

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client has left."""
        super().connection_lost(exc)
        self._cancel()

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """The server ends: aiohttp waits for what is in progress, and cancels what it has begun itself."""
        await super().shutdown(timeout)
        self._cancel()

    def _cancel(self) -> None:
        if self.is_direct and self._task is not None:
            self._task.cancel()
