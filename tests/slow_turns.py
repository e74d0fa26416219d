"""Runs `vllm-proxy` and writes down each callback that holds its event loop for long: `python slow_turns.py COMMAND`.

What is measured is the processor time of the loop's thread, never the clock: a machine that is busy elsewhere takes
the clock's time away, and none of this one. So the limit is one figure on an idle machine and on a loaded one:
`LIMIT_SECONDS` of computing in one callback, or in one step of a task. The allowance is what processor time itself
swings by, a cold cache, another process on that core: callbacks are kept at a third of the limit where they are made.
Waiting inside a callback (`time.sleep`, a slow disk) is not seen here.

Not watched: the time before READY=1, in which modules are imported and the file is parsed for the first time.
"""

import asyncio
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

LIMIT_SECONDS = 0.1
_LOOK_SECONDS = 0.01
FILE = "SLOW_TURNS_FILE"  # names the file to which they are written


class Watch:
    """Watches the event loop of the thread that makes it. `report` is called in another thread, with the stack."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._thread)
        self._turn = 0  # a number that grows with the loop's turns
        self._turn_began = 0.0  # processor time of the loop's thread then
        self._ends = threading.Event()
        self._beat()
        threading.Thread(target=self._watch, name="slow turns", daemon=True).start()

    def stop(self) -> None:
        """Watch no more."""
        self._ends.set()

    def _beat(self) -> None:
        self._turn += 1
        self._turn_began = time.thread_time()
        if not self._ends.is_set():
            self._loop.call_later(_LOOK_SECONDS, self._beat)

    def _watch(self) -> None:
        seen: tuple[int, FrameType] | None = None  # a coroutine has one frame in all its steps, so the turn counts too
        began = last = 0.0
        told = False
        while not self._ends.wait(_LOOK_SECONDS):
            frame = sys._current_frames()[self._thread]
            now = time.clock_gettime(self._clock)
            callback = (self._turn, _outermost(frame))
            if callback != seen:  # it began after the last look; to hold its frame keeps another one from its place
                seen, began, told = callback, last, False
            took = now - max(began, self._turn_began)
            if took > LIMIT_SECONDS and not told:
                told = True
                self._report(f"{took * 1000:.0f} ms and more\n{''.join(traceback.format_stack(frame))}")
            last = now


def _outermost(frame: FrameType) -> FrameType:
    """The frame that the event loop has called."""
    at = frame
    while (before := at.f_back) is not None:  # read once: that thread runs on
        if before.f_code is asyncio.Runner.run.__code__:
            return at
        at = before
    return frame


def main() -> None:
    """Run the daemon, watched from READY=1 on."""
    from vllm_proxy.__main__ import main as run
    from vllm_proxy.systemd import Systemd

    file = Path(os.environ.pop(FILE))
    ready = Systemd.ready
    watches: list[Watch] = []

    def write(text: str) -> None:
        with file.open("a", encoding="utf-8") as slow:
            slow.write(text)

    def watch(self: Systemd) -> None:
        ready(self)
        if not watches:
            watches.append(Watch(write))

    Systemd.ready = watch  # type: ignore[method-assign] # the one place that knows when it is up
    run()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # instead of this folder, where `daemon` is the tests' own
    main()
