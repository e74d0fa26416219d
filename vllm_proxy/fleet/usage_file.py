"""`usage.sqlite`, in the state directory: what keys have used, by hour, for 400 days. Called in one thread at a time.

A clock can be wrong, years ahead or back at 1970, and what was removed is gone: so what is too old by the clock goes
only where the newest row in the file says so too, and no more than two days of it at once, once a day. As slowly goes
what was counted while the clock was far ahead, once there are rows of a week by the present one.

Whoever writes here keeps what could not be written, and tries again: a write is all of it or nothing. A file that is
damaged is renamed `usage.sqlite.unreadable`, for who wants to save something of it, and another is begun.
"""

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import structlog

from vllm_proxy.domain.usage import DAY, FIELDS, HOUR, MOST_ROWS, Bucket, Counts, Query
from vllm_proxy.errors import VllmProxyError
from vllm_proxy.runtime.files import trusted

log = structlog.get_logger()

KEPT_DAYS = 400
_DAYS_AT_ONCE = 2  # are removed, where one comes: what has piled up while nothing was written gets less
_DAYS_OF_A_CLOCK = 7  # with rows by it, and what is far ahead of it was counted by a wrong one
_VERSION = 1
_BUSY_SECONDS = 1.0  # for another program that has it locked
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_SIDES = ("", "-wal", "-shm")
_COLUMNS = ", ".join(FIELDS)
_CREATE = f"""
CREATE TABLE IF NOT EXISTS usage (
    hour INTEGER NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL,
    {", ".join(f"{name} INTEGER NOT NULL" for name in FIELDS)},
    PRIMARY KEY (hour, key, model)
) WITHOUT ROWID
"""
_ADD = (
    f"INSERT INTO usage (hour, key, model, {_COLUMNS}) VALUES (?, ?, ?, {', '.join('?' * len(FIELDS))})"  # noqa: S608 - names of ours
    f" ON CONFLICT DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in FIELDS)}"
)
_SUMS = ", ".join(f"sum({name})" for name in FIELDS)
_OF = {"key": "key", "model": "model", "hour": "hour", "day": f"hour / {DAY} * {DAY}"}  # of a `Query.by`


class UsageFileError(VllmProxyError):
    """It cannot be read or written now; says why."""


class UsageFile:
    """One file. It is made when something is to be written."""

    def __init__(self, path: Path, elapsed: Callable[[], float] = time.monotonic) -> None:
        """`elapsed`: seconds, by a clock that nobody sets."""
        self.path = path
        self._elapsed = elapsed
        self._open: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None  # of the file that is open
        self._pruned: float | None = None  # when what is too old was removed last, as `elapsed`

    def add(self, counted: Mapping[Bucket, Counts], now: float) -> None:
        """Add to what is there, all of it or nothing; it is on disk then.

        Raises:
            UsageFileError: it cannot be.

        """
        elapsed = self._elapsed()
        is_due = self._pruned is None or elapsed - self._pruned >= DAY
        with self._connected(create=True) as file, file:
            file.execute("BEGIN IMMEDIATE")
            if is_due:
                _prune(file, int(now) // HOUR * HOUR)
            file.executemany(_ADD, [(*bucket, *counts.values()) for bucket, counts in counted.items()])
        if is_due:
            self._pruned = elapsed

    def newest(self) -> int | None:
        """The last hour that has a row.

        Raises:
            UsageFileError: it cannot be read.

        """
        try:
            with self._connected() as file:
                return _newest(file)
        except FileNotFoundError:
            return None

    def sums(self, asked: Query, *, all_rows: bool = False) -> dict[tuple[str | int, ...], Counts]:
        """The sums of a report: by the values of `asked.by`, in the order of a report.

        One more than the most that a report may have shows that, unless `all_rows` are wanted.

        Raises:
            UsageFileError: it cannot be read.

        """
        by = ", ".join(_OF[name] for name in asked.by)
        of_key = "" if asked.key is None else " AND key = :key"
        order = ", ".join(name for name in ("hour", "day", "key", "model") if name in asked.by)
        groups = f" GROUP BY {by} ORDER BY {order} LIMIT {-1 if all_rows else MOST_ROWS + 1}" if by else ""
        names = "".join(f"{_OF[name]} AS {name}, " for name in asked.by)
        text = f"SELECT {names}{_SUMS} FROM usage WHERE hour >= :first AND hour < :last"  # noqa: S608 - names of ours
        values = {"first": asked.first, "last": asked.last, "key": asked.key}
        count = len(asked.by)
        try:
            with self._connected() as file:
                found = file.execute(text + of_key + groups, values)
                return {row[:count]: Counts(*row[count:]) for row in found if row[-1] is not None}
        except FileNotFoundError:
            return {}

    def close(self) -> None:
        """Close it. It is opened again where it is needed."""
        if self._open is not None:
            with contextlib.suppress(sqlite3.Error):
                self._open.close()
            self._open = None

    @contextlib.contextmanager
    def _connected(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """The open file. What fails closes it, so that the next call begins anew.

        Raises:
            UsageFileError: instead of what sqlite and the system raise.
            FileNotFoundError: it is not there, and is not to be made.

        """
        try:
            if self._inode != _inode(self.path):  # somebody has removed or replaced it
                self.close()
            if self._open is None:
                self._open = self._connect(create=create)
            yield self._open
        except sqlite3.Error as error:
            self.close()
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
                self._set_aside(error)
            raise UsageFileError(str(error)) from error
        except OverflowError as error:  # a count that no column holds
            raise UsageFileError(str(error)) from error
        except OSError as error:
            self.close()
            if isinstance(error, FileNotFoundError) and not create:
                raise
            raise UsageFileError(error.strerror or str(error)) from error

    def _connect(self, *, create: bool) -> sqlite3.Connection:
        flags = os.O_RDWR | (os.O_CREAT if create else 0) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        # Closing a descriptor ends sqlite's locks on the file: this is while it has none.
        descriptor = os.open(self.path, flags, 0o600)
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if not stat.S_ISREG(found.st_mode) or not trusted(found.st_uid):
            raise UsageFileError("it is not a regular file of this user")
        file = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            _prepare(file)
        except BaseException:
            file.close()
            raise
        self._inode = found.st_dev, found.st_ino
        return file

    def _set_aside(self, error: sqlite3.Error) -> None:
        for side in _SIDES:
            with contextlib.suppress(OSError):
                Path(f"{self.path}{side}").replace(f"{self.path}.unreadable{side}")
        log.error("what keys have used before cannot be read: quotas of the day and the month begin anew",
                  file=str(self.path), error=str(error), kept_as=f"{self.path.name}.unreadable")  # fmt: skip


def _prepare(file: sqlite3.Connection) -> None:
    """Make a new file one of ours, and have what is written survive a crash of the machine."""
    (version,) = file.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        raise UsageFileError("a newer vllm-proxy has written it")
    file.execute("PRAGMA journal_mode = WAL")
    file.execute("PRAGMA synchronous = FULL")
    if version < _VERSION:
        with file:
            file.execute("BEGIN IMMEDIATE")
            file.execute(_CREATE)
            file.execute(f"PRAGMA user_version = {_VERSION}")


def _prune(file: sqlite3.Connection, now: int) -> None:
    """Remove the oldest days that are too old, and the last ones that are too far ahead. `now`: a whole hour."""
    newest = _newest(file)
    if newest is None:
        return
    too_old, too_far = min(now, newest) - KEPT_DAYS * DAY, now + KEPT_DAYS * DAY
    oldest = _days(file, "hour < ? ORDER BY day", (too_old,), _DAYS_AT_ONCE)
    if oldest:
        file.execute("DELETE FROM usage WHERE hour < ?", (min(too_old, oldest[-1] + DAY),))
    if newest <= too_far:
        return
    if len(_days(file, "hour BETWEEN ? AND ?", (now - KEPT_DAYS * DAY, now), _DAYS_OF_A_CLOCK)) == _DAYS_OF_A_CLOCK:
        last = _days(file, "hour > ? ORDER BY day DESC", (too_far,), _DAYS_AT_ONCE)
        file.execute("DELETE FROM usage WHERE hour > ? AND hour >= ?", (too_far, last[-1]))


def _days(file: sqlite3.Connection, of: str, values: tuple[int, ...], most: int) -> list[int]:
    text = f"SELECT DISTINCT {_OF['day']} AS day FROM usage WHERE {of} LIMIT {most}"  # noqa: S608 - texts of ours
    return [int(day) for (day,) in file.execute(text, values)]


def _newest(file: sqlite3.Connection) -> int | None:
    (hour,) = file.execute("SELECT max(hour) FROM usage").fetchone()
    return None if hour is None else int(hour)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
