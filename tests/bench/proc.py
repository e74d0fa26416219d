"""What the kernel says about processes: processor time and memory."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_CPUCLOCK_SCHED = 2


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found.extend(int(child) for child in task.read_text().split())
    return found


def cpu_ns(pids: Iterable[int]) -> int:
    """Processor time of these processes, to the nanosecond.

    The clock of a process is the sum of /proc/PID/task/*/schedstat, plus what threads used that have ended.
    """
    return sum(time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED) for pid in pids)


def _kib(pid: int, file: str, names: tuple[str, ...]) -> int:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    fields = (line.split() for line in lines)
    return sum(int(field[1]) for field in fields if field and field[0].rstrip(":") in names)


def pss_kib(pids: Iterable[int]) -> int:
    """Memory, shared pages divided among those that share them, swap included."""
    return sum(_kib(pid, "smaps_rollup", ("Pss", "SwapPss")) for pid in pids)


def rss_kib(pids: Iterable[int]) -> int:
    """Resident memory."""
    return sum(_kib(pid, "status", ("VmRSS",)) for pid in pids)


def read_bytes(pids: Iterable[int]) -> int:
    """What these processes have read so far, from sockets too."""
    lines = [line.split() for pid in pids for line in Path(f"/proc/{pid}/io").read_text().splitlines()]
    return sum(int(value) for name, value in lines if name == "rchar:")


@contextlib.contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """These processes do nothing while the block runs."""
    held = list(pids)
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in held:
            os.kill(pid, signal.SIGCONT)


def open_files_limit() -> int:
    """Raise this process's limit on open files to the hard one; returns it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def wait_until(holds: Callable[[], bool], seconds: float, pause: float = 0.005) -> bool:
    """Ask again and again; False when it did not come true in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def busy_cores(seconds: float) -> float:
    """How many cores the machine keeps busy now; what runs beside the benchmark, when it itself is idle."""

    def busy() -> int:
        user, nice, system, _idle, _waits, *rest = (int(part) for part in _stat_line().split()[1:9])
        return user + nice + system + sum(rest)

    before = busy()
    time.sleep(seconds)
    return (busy() - before) / os.sysconf("SC_CLK_TCK") / seconds


def _stat_line() -> str:
    return Path("/proc/stat").read_text().splitlines()[0]
