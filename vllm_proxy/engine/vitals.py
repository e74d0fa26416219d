"""What the processes of an engine use, from /proc, and the shared memory that they leak when they are killed.

A process that vanishes, or may not be read, counts as nothing; but no shared memory is removed unless it is known that
no live process has it mapped.
"""

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from vllm_proxy.engine.ownership import Owned
from vllm_proxy.engine.proc import KERNEL, Process, open_files, read
from vllm_proxy.runtime import files

log = structlog.get_logger()

SHARED_MEMORY = "/dev/shm/"  # noqa: S108 - its files are told apart by `_SEGMENT`
_IO = re.compile(r"^(?:wchar|read_bytes): (\d+)$", re.MULTILINE)
_MEMORY = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)
_SHARED = re.compile(rf" {SHARED_MEMORY}([^\n/]+)$", re.MULTILINE)
_DELETED = " (deleted)"
_INCOMPLETE = ".incomplete"  # huggingface_hub's name for it
# What vLLM 0.32, torch, multiprocessing and NCCL call theirs; a file of weights is never called so.
_SEGMENT = re.compile(
    r"psm_[0-9a-f]{8}"  # multiprocessing.shared_memory
    r"|sem\.mp-[a-z0-9_]{8}"  # multiprocessing's locks and queues
    r"|sem\.loky-\d+-[a-z0-9_]{8}"  # joblib's, which transformers brings in through scikit-learn
    r"|torch_\d+_\d+_\d+"  # tensors that torch.multiprocessing shares
    r"|nccl-[A-Za-z0-9]{6}"
    r"|vllm_(?:mm_[\w-]{22}|engram_[a-z0-9_]{8}|(?:offload|ec)_[\w.-]{1,128}\.mmap)"
)


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine's processes do. `moved_bytes`: written anywhere, or read from disks, so far."""

    moved_bytes: int
    downloads: bool  # from the Hugging Face hub, right now


def work(owned: Owned) -> Work:
    """What an engine's live processes do."""
    moved = _sum(owned, lambda pid: _IO.findall(_text(pid, "io")))
    return Work(moved, any(_downloads(process.pid) for process in _processes(owned)))


def memory_bytes(owned: Owned) -> int:
    """Memory of an engine's processes that no file backs; what they share counts for each."""
    return 1024 * _sum(owned, lambda pid: _MEMORY.findall(_text(pid, "status")))


def shared_segments(owned: Owned) -> frozenset[str]:
    """The paths of the segments in /dev/shm that an engine's processes have mapped, as far as it can be seen."""
    try:
        return frozenset(SHARED_MEMORY + name for process in _processes(owned) for name in _segments_of(process.pid))
    except OSError:
        return frozenset()


def remove_segments(paths: Iterable[str], since: float) -> list[str]:
    """Remove what a dead engine left in /dev/shm; returns what was removed.

    That is: files directly in there that are called as vLLM's are, belong to this user, were made after `since`
    (seconds of the epoch), and are mapped by no live process.
    """
    names = {path.removeprefix(SHARED_MEMORY) for path in paths if path.startswith(SHARED_MEMORY)}
    wanted = sorted(name for name in names if _SEGMENT.fullmatch(name))
    if not wanted:
        return []
    try:
        folder = os.open(SHARED_MEMORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        log.warning("shared memory of a dead engine may be left", names=wanted, error=str(error))
        return []
    try:
        return _remove(folder, [name for name in wanted if _is_made_by_us(folder, name, since)])
    except OSError as error:
        log.warning("shared memory of a dead engine may be left", names=wanted, error=str(error))
        return []
    finally:
        os.close(folder)


def _remove(folder: int, names: list[str]) -> list[str]:
    if not names:  # the usual case
        return []
    in_use = {name for process in KERNEL.processes() for name in _segments_of(process.pid)}
    removed = []
    for name in names:
        if name not in in_use:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
                removed.append(SHARED_MEMORY + name)
    return removed


def _is_made_by_us(folder: int, name: str, since: float) -> bool:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        is_own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        return is_own and files.created_at(name, folder) >= since
    except FileNotFoundError:
        return False


def _segments_of(pid: int) -> set[str]:
    return {name for name in _SHARED.findall(_text(pid, "maps")) if not name.endswith(_DELETED)}


def _processes(owned: Owned) -> list[Process]:
    try:
        return owned.find()
    except OSError:
        return []


def _downloads(pid: int) -> bool:
    """Whether a process has a file open that huggingface_hub has not fetched whole yet."""
    try:
        return any(target.endswith(_INCOMPLETE) for target in open_files(pid))
    except OSError:
        return False


def _sum(owned: Owned, numbers: Callable[[int], list[str]]) -> int:
    try:
        return sum(int(number) for process in _processes(owned) for number in numbers(process.pid))
    except OSError:
        return 0


def _text(pid: int, name: str) -> str:
    return read(pid, name).decode("utf-8", "replace")
