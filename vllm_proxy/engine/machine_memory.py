"""The machine's own memory: in total and available, and as vLLM for CPUs counts it.

vLLM 0.32 takes the memory of one NUMA node, limited by the memory cgroup that it sees at the usual place
(`vllm/utils/cpu_resource_utils.py`): here it is counted in the same way, so that both come to the same sums
(tests/real/test_devices.py).
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_proxy.domain.inventory import Seen
from vllm_proxy.domain.ledger import Kind
from vllm_proxy.engine.device_source import Sight, SourceError
from vllm_proxy.engine.ownership import Owned

NAME = "cpu"
ROOT = Path("/")
_NODE = "sys/devices/system/node/node0/meminfo"
# The limit and what is used of it, in version 2 of cgroups and in version 1; the first that has a limit counts.
_CGROUP_FILES = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_AVAILABLE = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")  # of a node, which has no MemAvailable


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the machine, or of a part of it."""

    total: int
    available: int


class MachineMemory:
    """The source "cpu": NUMA node 0, as vLLM counts it."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    def look(self, _: Mapping[str, Owned], /) -> Sight:
        """One device, of which nobody knows who holds what: memory is shared, and what is cached counts as available.

        Raises:
            SourceError: it has no memory, or its figures make no sense.
            OSError: the kernel does not tell.

        """
        memory = node_memory(self._root)
        if memory.total <= 0:
            raise SourceError("NUMA node 0 has no memory")
        seen = Seen(NAME, NAME, None, "NUMA node 0", Kind.MEMORY, unified=False, total=memory.total,
                    free=min(memory.available, memory.total))  # fmt: skip
        return Sight((seen,))

    def close(self) -> None:
        """Nothing is open."""


def node_memory(root: Path = ROOT) -> Memory:
    """Of NUMA node 0, within the limit of the cgroup.

    Raises:
        SourceError: its figures make no sense.
        OSError: the kernel does not tell.

    """
    try:
        figures = _figures(root / _NODE, 2)  # "Node 0 MemTotal: 97421888 kB"
    except FileNotFoundError:  # a kernel without NUMA
        return machine_memory(root)
    total = _figure(figures, "MemTotal")
    available = sum(_figure(figures, name) for name in _AVAILABLE)
    limit, used = _cgroup_memory(root)
    if limit is not None and limit < total:
        total, available = limit, max(0, min(available, limit - used))
    return Memory(total, available)


def machine_memory(root: Path = ROOT) -> Memory:
    """Of the whole machine.

    Raises:
        SourceError: its figures make no sense.
        OSError: the kernel does not tell.

    """
    figures = _figures(root / "proc/meminfo", 0)  # "MemTotal: 97421888 kB"
    return Memory(_figure(figures, "MemTotal"), _figure(figures, "MemAvailable"))


def _figures(path: Path, skipped: int) -> dict[str, int]:
    """Bytes by name. `skipped`: words in front of each name."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()[skipped:]
        if len(words) >= 2 and words[1].isdecimal():
            found[words[0].rstrip(":")] = int(words[1]) * 1024
    return found


def _figure(figures: Mapping[str, int], name: str) -> int:
    if name not in figures:
        raise SourceError(f"the kernel does not report {name} of its memory")
    return figures[name]


def _cgroup_memory(root: Path) -> tuple[int | None, int]:
    """The limit, and what is used. None where there is none; version 1 has a very large one then."""
    for limit_file, used_file in _CGROUP_FILES:
        limit = _number(root / limit_file)
        if limit is not None:
            return limit, _number(root / used_file) or 0
    return None, 0


def _number(path: Path) -> int | None:
    """None where there is no such file, or something else in it, such as "max"."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text(encoding="utf-8"))
    return None
