"""What `stop --all` does where no daemon runs: ends the engines that one has left behind."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import uvloop

from vllm_proxy import logsetup
from vllm_proxy.engine.process import become_subreaper
from vllm_proxy.engine.state import StateDirectory
from vllm_proxy.errors import CommandError
from vllm_proxy.fleet.orphans import end_orphans
from vllm_proxy.places import Places
from vllm_proxy.runtime.files import become_owner

__all__ = ["become_owner", "end"]


class Engine(TypedDict):
    """An engine that a daemon had left."""

    instance: str
    pid: int


type Outcome = dict[str, Any]  # as `act` prints it: models, engines, ended


def end(where: Places, report: Callable[[str], None]) -> Outcome:
    """End them; the exit status depends on `ended`.

    Raises:
        StartupError: when the state directory cannot be used, is not to be trusted, or is in use by a daemon that does
            not listen.
        CommandError: it belongs to somebody else.

    """
    logsetup.set_up("error", logsetup.resolve("auto", os.environ))  # `report` prints the rest
    return uvloop.run(_end(where, report))


async def _end(where: Places, report: Callable[[str], None]) -> Outcome:
    engines, all_ended = list[Engine](), True
    there = [folder for folder in where.state_dirs if _is_there(folder)]
    if not there:
        report(f"no daemon runs, and none has left engines in {where.state_dir}; --state-dir names another")
    for folder in there:
        with StateDirectory(folder, where.scratch) as state:
            left = state.orphans()
            become_subreaper()
            for record in left:
                report(f"ending {record.instance}, process {record.pid}")
            ended = await end_orphans(left, state)
            unusable = state.unusable
        if unusable:
            report(f"{unusable} of its records cannot be used, so that engines may be left: see the messages above")
            ended = False
        rest = "" if ended else ", not all of them could be ended"
        report(f"no daemon runs; engines that one had left in {folder}: {len(left)}{rest}")
        engines += [{"instance": record.instance, "pid": record.pid} for record in left]
        all_ended = all_ended and ended
    return {"models": [], "engines": engines, "ended": all_ended}


def _is_there(state_dir: Path) -> bool:
    with contextlib.suppress(PermissionError):
        if not state_dir.exists():
            return False
    if not os.access(state_dir, os.R_OK | os.X_OK):
        msg = f"permission denied: cannot look for engines in {state_dir}, which another user has; run it with sudo"
        raise CommandError(msg)
    return True
