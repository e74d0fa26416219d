"""Turns of the event loop: what is much is done in pieces, and how late turns come is known.

Its one rule: nobody waits for a neighbour's work, only for a piece of it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable

from vllm_proxy.domain.histogram import Histogram

_PIECE_SECONDS = 0.002
_BEAT_SECONDS = 0.1
_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SHOWN_SECONDS = 60.0  # at least so long a maximum is shown, so that no look at the metrics misses it


async def in_turns[T](items: Iterable[T]) -> AsyncIterator[T]:
    """Each item; whenever 2 ms were spent on some, everybody else has a turn."""
    began = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - began > _PIECE_SECONDS:
            await asyncio.sleep(0)
            began = time.monotonic()


class LoopLag:
    """How much later than it should a timer of this event loop runs: what every request waits for in between."""

    def __init__(self) -> None:
        self.seconds = Histogram(_BOUNDS)
        self._most = self._most_before = 0.0
        self._since = time.monotonic()

    async def watch(self) -> None:
        """Look ten times a second, until cancelled."""
        while True:
            due = time.monotonic() + _BEAT_SECONDS
            await asyncio.sleep(_BEAT_SECONDS)
            now = time.monotonic()
            self.note(max(now - due, 0.0), now)

    def most(self) -> float:
        """The largest of the last one to two minutes."""
        return max(self._most, self._most_before)

    def note(self, lag: float, now: float) -> None:
        """One look, in seconds."""
        self.seconds.add(lag)
        if now - self._since > _SHOWN_SECONDS:
            self._most_before, self._most, self._since = self._most, 0.0, now
        self._most = max(self._most, lag)
