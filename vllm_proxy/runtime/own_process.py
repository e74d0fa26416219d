"""What the kernel says of this process: processor time, memory, descriptors. For `/metrics`, and for a thread.

The numbers are those that Prometheus' own client libraries show as `process_*`.
"""

import os
import resource
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PROC = Path("/proc")
_PAGE_BYTES, _TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class OwnProcess:
    """Bytes, seconds, and numbers of file descriptors. `started_at`: seconds since the epoch."""

    cpu_seconds: float
    virtual_bytes: int
    resident_bytes: int
    started_at: float
    open_files: int
    most_files: float


def own_process() -> OwnProcess:
    """As it is now."""
    stat = (_PROC / "self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return OwnProcess(
        cpu_seconds=(int(stat[11]) + int(stat[12])) / _TICKS,
        virtual_bytes=int(stat[20]),
        resident_bytes=int(stat[21]) * _PAGE_BYTES,
        started_at=_booted_at() + int(stat[19]) / _TICKS,
        open_files=_open_files(),
        most_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


@cache  # a clock that is set must not look like another process
def _booted_at() -> float:
    lines = (_PROC / "stat").read_text(encoding="utf-8").splitlines()
    return float(next(line for line in lines if line.startswith("btime ")).split()[1])


def _open_files() -> int:
    folder = _PROC / "self/fd"
    counted = folder.stat().st_size  # since Linux 6.2; before, 0
    return counted or len(os.listdir(folder)) - 1  # noqa: PTH208 - names alone; one is that of the listing
