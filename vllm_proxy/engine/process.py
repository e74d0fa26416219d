"""The processes of one engine: started in a session of their own, watched by a pidfd, ended and reaped to the last.

vLLM's first process (the API server) starts others that outlive it; `ownership` proves which. Nothing that was started
here may stay unreaped. Also reaps the orphans that this process inherits as a subreaper.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import structlog

from vllm_proxy.domain.diagnose import Exit
from vllm_proxy.engine.ownership import Identity, Owned
from vllm_proxy.engine.proc import KERNEL, Kernel, Process, look_up, open_pidfd
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import spawn

log = structlog.get_logger()

_PR_SET_CHILD_SUBREAPER = 36
_SWEEP_SECONDS = 0.002  # what SIGKILL ends is gone in milliseconds, unless it has much memory to give back
_LONGEST_SWEEP_SECONDS = 0.5
_GRACE_SECONDS = 0.02  # between two looks whether what got a SIGTERM has ended
_KILL_SECONDS = 15.0  # a process that survives SIGKILL for this long hangs in the kernel
_REAP_SECONDS = 2.0
# The engine waits for one line before it becomes the engine, so that it is on record before it does anything:
# a daemon that is killed in between leaves a shell that ends by itself.
_WAIT_FOR_RELEASE = 'read -r go && exec "$0" "$@" </dev/null'

# Kills what it finds; says whether nothing lived any more, and what stood in its way.
type Sweep = Callable[[], Awaitable[tuple[bool, OSError | None]]]


def become_subreaper() -> None:
    """Have orphans among our descendants reparented to this process (a child subreaper), to be able to reap them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")


async def run_shielded[**P, T](work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await `work(...)` to its end, shielded from cancellation, which is raised afterwards."""
    task = spawn(work(*args, **kwargs), getattr(work, "__qualname__", "to the end"))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


async def end_processes(
    identity: Identity, grace_seconds: float, kernel: Kernel = KERNEL, patience: float = _KILL_SECONDS
) -> bool:
    """End an engine's processes: SIGTERM to the first one, after the grace SIGKILL to all. True when none is left.

    vLLM's workers die at once on a SIGTERM of their own, so only the first process gets one. False: something has
    survived SIGKILL for `patience` seconds.

    Raises:
        OSError: something may not be signalled, or what is left could not be determined for so long.

    """
    loop, owned = asyncio.get_running_loop(), Owned(identity, kernel)
    if grace_seconds > 0:
        await _find_processes(owned)  # who has left the session is known by its parent while that one lives
        with contextlib.suppress(OSError):  # the sweep below reports what is left
            if owned.send_to_first(signal.SIGTERM):
                began = loop.time()
                while clock.elapsed(began) < grace_seconds and _may_live(owned):  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(_GRACE_SECONDS)
    return await until_gone(partial(_sweep, owned), patience)


def is_alive(identity: Identity) -> bool:
    """Whether the first process of an engine is known to live; False also where it cannot be read."""
    try:
        first = Owned(identity).first()
    except OSError:
        return False
    return first is not None and first.alive


def _may_live(owned: Owned) -> bool:
    try:
        first = owned.first()
    except OSError:
        return True
    return first is not None and first.alive


async def until_gone(sweep: Sweep, patience: float = _KILL_SECONDS) -> bool:
    """Sweep again and again until nothing is left; False: something has survived SIGKILL for `patience` seconds.

    Raises:
        OSError: something may not be killed, or what is left could not be determined for so long.

    """
    loop = asyncio.get_running_loop()
    deadline, pause = loop.time() + patience, _SWEEP_SECONDS
    while True:
        gone, problem = await sweep()
        if gone and problem is None:
            return True
        is_late = loop.time() > deadline
        if problem is not None and (is_late or isinstance(problem, PermissionError)):
            raise problem
        if is_late:
            return False
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_SWEEP_SECONDS)


async def _sweep(owned: Owned) -> tuple[bool, OSError | None]:
    """SIGKILL to every process of an engine that lives; the dead are reaped."""
    left, problem = await _find_processes(owned)
    for process in left:
        if process.alive:
            problem = _kill(owned, process) or problem
        elif process.pid != owned.identity.pid:  # whose exit belongs to who started it
            owned.kernel.reap(process.pid)
    return not any(process.alive for process in left), problem


async def _find_processes(owned: Owned) -> tuple[list[Process], OSError | None]:
    try:
        return await asyncio.to_thread(owned.find), None
    except OSError as error:  # no descriptor left, or /proc is closed: absence cannot be concluded
        return [], error


def _kill(owned: Owned, process: Process) -> OSError | None:
    try:
        owned.send(process, signal.SIGKILL)
    except OSError as error:
        return error
    return None


async def reap_orphans(kernel: Kernel = KERNEL, seconds: float = _REAP_SECONDS) -> NoReturn:
    """Reap orphans that were reparented to this process and have ended, until cancelled.

    Only what was not reaped since the previous scan: an exit belongs to whoever started the process.
    """
    before: set[tuple[int, int]] = set()
    while True:
        await asyncio.sleep(seconds)
        dead: set[tuple[int, int]] = set()
        if kernel.has_dead_child():
            try:
                dead = _unclaimed(await asyncio.to_thread(kernel.processes), kernel)
            except OSError as error:
                log.warning("dead processes cannot be looked for", error=str(error))
        for pid, _ in dead & before:
            kernel.reap(pid)
        before = dead


def _unclaimed(processes: Sequence[Process], kernel: Kernel) -> set[tuple[int, int]]:
    return {
        (process.pid, process.started)
        for process in processes
        if not process.alive and process.parent == kernel.own_pid and process.pid not in kernel.waited_for
    }


class EngineProcess:
    """The first process of an engine: a child of this daemon, or of an earlier one."""

    def __init__(self, identity: Identity, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        self.owned = Owned(identity)  # of a child more is known once it is on record
        self.pid = identity.pid
        self.started = identity.started
        self._child = child
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self._pidfd = pidfd
        loop.add_reader(pidfd, self._ended)

    @classmethod
    def adopt(cls, identity: Identity) -> "EngineProcess | None":
        """The process that an earlier daemon started; None where it is gone or cannot be read: see `is_alive`."""
        try:
            pidfd = open_pidfd(identity.pid)
        except OSError:
            return None
        # After the open, to avoid a pid reuse race: descriptor and line are of the same process.
        if pidfd is None or not is_alive(identity):
            if pidfd is not None:
                os.close(pidfd)
            return None
        return cls(identity, pidfd, None)

    @classmethod
    def spawn(cls, argv: Sequence[str], env: Mapping[str, str], folder: Path, log_file: Path) -> "EngineProcess":
        """Start `argv` in `folder`, output appended to `log_file` (mode 0600). It does nothing before `release`.

        Raises:
            OSError: when the log cannot be opened or no process can be made.

        """
        output = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            child = subprocess.Popen(
                ["/bin/sh", "-c", _WAIT_FOR_RELEASE, *argv],
                env=env,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(output)
        KERNEL.waited_for.add(child.pid)
        try:
            stat = look_up(child.pid)
            assert stat is not None, "a child is there until it is reaped"
            return cls(Identity(child.pid, stat.started), os.pidfd_open(child.pid), child)
        except OSError:  # no descriptor left: it still waits for its release
            child.kill()
            child.wait()
            KERNEL.waited_for.discard(child.pid)
            raise

    def release(self) -> None:
        """Let it become the engine."""
        assert self._child is not None, "an adopted engine was let go long ago"
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died before its release: `exited` reports that
            self._child.stdin.write(b"\n")
            self._child.stdin.close()

    def detach(self) -> None:
        """Stop watching it: it lives on, for the next daemon."""
        if self.exited.done():
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        KERNEL.waited_for.discard(self.pid)
        if self._child is not None:
            self._child.returncode = 0  # Popen warns of a child that nobody waited for

    async def end(self, grace_seconds: float, patience: float = _KILL_SECONDS) -> bool:
        """End it with all that it started, and reap; True when nothing is left, else it may be called again.

        Raises:
            OSError: as `end_processes`.

        """
        if self._child is not None and self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
        if grace_seconds > 0 and not self.exited.done():
            await _find_processes(self.owned)  # who has left the session is known by its parent while that one lives
            self._signal(signal.SIGTERM)
            await clock.wait({self.exited}, grace_seconds)
        emptied = await until_gone(self._sweep, patience)
        await asyncio.wait({self.exited}, timeout=patience)
        if not self.exited.done():
            return False
        if emptied and self._child is not None:
            self._child.wait()  # at once: until here it kept its number, by which its session is known
            KERNEL.waited_for.discard(self.pid)
        return emptied

    async def _sweep(self) -> tuple[bool, OSError | None]:
        """SIGKILL to all of its processes at once: each has memory to give back."""
        swept = await _sweep(self.owned)  # first: who has left the session is known by its parent while that one lives
        self._signal(signal.SIGKILL)
        return swept

    def _signal(self, number: signal.Signals) -> None:
        """To the first process, through the descriptor that is open already: that needs no look at /proc."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        ended = Exit(None, None) if self._child is None else _exit_of(self._pidfd)
        os.close(self._pidfd)
        if not self.exited.done():
            self.exited.set_result(ended)


def _exit_of(pidfd: int) -> Exit:
    """How a child ended, which stays a zombie. Of another process's child only its parent can know."""
    try:
        found = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        found = None
    if found is None:
        return Exit(None, None)
    if found.si_code == os.CLD_EXITED:
        return Exit(found.si_status, None)
    return Exit(None, found.si_status)
