"""Proves which live processes belong to an engine, so that no other process is ever signalled.

A pid, and with it the number of a session, is reused, so neither proves anything (a race with every signal). A process
is an engine's when its environment carries the engine's own mark, or it is in the engine's own cgroup, or it is the
first process with the recorded start, or in its session while that one is there (as a zombie too: its number is not
reused then), or a descendant of one of these. What was proven once stays proven: pid and start identify a process. What
is not proven is somebody else's (tests/engine/test_ownership.py).
"""

import os
import signal
import struct
import sys
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from vllm_proxy.domain.address import Address, TcpAddress, UnixAddress
from vllm_proxy.engine.proc import KERNEL, Kernel, Process
from vllm_proxy.engine.sock_diag import LISTENS, tcp_sockets

_TCP_LISTENS = "0A"
_UNIX_LISTENS = 1 << 16  # __SO_ACCEPTCON


@dataclass(frozen=True, slots=True)
class Identity:
    """What an engine's processes are known by. `started` as in `proc.Process`; pid 0: not known."""

    pid: int  # of the first process, which leads its session
    started: int
    mark: str = ""  # in the environment of each process, as `command.mark` makes it
    cgroup: str = ""  # the folder of its own, where it has one


class Owned:
    """The processes of one engine, as they come and go."""

    def __init__(self, identity: Identity, kernel: Kernel = KERNEL) -> None:
        self.identity = identity
        self.kernel = kernel
        self._mark = identity.mark.encode()
        self._proven: frozenset[tuple[int, int]] = frozenset()  # pid and start
        self._unmarked: frozenset[tuple[int, int]] = frozenset()  # whose environment was read
        self._find_lock = threading.Lock()

    def first(self) -> Process | None:
        """The first process itself, as a zombie too; None when it is gone.

        Raises:
            OSError: when that cannot be determined.

        """
        found = self.kernel.look_up(self.identity.pid)
        return found if found and found.started == self.identity.started else None

    def find(self) -> list[Process]:
        """Every process of the engine, zombies included. Takes milliseconds: not for the event loop.

        Raises:
            OSError: when that cannot be determined; whatever lives then still does.

        """
        with self._find_lock:
            there = {process.pid: process for process in self.kernel.processes() if self._may_be(process)}
            # Read after the table, to avoid a race: a process that got its pid only then is not the one in the table.
            first, grouped = self.first(), self.kernel.members(self.identity.cgroup)
            keys = {(process.pid, process.started) for process in there.values()}
            self._unmarked &= keys
            found = {pid: process for pid, process in there.items() if self._is_proven(process, first, grouped)}
            _add_descendants(found, there)
            self._proven = frozenset(_key(process) for process in found.values() if process.started)
            return list(found.values())

    def owns(self, pid: int) -> bool:
        """Whether a process is the engine's. Reads no more than it and those above it: not for the event loop.

        Raises:
            OSError: when that cannot be determined.

        """
        with self._find_lock:
            line = self._line(pid)
            first, grouped = self.first(), self.kernel.members(self.identity.cgroup)  # after the others, as in `find`
            return any(self._is_proven(process, first, grouped) for process in line)

    def send(self, process: Process, number: signal.Signals) -> bool:
        """Send a signal to a process that `find` has found; False when it is gone.

        Raises:
            OSError: when it cannot be verified that it is still the same, or it may not be signalled.

        """
        return self.kernel.send(process.pid, number, self._is_still)

    def send_to_first(self, number: signal.Signals) -> bool:
        """Send a signal to the first process; False when it is gone.

        Raises:
            OSError: as `send`.

        """
        return self.kernel.send(self.identity.pid, number, lambda found: found.started == self.identity.started)

    def listens_on(self, address: Address) -> bool:
        """Whether all that takes connections to `address` is the engine's. Not for the event loop.

        Raises:
            OSError: when that cannot be determined.

        """
        wanted = listeners(address)
        if not wanted:
            return False
        # The first process most often holds it: known without a look at all others. All that listen must be known.
        held = self.kernel.sockets(self.identity.pid)
        if wanted <= held and self.first() is not None:  # read after its sockets: they are those of no later process
            return True
        for process in self.find():
            wanted -= self.kernel.sockets(process.pid)
            if not wanted:
                return True
        return False

    def _may_be(self, process: Process) -> bool:
        """Nothing of an engine is older than its first process; where its start is hidden, its session decides."""
        return process.pid != self.kernel.own_pid and (not process.started or process.started >= self.identity.started)

    def _line(self, pid: int) -> list[Process]:
        """A process, its parent, that one's parent, and so on, as far as they may be the engine's."""
        line: list[Process] = []
        process = self.kernel.look_up(pid)
        while process is not None and process.started and self._may_be(process):
            if process in line or (line and process.started > line[-1].started):  # it has the number of another
                break
            line.append(process)
            process = self.kernel.look_up(process.parent)
        return line

    def _is_proven(self, process: Process, first: Process | None, grouped: frozenset[int]) -> bool:
        """Whether it is the engine's by itself, whoever its parent is."""
        return (
            _key(process) in self._proven
            or process == first
            or (first is not None and process.session == first.pid)
            or process.pid in grouped
            or self._is_marked(process)
        )

    def _is_marked(self, process: Process) -> bool:
        key = _key(process)
        if not self._mark or not process.started or not process.alive or key in self._unmarked:
            return False
        if self._mark in self.kernel.environment(process.pid).split(b"\0"):
            return True
        self._unmarked |= {key}
        return False

    def _is_still(self, process: Process) -> bool:
        if process.started:
            return _key(process) in self._proven
        first = self.first()
        return first is not None and process.session == first.pid


def _key(process: Process) -> tuple[int, int]:
    return process.pid, process.started


def _add_descendants(found: dict[int, Process], there: Mapping[int, Process]) -> None:
    """Who has a parent among the found ones is found too. A parent younger than its child has the number of another."""
    grew = True
    while grew:
        grew = False
        for pid, process in there.items():
            parent = found.get(process.parent)
            if pid not in found and parent is not None and parent.started <= process.started and parent.started:
                found[pid] = process
                grew = True


def listeners(address: Address) -> frozenset[int]:
    """The inodes of the sockets that a connection to `address` may come to.

    Raises:
        OSError: when that cannot be determined.

    """
    match address:
        case TcpAddress(host, port):
            return _tcp_listeners(host, port)
        case UnixAddress(path):
            return _unix_listeners(path)


def _tcp_listeners(host: str, port: int) -> frozenset[int]:
    reached = _arrivals(host)
    try:
        return frozenset(found.inode for found in tcp_sockets(LISTENS, port) if found.local in reached)
    except (OSError, struct.error):  # netlink is not allowed, or has no sock_diag
        return _tcp_listeners_of_tables({_printed(local) for local in reached}, port)


def _tcp_listeners_of_tables(reached: Collection[str], port: int) -> frozenset[int]:
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", table).read_text(encoding="utf-8").splitlines()[1:]
        except FileNotFoundError:  # a kernel without IPv6
            continue
        for line in lines:
            fields = line.split()
            local, _, number = fields[1].rpartition(":")
            if fields[3] == _TCP_LISTENS and int(number, 16) == port and local in reached:
                found.add(int(fields[9]))
    return frozenset(found)


def _arrivals(host: str) -> frozenset[bytes]:
    """Packed local addresses that accept connections to an IP address: itself, and wildcards."""
    try:
        to = ip_address(host)
    except ValueError as error:
        raise OSError(f"cannot tell who listens at a name: {error}") from error
    every: list[IPv4Address | IPv6Address] = [to, IPv6Address(0)]
    if isinstance(to, IPv4Address):  # an IPv6 socket may take those of IPv4 too
        every += [IPv4Address(0), *(IPv6Address(f"::ffff:{v4}") for v4 in (to, IPv4Address(0)))]
    return frozenset(local.packed for local in every)


def _printed(address: bytes) -> str:
    """As /proc/net has it: word by word, as numbers of this machine."""
    words = (address[at : at + 4] for at in range(0, len(address), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)


def _unix_listeners(path: str) -> frozenset[int]:
    lines = Path("/proc/net/unix").read_bytes().split(b"\n")[1:]
    # Num RefCount Protocol Flags Type St Inode Path
    found = (fields for line in lines if (fields := line.split(maxsplit=7))[7:] == [os.fsencode(path)])
    return frozenset(int(fields[6]) for fields in found if int(fields[3], 16) & _UNIX_LISTENS)
