"""`usage.sqlite`, in the state directory: what keys have used, by hour, for 400 days. Called in one thread at a time.

Whoever writes here keeps what could not be written, and tries again: a write is all of it or nothing. A file that is
damaged is renamed `usage.sqlite.unreadable`, for who wants to save something of it, and another is begun.
"""

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import structlog

from vllm_proxy.domain.usage import DAY, FIELDS, HOUR, MOST_ROWS, Bucket, Counts, Query
from vllm_proxy.errors import VllmProxyError
from vllm_proxy.runtime.files import trusted

log = structlog.get_logger()

KEPT_DAYS = 400
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

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None  # of the file that is open
        self._pruned = 0  # the day on which what is too old was removed last

    def add(self, counted: Mapping[Bucket, Counts], now: float) -> None:
        """Add to what is there, all of it or nothing; it is on disk then.

        Raises:
            UsageFileError: it cannot be.

        """
        with self._connected(create=True) as file, file:
            file.execute("BEGIN IMMEDIATE")
            file.executemany(_ADD, [(*bucket, *counts.values()) for bucket, counts in counted.items()])
            if self._pruned != now // DAY:
                file.execute("DELETE FROM usage WHERE hour < ?", (int(now) // HOUR * HOUR - KEPT_DAYS * DAY,))
        self._pruned = int(now // DAY)

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


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
