"""The readers of a stream of events: each has a bounded queue, and publishing never waits.

One that falls too far behind is disconnected, so that it cannot hold up the others or grow without bound.
"""

import asyncio
import contextlib

from aiohttp import web

from vllm_proxy.api.reply import ALIVE, begin_events
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.runtime.background import spawn

_MOST_WAITING = 1000  # events that a reader may be behind
_SILENT_SECONDS = 15.0  # then a comment keeps the stream alive

type Reader = asyncio.Queue[bytes | None]  # None: the stream ends


def new_reader() -> Reader:
    """One more, that nobody publishes to yet."""
    return asyncio.Queue(_MOST_WAITING)


class Readers:
    """Who gets what is published."""

    def __init__(self) -> None:
        self._readers: set[Reader] = set()

    def __bool__(self) -> bool:
        return bool(self._readers)

    def add(self, reader: Reader) -> None:
        """It gets what is published from now on."""
        self._readers.add(reader)

    def discard(self, reader: Reader) -> None:
        """It has left."""
        self._readers.discard(reader)

    def publish(self, event: bytes) -> None:
        """To all of them; one event, or several at once."""
        for reader in list(self._readers):
            try:
                reader.put_nowait(event)
            except asyncio.QueueFull:
                self._readers.discard(reader)
                close(reader)


async def relay(request: web.Request, reader: Reader, reconciler: Reconciler) -> web.StreamResponse:
    """Pass on what a reader gets, until one side leaves or the daemon stops."""
    response = await begin_events(request)
    stopping = spawn(reconciler.stopping.wait(), "end of an event stream")
    stopping.add_done_callback(lambda _: close(reader))
    try:
        await response.write(ALIVE)  # whoever has it misses no event
        with reconciler.watchers:
            while (event := await _next(reader)) is not None:
                await response.write(event)
    finally:
        stopping.cancel()
    return response


def close(reader: Reader) -> None:
    """End a reader's stream; where its queue is full, an event makes room for that."""
    if reader.full():
        reader.get_nowait()
    reader.put_nowait(None)


async def _next(reader: Reader) -> bytes | None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SILENT_SECONDS):
            return await reader.get()
    return ALIVE
