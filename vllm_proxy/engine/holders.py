"""Tells whose the processes are that a driver lists on a device: an engine's of ours, or another program.

Only those are looked up that the driver lists, and each once while the engines are the same. A driver may report the
machine's own pids to a container, where they name nobody, or somebody else: so there no process is called foreign until
one of ours was found by its pid (tests/engine/test_holders.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from vllm_proxy.domain.inventory import Foreign
from vllm_proxy.engine.ownership import Identity, Owned
from vllm_proxy.engine.proc import KERNEL, Kernel, Process, is_first_pid_namespace, read

_UNNAMED = "another program"  # of another user, hidden by /proc


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds memory of one device. As it is by default, nothing is known of it."""

    held: Mapping[str, int] = field(default_factory=dict)  # by instance of ours
    foreign: tuple[Foreign, ...] = ()  # by name


class Programs:
    """The programs on all devices. Not for the event loop."""

    def __init__(self, kernel: Kernel = KERNEL, *, pids_are_ours: bool | None = None) -> None:
        self._kernel = kernel
        self._pids_are_ours = is_first_pid_namespace() if pids_are_ours is None else pids_are_ours
        self._engines: Mapping[str, Identity] = {}
        self._instances: dict[Process, str | None] = {}  # None: it is no engine's

    def holders(self, listed: Mapping[str, Mapping[int, int]], engines: Mapping[str, Owned]) -> dict[str, Holders]:
        """Who holds what, by device. `listed`: bytes by pid, by device; `engines`: those that run, by instance."""
        found = {pid: process for pid in _pids(listed) if (process := self._kernel.find(pid)) is not None}
        self._sort(found.values(), engines)
        owners = {pid: self._instances[process] for pid, process in found.items() if process in self._instances}
        self._pids_are_ours = self._pids_are_ours or any(owner is not None for owner in owners.values())
        names = {pid: name_of(pid) for pid, owner in owners.items() if owner is None and self._pids_are_ours}
        return {device: _holders(sizes, owners, names) for device, sizes in listed.items()}

    def _sort(self, processes: Iterable[Process], engines: Mapping[str, Owned]) -> None:
        """Learn whose they are. Of whom that cannot be told nothing is noted: it counts for nobody."""
        identities = {instance: owned.identity for instance, owned in engines.items()}
        known = self._instances if identities == self._engines else {}
        self._engines, self._instances = identities, {}
        for process in processes:
            if process in known:
                self._instances[process] = known[process]
                continue
            try:
                owner = next((instance for instance, owned in engines.items() if owned.owns(process.pid)), None)
            except OSError:
                continue
            self._instances[process] = owner


def name_of(pid: int) -> str:
    """What a program is called, in printable characters; never its arguments, which may hold secrets."""
    try:
        name = read(pid, "comm") or PurePath(_first_word(read(pid, "cmdline"))).name.encode()
    except OSError:
        return _UNNAMED
    text = "".join(char if char.isprintable() else "?" for char in name.decode("utf-8", "replace").strip())
    return text or _UNNAMED


def _first_word(cmdline: bytes) -> str:
    """Of a command line; programs that write a title of their own put all of it into the first argument."""
    words = cmdline.split(b"\0")[0].split()
    return words[0].decode("utf-8", "replace") if words else ""


def _pids(listed: Mapping[str, Mapping[int, int]]) -> set[int]:
    return {pid for sizes in listed.values() for pid in sizes}


def _holders(sizes: Mapping[int, int], owners: Mapping[int, str | None], names: Mapping[int, str]) -> Holders:
    held: dict[str, int] = {}
    for pid, size in sizes.items():
        if (owner := owners.get(pid)) is not None:
            held[owner] = held.get(owner, 0) + size
    foreign = [Foreign(pid, names[pid], size) for pid, size in sizes.items() if pid in names]
    return Holders(held, tuple(sorted(foreign, key=lambda one: (one.name, one.pid))))
