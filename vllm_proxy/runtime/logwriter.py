"""Writes the daemon's log: a bounded queue, and one thread that drains it.

Logging never blocks and never raises: a full pipe or a hung journal delays this thread alone. Lines that find no room
or cannot be written are dropped and counted, and once writing works again a line says how many are missing
(tests/runtime/test_logwriter.py).
"""

import os
import select
import threading
from collections.abc import Callable
from typing import Self

_MOST_WAITING = 4 * 2**20  # characters; as many may be on their way out
_BATCH_SECONDS = 0.1  # lines are batched: a write for each request would cost more than the relay itself
_RETRY_SECONDS = 1.0
_CLOSE_SECONDS = 2.0  # for what still waits at the end


def _plain_notice(missing: int) -> str:
    return f"{missing} lines are missing here\n"


class LogWriter:
    """Writes to a file descriptor, from any thread. Use as a context manager: what waits at its end is written.

    `write` queues lines, which are written within a tenth of a second; `flush` triggers that at once. Neither blocks.
    Secrets are hidden (`runtime/masking.py`), whatever it is that logs them.
    They come out in the order in which they went in. It can stand in for `sys.stderr`.
    """

    def __init__(self, descriptor: int, most_waiting: int = _MOST_WAITING) -> None:
        """`most_waiting`: characters; what exceeds it is dropped."""
        self.dropped = 0  # lines
        self.notice: Callable[[int], str] = _plain_notice  # formats the notice of lost lines
        self.mask: Callable[[str], str] = str  # hides the secrets in what is written
        self.deliver: Callable[[str], int] = self._write_text  # writes lines; returns how many could not be written
        self._descriptor = descriptor
        self._most_waiting = most_waiting
        self._waiting: list[str] = []
        self._size = 0
        self._lost_before = self._lost_after = 0  # lost lines before and after the queued ones, not reported yet
        self._reported: list[int] = []  # the counts in queued notices of lost lines
        self._flush_now = self._failing = self._closing = self._abandoned = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        thread = threading.Thread(target=self._run, name="log", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be made: the caller writes then
            return self
        self._thread = thread
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, text: str) -> None:
        """Queue text, without the secrets in it; lines that belong together are passed in one call."""
        self.queue(self.mask(text))

    def queue(self, text: str) -> None:
        """Queue text as it is: for lines that are made of names alone, one for each request."""
        with self._lock:
            if self._closing or self._size + len(text) > self._most_waiting:
                lines = text.count("\n")
                self.dropped += lines
                self._lost_after += lines
                return
            if not self._waiting:
                self._changed.notify()
            if self._lost_after:
                self._report_lost()
            self._waiting.append(text)
            self._size += len(text)

    def flush(self) -> None:
        """Trigger a write of what is queued. Returns at once."""
        with self._lock:
            if self._waiting and not self._flush_now:
                self._flush_now = True
                self._changed.notify()
        if self._thread is None:
            self._write_all()

    def fileno(self) -> int:
        """Where it writes to."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether that is a terminal."""
        return os.isatty(self._descriptor)

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Write what waits, for at most `seconds`. What comes later is dropped."""
        with self._lock:
            self._closing = True
            self._changed.notify()
        if self._thread is None:
            self._write_all()
        else:
            self._thread.join(seconds)
        self._abandoned = True

    def _run(self) -> None:
        while self._wait():
            self._write_all()
        self._write_all()

    def _wait(self) -> bool:
        """Until there is something to write; False at the end."""
        with self._lock:
            if not (self._waiting or self._lost_before or self._lost_after or self._closing):
                self._changed.wait()
            if not self._flush_now and not self._closing:
                self._changed.wait(_RETRY_SECONDS if self._failing else _BATCH_SECONDS)
            self._flush_now = False
            return not self._closing

    def _write_all(self) -> None:
        self._failing = False
        while not self._failing and (batch := self._next_batch()):
            text, reported = batch
            left = self.deliver(text)
            if left:
                self._failing = True
                lost = max(left - len(reported), 0)
                with self._lock:
                    self.dropped += lost
                    self._lost_before += lost + sum(reported)

    def _next_batch(self) -> tuple[str, list[int]] | None:
        with self._lock:
            if self._lost_before:
                self._waiting.insert(0, self.notice(self._lost_before))
                self._reported.append(self._lost_before)
                self._lost_before = 0
            if self._lost_after and not self._size:
                self._report_lost()
            batch = "".join(self._waiting), self._reported
            self._waiting, self._reported, self._size = [], [], 0
            return batch if batch[0] else None

    def _report_lost(self) -> None:
        self._waiting.append(self.notice(self._lost_after))
        self._reported.append(self._lost_after)
        self._lost_after = 0

    def _write_text(self, text: str) -> int:
        return self._write_out(text.encode(errors="backslashreplace"))

    def _write_out(self, data: bytes) -> int:
        """Write, blocking as long as the reader does not read. Returns how many lines could not be written."""
        rest = memoryview(data)
        while rest and not self._abandoned:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process that shares the pipe made it non-blocking
                select.select((), (self._descriptor,), (), _RETRY_SECONDS)
            except OSError:
                break
        return bytes(rest).count(b"\n")
