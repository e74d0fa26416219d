"""Timeouts that count only the time in which this process was running.

After a freeze (a paused container, a frozen cgroup, a virtual machine that was moved) clocks have advanced though
nobody could do anything. Whoever judges an engine, a request or a client by time measures it here: after a freeze every
wait begins anew (tests/runtime/test_clock.py).
"""

import asyncio
import os
import time
import weakref
from collections.abc import Collection
from typing import Any

import structlog

log = structlog.get_logger()

_PULSE_SECONDS = 0.25
_STOOD_STILL_SECONDS = 1.0  # without a pulse for so long, the loop did not run
_SILENT_SECONDS = 60.0  # between two warnings of that
_SHORTEST_WAIT_SECONDS = 1e-6
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Pulse:
    """Notices that an event loop stood still. Use as a context manager, on that loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last = self._since = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._computed = time.thread_time()  # at the last beat
        self._warned_at = self._last - _SILENT_SECONDS
        self._unreported = 0

    def __enter__(self) -> None:
        _pulses[self._loop] = self
        self._beat()

    def __exit__(self, *_: object) -> None:
        del _pulses[self._loop]
        if self._timer is not None:
            self._timer.cancel()

    def ran_since(self) -> float:
        """Since when the loop has run without a break, on its clock."""
        now, last = self._loop.time(), self._last
        self._last = now
        if now - last > _STOOD_STILL_SECONDS:
            self._since = now
            self._warn(now, now - last)
        return self._since

    def _beat(self) -> None:
        self._timer = self._loop.call_later(_PULSE_SECONDS, self._beat)
        self.ran_since()
        self._computed = time.thread_time()

    def _warn(self, now: float, seconds: float) -> None:
        if now - self._warned_at < _SILENT_SECONDS:
            self._unreported += 1
            return
        # Little computed: it got no processor, or something blocked. Much: a fault of the daemon itself.
        computed = time.thread_time() - self._computed
        log.warning("the daemon stood still: what waits for time to pass begins anew", seconds=round(seconds, 1),
                    computed_seconds=round(computed, 1), unreported_before=self._unreported)  # fmt: skip
        self._warned_at, self._unreported = now, 0


_pulses: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pulse] = weakref.WeakKeyDictionary()


def elapsed(since: float) -> float:
    """Seconds since a time of the running loop's clock, or since it last stood still, which is later."""
    loop = asyncio.get_running_loop()
    pulse = _pulses.get(loop)
    return loop.time() - (max(since, pulse.ran_since()) if pulse else since)


async def wait(futures: Collection[asyncio.Future[Any]], seconds: float) -> bool:
    """Wait until one of the futures is done, for so many seconds at most; whether one is."""
    began = asyncio.get_running_loop().time()
    left = seconds
    while not any(future.done() for future in futures):
        if left < _SHORTEST_WAIT_SECONDS:
            return False
        await asyncio.wait(futures, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        left = seconds - elapsed(began)
    return True


async def sleep(seconds: float) -> None:
    """Until so many seconds have passed."""
    began = asyncio.get_running_loop().time()
    while (left := seconds - elapsed(began)) >= _SHORTEST_WAIT_SECONDS:  # noqa: ASYNC110 - time is what it waits for
        await asyncio.sleep(left)


def seconds_since_ticks(ticks: int) -> float:
    """How long ago a process started, from its start in clock ticks since boot (/proc). No wall clock is used."""
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / _TICKS_PER_SECOND)
