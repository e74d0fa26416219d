"""Cooperative scheduling: long work on the event loop is done in slices, and the lag of the loop is measured.

Whoever loops over all models or readers does so with `in_turns`, so that a request waits for a slice of 2 ms and not
for all of the work; the fleet loop with `in_batches`, whose slices are the same in every run. `LoopLag` is what
`/metrics` shows of it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from itertools import batched

from vllm_proxy.domain.histogram import Histogram

_PIECE_SECONDS = 0.002
_BATCH = 50  # models, with each of which is done what takes 0.1 ms
_BEAT_SECONDS = 0.1
_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SHOWN_SECONDS = 60.0  # a maximum is shown for at least so long, so that no scrape misses it


async def in_turns[T](items: Iterable[T]) -> AsyncIterator[T]:
    """Each item; yields to the event loop whenever 2 ms were spent."""
    began = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - began > _PIECE_SECONDS:
            await asyncio.sleep(0)
            began = time.monotonic()


async def in_batches[T](items: Iterable[T]) -> AsyncIterator[tuple[T, ...]]:
    """Some of the items at a time; yields to the event loop between two batches."""
    first = True
    for some in batched(items, _BATCH, strict=False):
        if not first:
            await asyncio.sleep(0)
        first = False
        yield some


class LoopLag:
    """The lag of the event loop: how late its timers run, and so how long each request waits on it."""

    def __init__(self) -> None:
        self.seconds = Histogram(_BOUNDS)
        self._most = self._most_before = 0.0
        self._since = time.monotonic()

    async def watch(self) -> None:
        """Measure ten times a second, until cancelled."""
        while True:
            due = time.monotonic() + _BEAT_SECONDS
            await asyncio.sleep(_BEAT_SECONDS)
            now = time.monotonic()
            self.note(max(now - due, 0.0), now)

    def most(self) -> float:
        """The largest of the last one to two minutes."""
        return max(self._most, self._most_before)

    def note(self, lag: float, now: float) -> None:
        """Record one measurement, in seconds."""
        self.seconds.add(lag)
        if now - self._since > _SHOWN_SECONDS:
            self._most_before, self._most, self._since = self._most, 0.0, now
        self._most = max(self._most, lag)
