"""Runs `vllm-proxy` by the hundred: each in a process of its own, forked from one that has imported it all.

A fork takes 20 ms, a start of Python with all that the daemon and its commands import most of a second of computing,
which was half of what the tests of the daemon took. What the interpreter does when it starts, with its streams, its
signals and its environment, is done here by hand. Who needs more of its own than that executes an interpreter.
"""

import asyncio
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

NOBODY = 65534
_NUMBER = struct.Struct("i")
_LARGEST = 2**18  # bytes of what is asked for

type Stdout = Literal["file", "full", "closed", "left"]  # left: a pipe that nobody reads any more


@dataclass(frozen=True)
class Run:
    """One command. `cwd`: "" for one that is gone; `user`: whose process it is, None for the tests' own.

    `watched`: with an eye on its event loop, see `slow_turns`.
    """

    arguments: Sequence[str]
    cwd: str
    env: Mapping[str, str]
    user: int | None = None
    stdout: Stdout = "file"
    encoding: str = "utf-8"
    watched: bool = False


@dataclass(frozen=True)
class Ended:
    """What became of it. `status` is negative for the signal that ended it; SIGALRM: it hung."""

    status: int
    out: str
    err: str


class Forked:
    """A process, used as asyncio's are, in one event loop. `report`: where its exit status can be read at its end."""

    def __init__(self, report: int) -> None:
        self._report = report
        self.pid = self._read()
        self.returncode: int | None = None
        self._ended: asyncio.Future[int] | None = None

    async def wait(self) -> int:
        """Wait for its end; returns its exit status, negative for a signal."""
        if self.returncode is not None:
            return self.returncode
        if self._ended is None:
            loop = asyncio.get_running_loop()
            self._ended = loop.create_future()
            loop.add_reader(self._report, self._end)
        return await asyncio.shield(self._ended)

    def wait_here(self) -> int:
        """As `wait`, where there is no event loop."""
        self.returncode = self._read()
        os.close(self._report)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it has not ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _end(self) -> None:
        assert self._ended is not None
        self._ended.get_loop().remove_reader(self._report)
        self._ended.set_result(self.wait_here())

    def _read(self) -> int:
        data = os.read(self._report, _NUMBER.size)
        assert data, "the process that forks is gone"
        number: int = _NUMBER.unpack(data)[0]
        return number


class Forks:
    """The process that forks."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def start(self, run: Run, stdout: int, stderr: int, seconds: int = 0) -> Forked:
        """Run a command with these outputs. `seconds`: after which SIGALRM ends it; 0: never."""
        reading, writing = os.pipe()
        try:
            job = json.dumps({**asdict(run), "seconds": seconds}).encode()
            socket.send_fds(self._link, [job], [stdout, stderr, writing])
        finally:
            os.close(writing)
        return Forked(reading)

    def run(self, runs: Sequence[Run], seconds: int = 60) -> list[Ended]:
        """All of them at once; what takes longer than `seconds` hangs."""
        with tempfile.TemporaryDirectory() as folder:
            started = []
            for number, run in enumerate(runs):
                with (
                    _output(run.stdout, f"{folder}/{number}.out") as out,
                    Path(f"{folder}/{number}.err").open("wb") as err,
                ):
                    started.append(self.start(run, out, err.fileno(), seconds))
            statuses = [one.wait_here() for one in started]
            return [
                Ended(status, _read(Path(f"{folder}/{number}.out")), _read(Path(f"{folder}/{number}.err")))
                for number, status in enumerate(statuses)
            ]


def _read(file: Path) -> str:
    return file.read_text(errors="surrogateescape") if file.exists() else ""


@contextlib.contextmanager
def _output(kind: Stdout, place: str) -> Iterator[int]:
    if kind == "left":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full" if kind == "full" else place, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        yield writer
    finally:
        os.close(writer)


@contextlib.contextmanager
def forks() -> Iterator[Forks]:
    """A process that forks, for the time of the block; what it has started lives on."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST)
    with ours:
        argv = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        with subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL):
            theirs.close()
            try:
                yield Forks(ours)
            finally:
                ours.close()


_running = contextlib.ExitStack()


@functools.cache
def shared() -> Forks:
    """The one that is there until `end_shared`."""
    return _running.enter_context(forks())


def end_shared() -> None:
    """End it, if it is there."""
    _running.close()
    shared.cache_clear()


def _serve(link: socket.socket) -> None:
    """Fork whenever somebody asks, and report pids and exit statuses."""
    from tests import slow_turns
    from vllm_proxy import commands
    from vllm_proxy.__main__ import main
    from vllm_proxy.cli import run

    for module in pkgutil.iter_modules(commands.__path__, f"{commands.__name__}."):
        importlib.import_module(module.name)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        run(["init", "-c", f"{folder}/x"])  # imports what is imported late: not every user may read it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks ends this process
    gc.freeze()
    children: dict[int, tuple[int, int]] = {}  # process and report, by what can be read at its end
    poll = select.poll()
    poll.register(link, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready in children:
                poll.unregister(ready)
                pid, report = children.pop(ready)
                _tell(report, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(ready)
                os.close(report)
                continue
            data, descriptors, _, _ = socket.recv_fds(link, _LARGEST, 3)
            if not data:
                return
            job = json.loads(data)
            pid = os.fork()
            if not pid:
                _become(job, *descriptors[:2])
                _end_with(slow_turns.main if job["watched"] else main)
            stdout, stderr, report = descriptors
            os.close(stdout)
            os.close(stderr)
            _tell(report, pid)
            ended = os.pidfd_open(pid)
            children[ended] = pid, report
            poll.register(ended, select.POLLIN)


def _tell(report: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know
        os.write(report, _NUMBER.pack(number))


def _end_with(main: Callable[[], None]) -> NoReturn:
    """As Python ends, but for taking its modules apart."""
    try:
        main()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:  # noqa: BLE001 - as Python does
        traceback.print_exc()
        status = 1
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        status = 120
    os._exit(status)


def _become(job: Mapping[str, Any], stdout: int, stderr: int) -> None:
    """Be what a shell would have started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(job["seconds"])
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.argv = ["vllm-proxy", *job["arguments"]]
    sys.stdout = open(1, "w", encoding=job["encoding"], errors="strict", closefd=False)  # noqa: SIM115 - kept open
    sys.stderr = open(2, "w", 1, encoding=job["encoding"], errors="backslashreplace", closefd=False)  # noqa: SIM115
    if job["stdout"] == "closed":
        os.close(1)
        sys.stdout = None  # as Python starts then
    os.environ.clear()
    os.environ.update(job["env"])
    time.tzset()
    tempfile.tempdir = None
    os.chdir(job["cwd"] or tempfile.mkdtemp())
    if not job["cwd"]:
        Path.cwd().rmdir()
    if job["user"] is not None:
        os.setgroups([])
        os.setgid(job["user"])
        os.setuid(job["user"])


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
