"""One engine's processes: started in a session of their own, watched, and ended to the last one.

Its one rule: nothing that was started here is left unburied. vLLM's first process (the API server) starts others
that outlive it; all of them stay in the session that the first one leads, which is how they are found.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import subprocess
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from vllm_proxy.domain.diagnose import Exit
from vllm_proxy.engine import clock
from vllm_proxy.engine.background import ask

log = structlog.get_logger()

_PR_SET_CHILD_SUBREAPER = 36
SWEEP_SECONDS = 0.02
_NO_PROCESS = {errno.ESRCH, errno.EINVAL, errno.ENOENT}  # the latter: the number is a thread's now
KILL_SECONDS = 15.0  # a process that survives SIGKILL for this long hangs in the kernel
# The engine waits for one line before it becomes the engine, so that it is on record before it does anything:
# a daemon that is killed in between leaves a shell that ends by itself.
_GATE = 'read -r go && exec "$0" "$@" </dev/null'


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc. `started` is in clock ticks since boot, which with the pid names a process for good."""

    pid: int
    alive: bool  # false: a zombie, waiting to be reaped
    session: int
    started: int


def boot_id() -> str:
    """The kernel's name of this boot: pids mean nothing beyond it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def look_up(pid: int) -> Process | None:
    """The process with this pid, None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the command in front may hold spaces and parentheses
    # A first thread that is dead while others live makes no dead process: the memory, on GPUs too, is still taken.
    alive = fields[0] not in "ZX" or int(fields[17]) > 1
    return Process(pid, alive, int(fields[3]), int(fields[19]))


def members(session: int, started: int) -> list[Process]:
    """Every process of the session that `session` led when it started at `started`, zombies included.

    A pid is not given away while a session bears it, so a leader with another start time means a later session.
    """
    leader = look_up(session)
    if leader is not None and leader.started != started:
        return []
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    found = (look_up(pid) for pid in pids)
    return [process for process in found if process and process.session == session and process.started >= started]


def adopt_orphans() -> None:
    """Become the parent of every process whose own parent dies below this one, to be able to reap it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")


async def to_the_end[**P, T](work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await `work(...)` to its end whatever is cancelled meanwhile; the cancellation is raised behind it."""
    task = ask(work(*args, **kwargs), getattr(work, "__qualname__", "to the end"))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


async def end_session(session: int, started: int, grace_seconds: float) -> bool:
    """End every process of a session: SIGTERM to its leader, after the grace SIGKILL to all. True when none is left.

    vLLM's workers die at once on a SIGTERM of their own, so only the leader gets one.
    """
    loop = asyncio.get_running_loop()
    if _signal(session, started, signal.SIGTERM):
        began = loop.time()
        while clock.elapsed(began) < grace_seconds and is_alive(session, started):  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(SWEEP_SECONDS)
    deadline = loop.time() + KILL_SECONDS
    while left := await asyncio.to_thread(members, session, started):
        for process in left:
            if process.alive:
                _signal(process.pid, process.started, signal.SIGKILL)
            elif process.pid != session:  # the leader's exit code belongs to who started it
                with contextlib.suppress(ChildProcessError):  # somebody else's child: init reaps it
                    os.waitpid(process.pid, os.WNOHANG)  # noqa: ASYNC222 - does not wait
        if not any(process.alive for process in left):
            return True
        if loop.time() > deadline:
            log.error("processes do not die", pids=[process.pid for process in left if process.alive])
            return False
        await asyncio.sleep(SWEEP_SECONDS)
    return True


def is_alive(pid: int, started: int) -> bool:
    """Whether exactly this process lives."""
    process = look_up(pid)
    return process is not None and process.alive and process.started == started


def _signal(pid: int, started: int, number: signal.Signals) -> bool:
    """Send a signal to exactly this process; False when it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in _NO_PROCESS:
            return False
        raise
    try:
        # Behind the open: the descriptor and the line speak of the same process.
        if not is_alive(pid, started):
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


class EngineProcess:
    """The first process of an engine: a child of this daemon, or of an earlier one."""

    def __init__(self, pid: int, started: int, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self.started = started
        self._child = child
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self._pidfd = pidfd
        loop.add_reader(pidfd, self._reap)

    @classmethod
    def adopt(cls, pid: int, started: int) -> "EngineProcess | None":
        """The process that an earlier daemon started; None where it is gone."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in _NO_PROCESS:
                return None
            raise
        # Behind the open: the descriptor and the line speak of the same process.
        if not is_alive(pid, started):
            os.close(pidfd)
            return None
        return cls(pid, started, pidfd, None)

    @classmethod
    def spawn(cls, argv: Sequence[str], env: Mapping[str, str], folder: Path, log_file: Path) -> "EngineProcess":
        """Start `argv` in `folder`, output appended to `log_file` (mode 0600). It does nothing before `release`.

        Raises:
            OSError: when the log cannot be opened or no process can be made.

        """
        output = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            child = subprocess.Popen(
                ["/bin/sh", "-c", _GATE, *argv],
                env=env,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(output)
        stat = look_up(child.pid)
        assert stat is not None, "a child is there until it is reaped"
        return cls(child.pid, stat.started, os.pidfd_open(child.pid), child)

    def release(self) -> None:
        """Let it become the engine."""
        assert self._child is not None, "an adopted engine was let go long ago"
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at the gate: `exited` tells
            self._child.stdin.write(b"\n")
            self._child.stdin.close()

    def leave(self) -> None:
        """Look away: it goes on, for the next daemon."""
        if self.exited.done():
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._child is not None:
            self._child.returncode = 0  # Popen warns of a child that nobody waited for

    async def end(self, grace_seconds: float) -> bool:
        """End it with all that it started, and reap; True when nothing is left."""
        if self._child is not None and self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
        emptied = await end_session(self.pid, self.started, grace_seconds)
        if emptied:
            await self.exited
        return emptied

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        # It returns at once: the descriptor says that it ended. How a stranger's child ended, its parent alone learns.
        code = None if self._child is None else self._child.wait()
        if not self.exited.done():
            self.exited.set_result(Exit(code, None) if code is None or code >= 0 else Exit(None, -code))
