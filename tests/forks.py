"""Runs commands of `vllm-proxy` by the hundred: each in a process of its own, forked from one that has imported it all.

A fork takes 20 ms, a start of Python with all that the commands import more than a second. What the interpreter does
with its streams when it starts is done here by hand.
"""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

NOBODY = 65534

type Stdout = Literal["file", "full", "closed", "left"]  # left: a pipe that nobody reads any more


@dataclass(frozen=True)
class Run:
    """One command. `cwd`: "" for one that is gone; `user`: whose process it is, None for the tests' own."""

    arguments: Sequence[str]
    cwd: str
    env: Mapping[str, str]
    user: int | None = None
    stdout: Stdout = "file"
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Ended:
    """What became of it. `status` is negative for the signal that ended it; SIGALRM: it hung."""

    status: int
    out: str
    err: str


class Forks:
    """The process that forks."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, runs: Sequence[Run], seconds: int = 60) -> list[Ended]:
        """All of them at once; what takes longer than `seconds` hangs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            jobs = [
                {**asdict(run), "place": f"{folder}/{number}", "seconds": seconds} for number, run in enumerate(runs)
            ]
            self._process.stdin.write(json.dumps(jobs) + "\n")
            self._process.stdin.flush()
            statuses = json.loads(self._process.stdout.readline())
            return [
                Ended(status, _read(Path(f"{folder}/{number}.out")), _read(Path(f"{folder}/{number}.err")))
                for number, status in enumerate(statuses)
            ]


def _read(file: Path) -> str:
    return file.read_text(errors="surrogateescape") if file.exists() else ""


@contextlib.contextmanager
def forks() -> Iterator[Forks]:
    """A process that forks, for the time of the block."""
    argv = [sys.executable, "-m", "tests.forks"]
    with subprocess.Popen(argv, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Forks(process)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    """Read jobs, a list on each line, and print the list of their statuses once all have ended."""
    from vllm_proxy.__main__ import main
    from vllm_proxy.cli import run

    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        run(["init", "-c", f"{folder}/x"])  # imports what is imported late: not every user may read it
    gc.freeze()
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            child = os.fork()
            if not child:
                signal.alarm(job["seconds"])
                _become(job)
                _end_with(main)
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


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


def _become(job: Mapping[str, Any]) -> None:
    """Be what a shell would have started."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(job["place"] + ".err", os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(_output(job["stdout"], job["place"] + ".out"), 1)
    sys.argv = ["vllm-proxy", *job["arguments"]]
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), job["encoding"], "strict")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), job["encoding"], "backslashreplace")
    if job["stdout"] == "closed":
        os.close(1)
        sys.stdout = None  # as Python starts then
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"] or tempfile.mkdtemp())
    if not job["cwd"]:
        Path.cwd().rmdir()
    if job["user"] is not None:
        os.setgroups([])
        os.setgid(job["user"])
        os.setuid(job["user"])


def _output(kind: Stdout, place: str) -> int:
    if kind == "left":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return os.open("/dev/full" if kind == "full" else place, os.O_WRONLY | os.O_CREAT, 0o666)


if __name__ == "__main__":
    _serve()
