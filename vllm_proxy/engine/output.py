"""Follows the output of a running engine: forwards its lines, truncates its file, derives progress and activity.

Engines write to a file that outlives the daemon, never to a pipe that would break with it; so the file is polled.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_proxy.domain import progress
from vllm_proxy.domain.lifecycle import Phase
from vllm_proxy.domain.progress import Progress
from vllm_proxy.engine import logs
from vllm_proxy.engine.log_file import MOST_BYTES
from vllm_proxy.engine.logs import LogReader
from vllm_proxy.engine.vitals import Work

type PassOn = Callable[[str, Sequence[str]], None]  # instance, lines

_POLL_SECONDS = 0.1
_MOST_PIECES = 16  # of 16 KiB are read in a row: of an engine that writes more in each poll, some is skipped
_LAST_PIECES = 256  # of what a dead engine had written: an escaped process of it may write for ever
_MOST_LOOKED_AT = 1000  # characters of a line: the rest may be a dump of anything
_QUIET_SECONDS = 5.0  # without output: then the activity of its processes is measured
_WORK_BYTES = 2**20  # in that time: heartbeats of idle processes stay far below
_MAY_DOWNLOAD = frozenset({Phase.IMPORTING, Phase.LOADING_WEIGHTS})
# What vLLM logs again and again while it hangs.
_NO_PROGRESS = re.compile(r"No available shared memory broadcast block|Waiting for \d+ .*core engine")


class Output:
    """The output of one engine. `activity` grows whenever the engine does something that can be seen."""

    def __init__(
        self,
        instance: str,
        file: Path,
        start: int,
        read_from: int,
        pass_on: PassOn,
        *,
        most_bytes: int = MOST_BYTES,
        weights_bytes: int = 0,
    ) -> None:
        """`start`: where this engine's output begins in the file; `read_from`: from where it is new to us, bytes.

        `most_bytes`: a larger file is cut. `weights_bytes`: as an earlier daemon read it.
        """
        self.progress = progress.START
        self.weights_bytes = weights_bytes  # of each device, the largest that it named; 0: it has named none
        self.activity = 0
        self.loading = True  # while it does, each line is looked at
        self._instance = instance
        self._file = file
        self._start = start
        self._reader = LogReader(file, read_from)
        self._pass_on = pass_on
        self._most_bytes = most_bytes
        self._catches_up = read_from > start

    def tail(self, lines: int) -> tuple[str, ...]:
        """The last lines that it wrote. For a thread."""
        return logs.last_lines(self._file, lines, self._start)

    async def pump(self, look: Callable[[], Work], quiet: float = _QUIET_SECONDS) -> None:
        """Follow it until cancelled. `look`: measures its processes, in a thread, when there was no output for `quiet`.

        `quiet` is in seconds.
        """
        loop = asyncio.get_running_loop()
        if self._catches_up:
            await asyncio.to_thread(self._catch_up)
        active_at, moved = loop.time(), 0
        while True:
            if await self._read_on(_MOST_PIECES):
                active_at = loop.time()
            elif self.loading and loop.time() - active_at > quiet:
                work = await asyncio.to_thread(look)
                self.activity += work.moved_bytes - moved > _WORK_BYTES
                moved, active_at = work.moved_bytes, loop.time()
                if work.downloads and self.progress.fraction is None and self.progress.phase in _MAY_DOWNLOAD:
                    self.progress = Progress(Phase.DOWNLOADING, None)  # vLLM reports a download only when it has ended
            await asyncio.sleep(_POLL_SECONDS)

    def _catch_up(self) -> None:
        """Derive the progress from output that an earlier daemon forwarded already. For a thread."""
        for line in self.tail(10_000):
            self._note_progress(line)

    async def finish(self) -> None:
        """It has ended: forward the rest, an unfinished last line included."""
        await self._read_on(_LAST_PIECES)
        self._forward(self._reader.flush())

    def loaded(self) -> None:
        """It serves. What it has written until now is looked at before the next poll; what comes is passed on alone."""
        for _ in range(_MOST_PIECES):
            self._read()
            if not self._reader.more:
                break
        self.loading = False

    async def _read_on(self, most_pieces: int) -> bool:
        """Read what is new, yielding to the event loop after each piece; whether there was anything."""
        found_any = self._read()
        while self._reader.more and (most_pieces := most_pieces - 1) > 0:
            await asyncio.sleep(0)
            found_any |= self._read()
        return found_any

    def _read(self) -> bool:
        lines = self._reader.read()
        self._forward(lines)
        if moved := logs.cut(self._file, self._most_bytes):
            self._reader.shift(moved)
            self._start = max(0, self._start - moved)
        return bool(lines)

    def _forward(self, lines: list[str]) -> None:
        if lines:
            self._pass_on(self._instance, lines)
            for line in lines:
                self._note_progress(line)

    def _note_progress(self, line: str) -> None:
        if not self.loading:
            return
        line = line[:_MOST_LOOKED_AT]
        self.progress = progress.after_line(self.progress, line)
        self.weights_bytes = max(self.weights_bytes, progress.weights_bytes(line))
        if not _NO_PROGRESS.search(line):
            self.activity += 1
