"""The engine core of the fake: a process of its own, with its workers and its shared memory.

Kept from vLLM 0.32: nothing tells it when the server dies; what it leaves in /dev/shm stays after a SIGKILL of the
server. It is forked before anything large is imported, so that it costs little; it does nothing.
"""

import argparse
import contextlib
import mmap
import os
import signal
import socket
from collections.abc import Iterator

_SEGMENT_BYTES = 2**20


class Core:
    """The process, as the server knows it."""

    def __init__(self, options: argparse.Namespace, listener: socket.socket) -> None:
        """`listener`: not the core's, so that an orphan holds no port."""
        self.stubborn = options.fake_stubborn_core
        self.code: int | None = None  # how it ended: exit code, or minus its signal
        self.segment = f"/dev/shm/psm_{os.urandom(4).hex()}" if options.fake_shm else ""
        self.mapping = _map(self.segment) if options.fake_shm == "server" else None
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                listener.close()
                os.close(reading)
                if self.mapping is not None:
                    self.mapping.close()
                self._run(options, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as told:  # to its end: then the core is what it shall be
            self.workers = [int(pid) for pid in told.read().split()]

    def _run(self, options: argparse.Namespace, writing: int) -> None:
        """The life of the core itself."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ignores_sigterm = self.stubborn or options.fake_orphan
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ignores_sigterm else signal.SIG_DFL)
        _name_process("VLLM::EngineCore")
        if options.fake_shm == "core":
            self.mapping = _map(self.segment)
        for number in range(options.fake_grandchildren):
            pid = os.fork()
            if pid == 0:
                if options.fake_escape and number == options.fake_grandchildren - 1:
                    os.setsid()
                os.close(writing)
                _name_process(f"VLLM::Worker_{number}")
                _live()
            os.write(writing, f"{pid} ".encode())
        os.close(writing)
        _live()

    @property
    def alive(self) -> bool:
        """Whether it has not been found dead."""
        return self.code is None

    def changes(self) -> Iterator[str]:
        """What has become of it since the last time: "stopped", "continued", at last "died"."""
        while self.alive:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                yield "stopped"
            elif os.WIFCONTINUED(status):
                yield "continued"
            else:
                self.code = os.waitstatus_to_exitcode(status)
                yield "died"

    def signal(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self.alive:
            os.kill(self.pid, number)

    def wait(self) -> None:
        """Until it is dead; a stop is no death."""
        if self.alive:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def end(self) -> None:
        """As the server ends: kill it with its workers, remove its shared memory. A stubborn one is left."""
        if self.stubborn:
            return
        for pid in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.signal(signal.SIGKILL)
        self.wait()
        self.tidy()

    def tidy(self) -> None:
        """Remove its shared memory, as the resource tracker does for whoever is dead."""
        if self.segment:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.segment)  # noqa: PTH108 - imports nothing


def _map(path: str) -> mmap.mmap:
    """A new segment of shared memory, of which one page is used."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.ftruncate(descriptor, _SEGMENT_BYTES)
    mapping = mmap.mmap(descriptor, _SEGMENT_BYTES)
    os.close(descriptor)
    mapping[0] = 1
    return mapping


def _name_process(name: str) -> None:
    """What ps shows; the kernel keeps 15 characters."""
    with open("/proc/self/comm", "w") as file:  # noqa: PTH123 - imports nothing
        file.write(name)


def _live() -> None:
    while True:
        signal.pause()
