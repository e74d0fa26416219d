"""Removes the logs of instances that the file has no more, a week after the last line: they tell why one died.

One that is on record, or that this daemon still has, keeps its log; whatever else lies in that folder stays. A week is
counted up to the newest line of all logs where that is earlier: a clock that is wrong at a start removes nothing.
"""

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path

import structlog

from vllm_proxy.engine.state import file_name
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.regular_file import read_regular_file
from vllm_proxy.runtime.threads import Disk

log = structlog.get_logger()

_DAY = 86_400.0  # seconds
_KEPT_SECONDS = 7 * _DAY
_NAME = re.compile(r"(?:.+%2F[0-9]+|.{100}~[0-9a-f]{16})\.log")  # of a log, as `file_name` has it


async def remove_old_logs(reconciler: Reconciler, state_dir: Path) -> None:
    """Look now, and once a day, until cancelled."""
    with contextlib.closing(Disk("old logs", 1)) as disk:
        while True:
            await disk(remove, state_dir, lambda: _names_of(reconciler), time.time())
            await clock.sleep(_DAY)


def _names_of(reconciler: Reconciler) -> set[str]:
    """The logs of what the file asks for, and of what there still is. May be called in any thread."""
    wanted = {
        f"{spec.id}/{at}" for spec in reconciler.config.models.values() for at in range(spec.policy.replicas or 1)
    }
    present = {one.name for model in reconciler.models() for one in model.instances}
    return {f"{file_name(instance)}.log" for instance in wanted | present}


def remove(state_dir: Path, names: Callable[[], AbstractSet[str]], now: float) -> None:
    """Remove what is old. `names`: of those that stay, asked for again before each removal. Blocks."""
    folder = state_dir / "logs"
    try:
        written = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
        logs = {name: found.st_mtime for name, found in written.items() if _is_log(name, found)}
        before = min(now, max(logs.values(), default=now)) - _KEPT_SECONDS
        for name in sorted(name for name, at in logs.items() if at < before):
            if name not in names() and name.encode() not in _records(state_dir):
                (folder / name).unlink()
                log.info("the log of an instance that the file has no more was removed", file=str(folder / name))
    except OSError as error:
        log.warning("old logs of engines cannot be removed", folder=str(folder), error=str(error))


def _is_log(name: str, found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and _NAME.fullmatch(name) is not None


def _records(state_dir: Path) -> bytes:
    """Of engines, as text: what cannot be used of a record is on record all the same."""
    return b"".join(read_regular_file(file) for file in sorted(state_dir.glob("engines.toml*")))
