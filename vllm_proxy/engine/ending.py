"""Ends engines and cleans up after them; retries with backoff until nothing of them is left.

An engine has ended when none of its processes lives. Only then its shared memory, its folder and its record are
removed, so that nothing leaks and no record is lost. What cannot be ended is reported to its owner and retried without
limit. Only a daemon that is stopping gives up, and keeps the record.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from vllm_proxy.domain.lifecycle import backoff_seconds
from vllm_proxy.engine import cgroup, vitals
from vllm_proxy.engine.ownership import Owned
from vllm_proxy.engine.state import EngineRecord, StateDirectory
from vllm_proxy.runtime import descriptors, files
from vllm_proxy.runtime.background import notify

log = structlog.get_logger()

LAST_TRIES_SECONDS = 5.0  # of a daemon that stops
_LOOK_SECONDS = 1.0  # reading /proc may hang for a process that hangs
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries
_SHOWN = 8  # processes in a sentence
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}

# Both take the seconds between SIGTERM and SIGKILL.
type End = Callable[[float], Awaitable[bool]]  # whether no process is left
type Attempt = Callable[[float], Awaitable[str | None]]  # why some are left


class Owner(Protocol):
    """Who runs an engine, and is notified of its start and its end."""

    def stop_timeout(self) -> float:
        """Seconds between SIGTERM and SIGKILL."""

    def waits_for_port(self, why: str | None) -> None:
        """The start waits for something that time alone brings; None: it does no more."""

    def not_ended(self, why: str) -> None:
        """The engine could not be ended, which is tried again. Called when that, or why, is new."""

    def gone(self) -> None:
        """None of its processes lives: the memory of its devices is free. What else it left is being removed."""

    def ended(self) -> None:
        """Nothing is left of the engine, or it was left to the next daemon."""


async def until_ended(record: EngineRecord, attempt: Attempt, owner: Owner, stopping: asyncio.Event) -> bool:
    """End an engine, again and again until nothing is left of it.

    `stopping`: once it is set, tries end after a few seconds. False then: the engine stays on record as it is.
    """
    loop, reported, failures, give_up_at = asyncio.get_running_loop(), "", 0, None
    grace = owner.stop_timeout()
    while True:
        try:
            async with asyncio.timeout_at(give_up_at) as limit:
                why = await attempt(grace)
        except TimeoutError:
            if not limit.expired():
                raise
            return _give_up(record, reported)
        if why is None:
            if reported:
                log.info("the engine is ended at last", instance=record.instance, pid=record.pid)
            owner.ended()
            return True
        if why != reported:
            log.error("an engine cannot be ended", instance=record.instance, why=why)
            owner.not_ended(why)
        reported, grace, failures = why, 0.0, failures + 1
        if stopping.is_set():
            give_up_at = give_up_at or loop.time() + LAST_TRIES_SECONDS
            if loop.time() >= give_up_at:
                return _give_up(record, reported)
        await _pause(failures, stopping)


def _give_up(record: EngineRecord, why: str) -> bool:
    log.error("an engine is left to the next daemon: it cannot be ended", instance=record.instance, why=why)
    return False


async def _pause(failures: int, stopping: asyncio.Event) -> None:
    """Wait out the backoff, or until the daemon stops."""
    if stopping.is_set():
        await asyncio.sleep(_FIRST_PAUSE)
        return
    try:
        async with asyncio.timeout(backoff_seconds(failures, _FIRST_PAUSE, _LONGEST_PAUSE, 0)):
            await stopping.wait()
    except TimeoutError:
        return


async def end_engine(
    record: EngineRecord, end: End, state: StateDirectory, grace: float, *, gone: Callable[[], None] | None = None
) -> str | None:
    """Try once to `end` every process of an engine, then remove what they leave behind. Returns why some are left.

    None when nothing is left. What could not be ended stays on record, its folder and its shared memory stay.
    `gone`: called when no process is left.
    """
    with descriptors.spare():
        mapped = await _segments(record)  # known only while they live
        try:
            ended = await end(grace) and await cgroup.end(record.cgroup)
        except Exception as error:  # whatever it is, it is not known that nothing is left
            log.debug("an engine was not ended", instance=record.instance, exc_info=True)
            return _explanation(await _survivors(record), error)
        if not ended:
            return _explanation(await _survivors(record), None)
        if gone is not None:
            notify([gone])
        await _clean_up(record, mapped, state)
        return None


async def _segments(record: EngineRecord) -> Collection[str]:
    """Its shared memory, as far as that can be seen within a moment."""
    try:
        async with asyncio.timeout(_LOOK_SECONDS):
            return await asyncio.to_thread(vitals.shared_segments, Owned(record.identity))
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        log.debug("the shared memory of an engine cannot be seen", instance=record.instance, error=str(error))
        return ()


async def _survivors(record: EngineRecord) -> list[int]:
    """The processes that live, as far as they can be seen."""
    try:
        async with asyncio.timeout(_LOOK_SECONDS):
            found = await asyncio.to_thread(Owned(record.identity).find)
    except (OSError, RuntimeError, ValueError, TimeoutError):
        return []
    return sorted(process.pid for process in found if process.alive)


def _explanation(pids: list[int], error: Exception | None) -> str:
    names = ", ".join(map(str, pids[:_SHOWN])) + (" and more" if len(pids) > _SHOWN else "")
    who = f"process{'' if len(pids) == 1 else 'es'} {names}" if pids else "its processes"
    if error is None:
        return (
            f"{who} survived SIGKILL, so the kernel holds them back: see dmesg; a hung driver or file system lets go"
            " with a reset of the device or a restart of the machine"
        )
    if isinstance(error, PermissionError):
        return f"{who} may not be looked at or signalled ({error.strerror}): end them as root"
    if isinstance(error, OSError) and error.errno in _NO_DESCRIPTORS:
        return f"{who}: no file descriptor is left to do it ({error.strerror}): raise LimitNOFILE="
    return f"{who}: {type(error).__name__}: {error}; end them by hand"


async def _clean_up(record: EngineRecord, mapped: Collection[str], state: StateDirectory) -> None:
    """Remove what dead processes leaked. What cannot be removed is logged, and blocks nothing."""
    segments = {*mapped, *record.segments}
    remove = partial(vitals.remove_segments, segments, record.since)
    if segments and (removed := await _try(record, "remove its shared memory", remove)):
        log.info("shared memory of a dead engine removed", instance=record.instance, names=removed)
    if record.folder:
        await _try(record, "remove its folder", partial(files.remove_tree, Path(record.folder)))
    try:
        state.forget(record.own_name)
    except OSError as error:
        _warn(record, "take it off the record", error)


async def _try[T](record: EngineRecord, what: str, work: Callable[[], T]) -> T | None:
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        _warn(record, what, error)
    except Exception:  # the engine has ended, whatever fails afterwards
        log.exception("a fault of the daemon behind the end of an engine", instance=record.instance, failed=what)
    return None


def _warn(record: EngineRecord, what: str, error: Exception) -> None:
    log.warning("an engine has ended, but not all that it left is gone", instance=record.instance,
                failed=what, error=str(error))  # fmt: skip
