"""Writes the files of a state directory. What cannot be written is kept in memory, shown, and written once it can be.

For `state`: a disk that was full for a while must not leave a record out of date that a later daemon acts on.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog
import tomli_w

from vllm_proxy.runtime import files

log = structlog.get_logger()

_AGAIN_SECONDS = 5.0


class StateFiles:
    """Those of one daemon. `check`: raises an OSError where they may not be written any more."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.problem: str | None = None  # why some of it is not on disk
        self._check = check
        self._unwritten: dict[Path, bytes] = {}
        self._timer: asyncio.TimerHandle | None = None

    def replace(self, file: Path, document: Mapping[str, object]) -> None:
        """Replace a file, now or as soon as it can be."""
        self._unwritten[file] = tomli_w.dumps(document).encode()
        self._write()

    def close(self) -> None:
        """Try no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _write(self) -> None:
        self.close()
        before, self.problem = self.problem, None
        for file, data in [*self._unwritten.items()]:
            try:
                self._check()
                # Not worth an fsync each: what a crash of the machine destroys, no later boot could use.
                files.replace_file(file, data, durable=False)
                del self._unwritten[file]
            except OSError as error:
                self.problem = f"cannot write {file}: {error.strerror or error}"
        if self.problem is None:
            if before is not None:
                log.info("the state is written again")
            return
        if self.problem != before:
            log.error("the state cannot be written", why=self.problem)
        with contextlib.suppress(RuntimeError):  # no event loop: before it begins, or in a command
            self._timer = asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._write)
