"""The daemon's own output: one queue, one thread that writes it. Its one rule: who logs never waits and never fails.

A pipe that nobody reads, or a journal that hangs, holds up this thread alone. What finds no room and what cannot be
written is counted, and once something can be written again, a line says how much is missing.
"""

import os
import select
import threading
from collections.abc import Callable
from typing import Self

_MOST_WAITING = 4 * 2**20  # characters; as many may be on their way out
_GATHER_SECONDS = 0.1  # for what is in no hurry: a write for each request would cost more than the relay itself
_RETRY_SECONDS = 1.0
_LAST_SECONDS = 2.0  # for what still waits at the end


def _in_plain_words(missing: int) -> str:
    return f"{missing} lines are missing here\n"


class LogWriter:
    """Writes to a file descriptor, from any thread. Use as a context manager: what waits at its end is written.

    `write` queues lines, which are written within a tenth of a second; `flush` has that done at once. Neither waits.
    They come out in the order in which they went in. It can stand in for `sys.stderr`.
    """

    def __init__(self, descriptor: int, most_waiting: int = _MOST_WAITING) -> None:
        """`most_waiting`: characters; what comes beyond is dropped."""
        self.dropped = 0  # lines
        self.notice: Callable[[int], str] = _in_plain_words  # makes the one line that says how many are missing
        self._descriptor = descriptor
        self._most_waiting = most_waiting
        self._waiting: list[str] = []
        self._size = 0
        self._before = self._behind = 0  # missing, before and behind what waits; no line says so yet
        self._told: list[int] = []  # what the lines say that say so, among those that wait
        self._hurry = self._fails = self._ends = self._gives_up = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        thread = threading.Thread(target=self._run, name="log", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads can be made: then whoever logs writes
            return self
        self._thread = thread
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, text: str) -> None:
        """Queue text; what must not be torn apart by others comes in one piece."""
        with self._lock:
            if self._ends or self._size + len(text) > self._most_waiting:
                lines = text.count("\n")
                self.dropped += lines
                self._behind += lines
                return
            if not self._waiting:
                self._changed.notify()
            if self._behind:
                self._tell_behind()
            self._waiting.append(text)
            self._size += len(text)

    def flush(self) -> None:
        """Have written what waits. Returns at once."""
        with self._lock:
            if self._waiting and not self._hurry:
                self._hurry = True
                self._changed.notify()
        if self._thread is None:
            self._write_all()

    def fileno(self) -> int:
        """Where it writes to."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether that is a terminal."""
        return os.isatty(self._descriptor)

    def close(self, seconds: float = _LAST_SECONDS) -> None:
        """Write what waits, for at most `seconds`. What comes later is dropped."""
        with self._lock:
            self._ends = True
            self._changed.notify()
        if self._thread is None:
            self._write_all()
        else:
            self._thread.join(seconds)
        self._gives_up = True

    def _run(self) -> None:
        while self._wait():
            self._write_all()
        self._write_all()

    def _wait(self) -> bool:
        """Until there is something to write; False at the end."""
        with self._lock:
            if not (self._waiting or self._before or self._behind or self._ends):
                self._changed.wait()
            if not self._hurry and not self._ends:
                self._changed.wait(_RETRY_SECONDS if self._fails else _GATHER_SECONDS)
            self._hurry = False
            return not self._ends

    def _write_all(self) -> None:
        self._fails = False
        while not self._fails and (batch := self._take()):
            text, told = batch
            left = self._put(text.encode(errors="backslashreplace"))
            if left:
                self._fails = True
                lost = max(left - len(told), 0)
                with self._lock:
                    self.dropped += lost
                    self._before += lost + sum(told)

    def _take(self) -> tuple[str, list[int]] | None:
        with self._lock:
            if self._before:
                self._waiting.insert(0, self.notice(self._before))
                self._told.append(self._before)
                self._before = 0
            if self._behind and not self._size:
                self._tell_behind()
            batch = "".join(self._waiting), self._told
            self._waiting, self._told, self._size = [], [], 0
            return batch if batch[0] else None

    def _tell_behind(self) -> None:
        self._waiting.append(self.notice(self._behind))
        self._told.append(self._behind)
        self._behind = 0

    def _put(self, data: bytes) -> int:
        """Write, waiting for whoever reads. Returns how many lines could not be written."""
        rest = memoryview(data)
        while rest and not self._gives_up:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process that shares it wants it so
                select.select((), (self._descriptor,), (), _RETRY_SECONDS)
            except OSError:
                break
        return bytes(rest).count(b"\n")
