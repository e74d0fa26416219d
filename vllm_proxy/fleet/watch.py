"""Watches the configuration file, the files that it names and folders of adapters; notifies when one may have changed.

May notify too often, but never misses a change (tests/fleet/test_watch.py). Watched are the directories of every link
on the way to the file, so that editors, `git`, Kubernetes and Nix are noticed at once; events are debounced. What
causes no event (bind mounts, network file systems) is found by a poll every two seconds.
"""

import asyncio
import contextlib
import importlib
import os
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from watchfiles import Change, awatch

from vllm_proxy.domain.adapters import CONFIG, WEIGHTS
from vllm_proxy.domain.config import fingerprint
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import run_once, spawn
from vllm_proxy.runtime.regular_file import is_folder
from vllm_proxy.runtime.threads import Offload, can_make_threads
from vllm_proxy.runtime.watched_files import revision_at

log = structlog.get_logger()

with contextlib.suppress(
    ImportError
):  # `awatch` would import it when it is first used: a tenth of a second on the loop
    importlib.import_module("anyio._backends._asyncio")

_STEP_MS = 20  # a change is reported after so long without another event
_DEBOUNCE_MS = 200  # a burst is reported after so long at the latest
_THREADS = 8  # a few more than watching takes, since others may need some at the same time
_SETTLED_SECONDS = 0.03  # unchanged for so long, whoever wrote it has finished
_SLOW_SECONDS = 10.0  # a slower scan is logged
_REWATCH_SECONDS = 60.0  # then watching is retried, though the path to the file is the same
_MOST_LINKS = 40  # as Linux has it


def links_to(file: Path) -> frozenset[str]:
    """Every path whose change may change what `file` is: the file, and each link and its target, absolute."""
    found: set[str] = set()
    rest, links = [os.path.abspath(file)], 0  # noqa: PTH100 - not resolved: links are what counts here
    while rest:
        path = rest.pop()
        here = "/"
        for part in path.strip("/").split("/"):
            here = os.path.join(here, part)  # noqa: PTH118 - text throughout
            if not os.path.islink(here) or here in found:  # noqa: PTH114 - as above
                continue
            found.add(here)
            links += 1
            if links <= _MOST_LINKS:
                with contextlib.suppress(OSError):
                    target = os.path.join(os.path.dirname(here), os.readlink(here))  # noqa: PTH115, PTH118, PTH120
                    rest.append(os.path.normpath(target + path.removeprefix(here)))
        found.add(path)
    return frozenset(found)


type Notify = Callable[[bool], None]  # argument: whether files were only removed
type Events = Callable[[Collection[str], Collection[str], Notify], Coroutine[Any, Any, None]]


async def events_of(folders: Collection[str], names: Collection[str], notify: Notify) -> None:
    """Call `notify` soon after something happened to one of the `names`, whole paths, in these folders.

    Returns where that cannot be seen (any more), which is logged. A library that cannot make its thread aborts the
    process, so it is asked for one only where there are some.
    """
    if not can_make_threads(_THREADS):
        _log_unwatched("no thread can be made")
        return
    watched = awatch(
        *sorted(folders),
        watch_filter=lambda _, path: path in names,
        debounce=_DEBOUNCE_MS,
        step=_STEP_MS,
        recursive=False,
    )
    try:
        async for changes in watched:
            notify(all(change is Change.deleted for change, _ in changes))
    except (OSError, RuntimeError) as error:  # too many watches, a directory that went meanwhile
        _log_unwatched(str(error))


def _log_unwatched(why: str) -> None:
    log.warning("the configuration is looked at now and then, since it cannot be watched", error=why)


async def watch(
    files: Callable[[], Sequence[Path]],
    changed: Callable[[], None],
    adopted: Callable[[], str],
    poll_seconds: float = 2.0,
    offload: Offload = asyncio.to_thread,
    *,
    events: Events = events_of,
) -> None:
    """Call `changed` soon after a file may have changed, until cancelled.

    `files`: which are followed now, the configuration first. `adopted`: the fingerprint that is followed; a poll
    reports what differs from it, once for each content. A file that is missing is reported by a poll only, since
    editors put another in its place. `offload` runs scans in a thread.
    """
    notified: str | None = None
    woken = asyncio.Event()

    def happened(gone: bool) -> None:  # noqa: FBT001 - the signature is given
        if not gone:
            changed()
        woken.set()

    while True:
        watched = await _scan_patiently(files(), offload)
        folders = {folder for folder, _, _ in watched.folders}
        watching = run_once(partial(events, folders, watched.names, happened), "events of the configuration file")
        await asyncio.sleep(
            0
        )  # it watches from here on; what happened before is found by the scan (no race between both)
        until = asyncio.get_running_loop().time() + _REWATCH_SECONDS
        try:
            while True:
                woken.clear()
                now = await _scan_patiently(files(), offload)
                if now.revision not in {adopted(), notified}:
                    changed()
                notified = now.revision
                if (now.names, now.folders) != (watched.names, watched.folders):
                    break  # other links lead to it: watch those
                if watching.done() and asyncio.get_running_loop().time() > until:
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(poll_seconds):
                        await woken.wait()
        finally:
            watching.cancel()
            await asyncio.wait({watching})


async def settled(peek: Callable[[], Awaitable[list[str]]], until: float) -> list[str] | None:
    """Debounce: what `peek` says of the files once they do not change any more; None where they do until that time.

    `peek`: the revision of each, "" of one that is empty: many programs truncate a file and then fill it, and a part of
    it, or nothing, may be valid. `until`: on the loop's clock.
    """
    seen = await peek()
    while asyncio.get_running_loop().time() < until:
        await asyncio.sleep(_SETTLED_SECONDS)
        before, seen = seen, await peek()
        if seen == before and all(seen):
            return seen
    return None


async def _scan_patiently(files: Sequence[Path], offload: Offload) -> "_Scan":
    """A scan, however long its disk takes; that it takes long is logged, once."""
    look = spawn(offload(_scan, files), "look at the configuration file")
    try:
        if not await clock.wait({look}, _SLOW_SECONDS):
            log.error("the configuration file cannot be looked at: its disk does not answer", file=str(files[0]))
            await asyncio.wait({look})
            log.info("the configuration file can be looked at again", file=str(files[0]))
        return look.result()
    finally:
        look.cancel()


@dataclass(frozen=True, slots=True)
class _Scan:
    """The files as found. `folders`: the directories to watch, with device and inode."""

    names: frozenset[str]
    folders: frozenset[tuple[str, int, int]]
    revision: str  # of all of them, "" where the configuration cannot be read


def _scan(files: Sequence[Path]) -> _Scan:
    names = frozenset().union(*map(links_to, files), *map(_in_folder, files))
    folders = set()
    for folder in {os.path.dirname(name) for name in names}:  # noqa: PTH120 - text throughout
        with contextlib.suppress(OSError):
            found = os.stat(folder)  # noqa: PTH116 - as above
            folders.add((folder, found.st_dev, found.st_ino))
    first, *rest = map(revision_at, files)
    return _Scan(names, frozenset(folders), fingerprint([first, *rest]) if first else "")


def _in_folder(file: Path) -> set[str]:
    """Of the folder of an adapter, what an event is expected for; other files of it are left to the poll."""
    return {os.path.abspath(file / name) for name in (CONFIG, *WEIGHTS)} if is_folder(file) else set()  # noqa: PTH100
