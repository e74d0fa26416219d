"""When may the configuration file have changed? Its one rule: a change may be told twice, and is never missed.

Watched are the directories of every link on the way to the file, so that editors, `git`, Kubernetes and Nix are seen
in the moment. What no event tells (bind mounts, network file systems), a look every two seconds finds.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from watchfiles import Change, awatch

from vllm_proxy.domain.parse import revision_of

log = structlog.get_logger()

_STEP_MS = 20  # without another event, a change is told
_DEBOUNCE_MS = 200  # a burst is told at the latest after this long
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


async def watch(file: Path, changed: Callable[[], None], adopted: Callable[[], str], poll_seconds: float = 2.0) -> None:
    """Call `changed` soon after the file may have changed, until cancelled.

    `adopted`: the revision that is followed; a look tells what differs from it, once for each content. A file that
    is missing is told by a look alone, since editors put another in its place.
    """
    told: str | None = None
    woken = asyncio.Event()
    while True:
        way = await asyncio.to_thread(_look, file)
        events = asyncio.create_task(_events(way, changed, woken))
        await asyncio.sleep(0)  # it watches: what happens from here on is told, what was before is seen by the look
        try:
            while True:
                woken.clear()
                now = await asyncio.to_thread(_look, file)
                if now.revision not in {adopted(), told}:
                    changed()
                told = now.revision
                if (now.names, now.folders) != (way.names, way.folders) or events.done():
                    break  # another way leads to it: that is to be watched
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(poll_seconds):
                        await woken.wait()
        finally:
            events.cancel()
            await asyncio.wait({events})


@dataclass(frozen=True, slots=True)
class _Look:
    """What is there. `folders`: the directories to watch, with what tells one from its successor."""

    names: frozenset[str]
    folders: frozenset[tuple[str, int, int]]
    revision: str  # "" where it cannot be read


def _look(file: Path) -> _Look:
    names = links_to(file)
    folders = set()
    for folder in {os.path.dirname(name) for name in names}:  # noqa: PTH120 - text throughout
        with contextlib.suppress(OSError):
            found = os.stat(folder)  # noqa: PTH116 - as above
            folders.add((folder, found.st_dev, found.st_ino))
    try:
        revision = revision_of(file.read_bytes())
    except OSError:
        revision = ""
    return _Look(names, frozenset(folders), revision)


async def _events(now: _Look, changed: Callable[[], None], woken: asyncio.Event) -> None:
    def ours(_: Change, path: str) -> bool:
        return path in now.names

    watched = awatch(
        *sorted(folder for folder, _, _ in now.folders),
        watch_filter=ours,
        debounce=_DEBOUNCE_MS,
        step=_STEP_MS,
        recursive=False,
    )
    try:
        async for changes in watched:
            if any(change is not Change.deleted for change, _ in changes):
                changed()
            woken.set()
    except (OSError, RuntimeError) as error:  # too many watches, a directory that went meanwhile
        log.warning("the configuration is looked at now and then, since it cannot be watched", error=str(error))
        await asyncio.Event().wait()
