"""How many OpenMP threads each engine of the demo gets: together no more than there are cores to use.

PyTorch starts a thread for every core of the machine in each engine, and its threads spin while they wait: two engines
on two cores then need a minute for what takes a second. It does not see the CPU quota of a container or a service, so
that is read here.
"""

import os
from collections.abc import Iterator
from pathlib import Path

_PERIOD = 100_000  # microseconds, what the kernel takes where a file says nothing of it


def openmp(engines: int, root: Path = Path("/")) -> dict[str, str]:
    """The environment of each of so many engines that compute at the same time."""
    cores = min([os.process_cpu_count() or 1, *_quotas(root)])
    return {"OMP_NUM_THREADS": str(max(1, int(cores) // engines)), "OMP_WAIT_POLICY": "passive"}


def _quotas(root: Path) -> Iterator[float]:
    """Processors' worth of time that this process's control groups are given, from its own up to the topmost."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = Path(path.lstrip("/"))
        for folder in (mount / group, *(mount / parent for parent in group.parents)):
            quota = _read(folder / "cpu.max").split() or [
                _read(folder / "cpu.cfs_quota_us").strip(),
                _read(folder / "cpu.cfs_period_us").strip(),
            ]
            if quota[0].isdecimal():
                yield int(quota[0]) / (int(quota[1]) if quota[1:] and quota[1].isdecimal() else _PERIOD)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
