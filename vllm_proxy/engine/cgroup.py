"""A cgroup (v2) for each engine, where systemd has delegated one to the daemon (`Delegate=yes`).

With it the kernel finds and kills what left the engine's session, and accounts for its memory where systemd has put the
daemon into a group of its own (`DelegateSubgroup=`). It is optional: nothing may depend on it, since engines that have
none are found by session and mark.
"""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import structlog

from vllm_proxy.engine.proc import KERNEL
from vllm_proxy.engine.process import until_gone

log = structlog.get_logger()

_PROC_SELF = Path("/proc/self")
_MOUNT = re.compile(r"^\S+ \S+ \S+ (?P<root>\S+) (?P<point>\S+) .* - cgroup2 ", re.MULTILINE)
_OWN = re.compile(r"^0::(/.*)$", re.MULTILINE)
_NAME = re.compile(r".+\.[0-9a-f]{8}")  # instance, then the end of the engine's own name
_MEMORY = re.compile(r"^(?:anon|shmem) (\d+)$", re.MULTILINE)


def own_cgroup(proc: Path = _PROC_SELF) -> Path | None:
    """The folder of this process's cgroup; None without cgroup v2."""
    try:
        path = _OWN.search((proc / "cgroup").read_text(encoding="utf-8"))
        mount = _MOUNT.search((proc / "mountinfo").read_text(encoding="utf-8"))
    except OSError:
        return None
    if path is None or mount is None or not path[1].startswith(mount["root"]):
        return None
    return Path(mount["point"], path[1].removeprefix(mount["root"]).lstrip("/"))


def delegated(own: Path | None, is_marked: Callable[[Path], bool], uid: int) -> Path | None:
    """The group that this process may divide: its own, or the one above where systemd put it into a subgroup.

    `is_marked`: whether systemd has marked a group as delegated, which it does since version 251. Before, a group of a
    system service that belongs to the service's user `uid` is one.
    """
    if own is None:
        return None
    for group in (own, own.parent):
        if is_marked(group):
            return group
    try:
        is_mine = uid != 0 and own.stat().st_uid == uid
    except OSError:
        return None
    below_a_user = any(part.startswith("user@") for part in own.parts)  # all of it is the user's there
    return own if is_mine and not below_a_user else None


def _is_marked(group: Path) -> bool:
    try:
        return os.getxattr(group, "user.delegate") == b"1"
    except OSError:
        return False


class Cgroups:
    """The groups of all engines."""

    def __init__(self, root: Path | None) -> None:
        self._root = root

    @classmethod
    def find(cls) -> "Cgroups":
        """Below what is delegated to this process, with memory accounted for where that is possible."""
        own = own_cgroup()
        root = delegated(own, _is_marked, os.geteuid())
        if root is not None and root != own:  # else no controller may be enabled: the group holds processes
            with contextlib.suppress(OSError):  # there is no such controller
                (root / "cgroup.subtree_control").write_text("+memory", encoding="utf-8")
        return cls(root)

    def create_group(self, name: str, pid: int) -> str:
        """Make a group and move a process into it; its path, or nothing where that cannot be done."""
        if self._root is None:
            return ""
        group = self._root / name
        try:
            group.mkdir()
            (group / "cgroup.procs").write_text(str(pid), encoding="utf-8")
        except OSError as error:
            log.warning("an engine gets no cgroup of its own", cgroup=str(group), error=str(error))
            with contextlib.suppress(OSError):
                group.rmdir()
            return ""
        return str(group)


def memory_bytes(group: str) -> int:
    """Memory of a group that no file backs; 0 where the kernel does not account for it."""
    if not group:
        return 0
    try:
        stat = Path(group, "memory.stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    return sum(int(number) for number in _MEMORY.findall(stat))


async def end(group: str) -> bool:
    """Kill every process of a group, reap what is ours, and remove the group.

    True when nothing is left; False where something lives on, or the group is none of ours: that is logged.

    Raises:
        OSError: that cannot be determined, or nothing in it may be killed.

    """
    if not group:
        return True
    if not is_engines(group):
        log.error("a cgroup is not one of an engine and is left alone", cgroup=group)
        return False
    strays = set[int]()

    async def sweep() -> tuple[bool, OSError | None]:
        try:
            if not _is_populated(group):
                return True, None
            strays.update(KERNEL.members(group))
            _kill(group)
        except FileNotFoundError:  # systemd removes what is empty when the unit stops
            return True, None
        except OSError as error:
            return False, error
        return False, None

    if not await until_gone(sweep):
        log.error("processes do not die", cgroup=group, pids=sorted(strays))
        return False
    for pid in strays:
        KERNEL.reap(pid)
    _remove(group)
    return True


def is_engines(group: str) -> bool:
    """Whether a group may be one that was made for an engine: by its name, which no unit of systemd's bears."""
    path = Path(group)
    return path.is_absolute() and ".." not in path.parts and _NAME.fullmatch(path.name) is not None


def name_of(instance: str, own_name: str) -> str:
    """The name of an engine's group."""
    return f"{instance}.{own_name[-8:]}"


def _is_populated(group: str) -> bool:
    return "populated 1" in Path(group, "cgroup.events").read_text(encoding="utf-8")


def _remove(group: str) -> None:
    try:
        Path(group).rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("the cgroup of an engine cannot be removed", cgroup=group, error=str(error))


def _kill(group: str) -> None:
    Path(group, "cgroup.kill").write_text("1", encoding="utf-8")
