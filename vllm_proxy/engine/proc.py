"""Reads /proc. The only module that signals and reaps processes.

What cannot be read is an OSError, never an absence: the caller would take the process for ended. Which processes are an
engine's is proven in `ownership`.
"""

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PAGE = 4096  # more than such a line has
PID_LIMIT = 2**22  # the kernel's own; 0, 1 and what is above name no engine

_FIRST_PID_NAMESPACE = f"pid:[{0xEFFFFFFC}]"  # PROC_PID_INIT_INO: the same in every kernel
_NO_PROCESS = {errno.ESRCH, errno.EINVAL, errno.ENOENT}  # the latter: the number is a thread's now


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc. `started` is in clock ticks since boot, which with the pid names a process for good.

    Of another user's process that /proc hides (`hidepid=1`) the session alone is known: `started` is 0.
    """

    pid: int
    alive: bool  # false: a zombie, waiting to be reaped
    parent: int
    session: int
    started: int


def boot_id() -> str:
    """The kernel's name of this boot: pids mean nothing beyond it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def pid_namespace() -> str:
    """The kernel's name of the namespace that this process counts pids in; "" where it cannot be read."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def is_first_pid_namespace() -> bool:
    """Whether pids of this process's namespace are the machine's own, which drivers report."""
    return pid_namespace() == _FIRST_PID_NAMESPACE


def look_up(pid: int) -> Process | None:
    """The process with this pid, None where there is none.

    Raises:
        OSError: when that cannot be determined.

    """
    if not 0 < pid <= PID_LIMIT:
        return None
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123 - hundreds at once: a third of the time
            stat = file.read(_PAGE)
    except (FileNotFoundError, PermissionError) as error:  # hidden (`hidepid=2`, `hidepid=1`), or not there at all
        if _may_be_signalled(pid):
            raise PermissionError(errno.EACCES, "/proc hides a process of this user's own", str(pid)) from error
        return None  # a process of another user is no engine's
    except ProcessLookupError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the command in front may hold spaces and parentheses
    # A first thread that is dead while others live makes no dead process: the memory, on GPUs too, is still taken.
    alive = fields[0] not in b"ZX" or int(fields[17]) > 1
    return Process(pid, alive, int(fields[1]), int(fields[3]), int(fields[19]))


def _may_be_signalled(pid: int) -> bool:
    """Whether there is such a process, of this user's: /proc may hide it, the kernel does not."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


class Kernel:
    """Every process of this pid namespace."""

    def __init__(self) -> None:
        self.waited_for: set[int] = set()  # children whose exit belongs to who started them

    @property
    def own_pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def processes(self) -> list[Process]:
        """All of them, zombies included.

        Raises:
            OSError: when /proc cannot be read.

        """
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - as above
        return [found for pid in pids if (found := self.find(pid))]

    def find(self, pid: int) -> Process | None:
        """As `look_up`, of a process that /proc hides too."""
        try:
            return look_up(pid) or _hidden(pid)
        except PermissionError:
            return _hidden(pid)

    def look_up(self, pid: int) -> Process | None:
        """As the function of this name."""
        return look_up(pid)

    def environment(self, pid: int) -> bytes:
        """What a process was started with, NAME=VALUE with a NUL behind each; empty where it may not be read.

        Raises:
            OSError: when that cannot be determined.

        """
        return read(pid, "environ")

    def sockets(self, pid: int) -> frozenset[int]:
        """The inodes of the sockets that a process has open; none where they may not be seen.

        Raises:
            OSError: when that cannot be determined.

        """
        found = (target[8:-1] for target in open_files(pid) if target.startswith("socket:["))
        return frozenset(map(int, found))

    def members(self, group: str) -> frozenset[int]:
        """The processes of a cgroup; none where there is no such group.

        Raises:
            OSError: when that cannot be determined.

        """
        if not group:
            return frozenset()
        try:
            lines = Path(group, "cgroup.procs").read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return frozenset()
        return frozenset(int(line) for line in lines) - {0}  # what was brought in from outside of the namespace

    def send(self, pid: int, number: signal.Signals, is_it: Callable[[Process], bool]) -> bool:
        """Send a signal to a process of which `is_it` holds; False when it is gone, or is another one by now.

        Raises:
            OSError: when that cannot be determined, or the process may not be signalled.

        """
        if pid == self.own_pid or (fd := open_pidfd(pid)) is None:
            return False
        try:
            # After the open, to avoid a pid reuse race: descriptor and line are of the same process.
            process = self.find(pid)
            if process is None or not process.alive or not is_it(process):
                return False
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    def reap(self, pid: int) -> None:
        """Reap a dead child, unless its exit is awaited elsewhere; does nothing for a process that is no child."""
        if pid not in self.waited_for:
            with contextlib.suppress(ChildProcessError):  # somebody else's: init reaps it
                os.waitpid(pid, os.WNOHANG)

    def has_dead_child(self) -> bool:
        """Whether any child waits to be reaped. Costs one call to the kernel, and reaps nothing."""
        try:
            return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return False


def open_pidfd(pid: int) -> int | None:
    """A descriptor that refers to this very process, whatever its pid is reused for; None where there is none.

    Raises:
        OSError: when there is no descriptor to be had.

    """
    if not 1 < pid <= PID_LIMIT:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in _NO_PROCESS:
            return None
        raise


def _hidden(pid: int) -> Process | None:
    """What the kernel reveals of a process that /proc hides."""
    if pid <= 0:  # it would be this one
        return None
    try:
        return Process(pid, alive=True, parent=0, session=os.getsid(pid), started=0)
    except OSError:
        return None


def read(pid: int, name: str) -> bytes:
    """A file of a process in /proc; empty where the process is gone or may not be looked at.

    Raises:
        OSError: when that cannot be determined.

    """
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def open_files(pid: int) -> list[str]:
    """What a process has open, as /proc/PID/fd shows it; nothing where it is gone or may not be looked at.

    Raises:
        OSError: when that cannot be determined.

    """
    found = []
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(str(descriptor.readlink()))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
    return found


KERNEL = Kernel()
