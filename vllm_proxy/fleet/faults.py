"""Contains bugs of the daemon itself, so that one does not leave the fleet without anybody who decides.

For the fleet loop. What an engine, a disk or a file may do is a value and not handled here. A bug that comes again and
again is logged with backoff.
"""

import asyncio
from types import TracebackType
from typing import Self

import structlog

log = structlog.get_logger()

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0  # what went well for longer than this has recovered


class _Known:
    """A bug that was logged."""

    def __init__(self, error: str, at: float) -> None:
        self.error = error
        self.logged_at = self.last_at = at
        self.pause = _FIRST_PAUSE_SECONDS
        self.unreported = 0


class Faults:
    """Those of one loop. The same one is logged with its traceback once, and then in a line, at growing pauses."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], _Known] = {}

    def contained(self, what: str, **fields: str) -> "Contained":
        """A block in which an exception is logged as `what`, with the fields, and goes no further."""
        return Contained(self, what, fields)

    def note(self, what: str, fields: dict[str, str], error: Exception) -> None:
        """Log it, unless the same one was logged just now."""
        now, key, shown = asyncio.get_running_loop().time(), (what, *fields.values()), repr(error)
        known = self._known.get(key)
        if known is None or known.error != shown or now - known.last_at > _LONGEST_PAUSE_SECONDS:
            self._forget_old(now)
            self._known[key] = _Known(shown, now)
            log.error(what, **fields, error=shown, exc_info=error)
            return
        known.last_at = now
        if now - known.logged_at < known.pause:
            known.unreported += 1
            return
        log.error(what, **fields, error=shown, unreported_before=known.unreported)
        known.logged_at, known.unreported = now, 0
        known.pause = min(known.pause * 2, _LONGEST_PAUSE_SECONDS)

    def _forget_old(self, now: float) -> None:
        for key in [key for key, known in self._known.items() if now - known.last_at > _LONGEST_PAUSE_SECONDS]:
            del self._known[key]


class Contained:
    """`error`: what was raised in the block; None where nothing was."""

    def __init__(self, faults: Faults, what: str, fields: dict[str, str]) -> None:
        self.error: Exception | None = None
        self._faults = faults
        self._what = what
        self._fields = fields

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = error
        self._faults.note(self._what, self._fields, error)
        return True
