"""What an engine's processes use, read from /proc, and the shared memory that they leave behind.

Its one rule: a process that ends while it is looked at, or may not be looked at, counts as nothing.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_proxy.engine.process import members

_PROC = Path("/proc")
_IO = re.compile(r"^(?:wchar|read_bytes): (\d+)$", re.MULTILINE)
_MEMORY = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)
_SHARED = re.compile(r" (/dev/shm/[^\n]+)$", re.MULTILINE)
_DELETED = " (deleted)"
_INCOMPLETE = ".incomplete"  # huggingface_hub's name for it


@dataclass(frozen=True, slots=True)
class Work:
    """What a session's processes do. `moved_bytes`: written anywhere, or read from disks, so far."""

    moved_bytes: int
    downloads: bool  # from the Hugging Face hub, right now


def work(session: int, started: int) -> Work:
    """What a session's live processes do."""
    moved = _sum(session, started, lambda pid: _IO.findall(_read(pid, "io")))
    return Work(moved, any(_downloads(process.pid) for process in members(session, started)))


def memory_bytes(session: int, started: int) -> int:
    """Memory of a session's processes that no file backs; what they share counts for each."""
    return 1024 * _sum(session, started, lambda pid: _MEMORY.findall(_read(pid, "status")))


def shared_segments(session: int, started: int) -> frozenset[str]:
    """The files in /dev/shm that a session's processes have mapped."""
    return frozenset(name for process in members(session, started) for name in _segments_of(process.pid))


def remove_segments(names: Iterable[str]) -> list[str]:
    """Remove what a dead session left in /dev/shm, unless a live process maps it too; returns what was removed."""
    left = [name for name in sorted(names) if os.path.lexists(name)]
    if not left:  # the usual case: nothing more to look at
        return []
    pids = (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
    in_use = {name for pid in pids for name in _segments_of(pid)}
    removed = []
    for name in left:
        if name not in in_use:
            try:
                Path(name).unlink()
            except OSError:
                continue
            removed.append(name)
    return removed


def _segments_of(pid: int) -> set[str]:
    return {name for name in _SHARED.findall(_read(pid, "maps")) if not name.endswith(_DELETED)}


def _downloads(pid: int) -> bool:
    """Whether a process has a file open that huggingface_hub has not fetched whole yet."""
    try:
        descriptors = list((_PROC / str(pid) / "fd").iterdir())
    except OSError:
        return False
    return any(_target(descriptor).endswith(_INCOMPLETE) for descriptor in descriptors)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def _sum(session: int, started: int, numbers: Callable[[int], list[str]]) -> int:
    return sum(int(number) for process in members(session, started) for number in numbers(process.pid))


def _read(pid: int, name: str) -> str:
    try:
        return (_PROC / str(pid) / name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
