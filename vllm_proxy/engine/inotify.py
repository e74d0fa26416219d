"""Events of directories, from the kernel. Its one rule: it takes one descriptor and no thread.

What watches with a thread of its own cannot where none can be made any more, and the libraries that do so then abort
the process.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterable
from typing import Self

# As <sys/inotify.h> has them.
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF, _OVERFLOW, _IGNORED = 0x400, 0x800, 0x4000, 0x8000
_ONLYDIR = 0x1000000
_WATCHED = (
    _MODIFY
    | _ATTRIB
    | _CLOSE_WRITE
    | _MOVED_FROM
    | _MOVED_TO
    | _CREATE
    | _DELETE
    | _DELETE_SELF
    | _MOVE_SELF
    | _ONLYDIR
)
_GONE = _MOVED_FROM | _DELETE
_OF_THE_FOLDER = _DELETE_SELF | _MOVE_SELF | _OVERFLOW | _IGNORED
_HEAD = struct.Struct("iIII")  # watch, mask, cookie, length of the name
_READ_BYTES = 64 * 2**10
_GATHERED_SECONDS = 0.02  # a burst is told once


class DirectoryEvents:
    """Tells of what happens to names in directories, inside the block. `told(gone)` is called in the loop, soon.

    `gone`: nothing but that names went away, or the directories themselves.
    """

    def __init__(self, folders: Iterable[str], names: frozenset[str], told: Callable[[bool], None]) -> None:
        """`names`: whole paths, one of whose directories is each of `folders`."""
        self._folders = sorted(folders)
        self._names = names
        self._told = told
        self._watches: dict[int, str] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._gone = True

    def __enter__(self) -> Self:
        """Begin.

        Raises:
            OSError: the kernel gives no more watches.

        """
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = _checked(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        try:
            for folder in self._folders:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # it went meanwhile
                    self._watches[_checked(libc.inotify_add_watch(self._descriptor, os.fsencode(folder), _WATCHED))] = (
                        folder
                    )
        except BaseException:
            os.close(self._descriptor)
            raise
        self._loop.add_reader(self._descriptor, self._read)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        if self._timer is not None:
            self._timer.cancel()

    def _read(self) -> None:
        data, position = os.read(self._descriptor, _READ_BYTES), 0
        while position < len(data):
            watch, mask, _, length = _HEAD.unpack_from(data, position)
            position += _HEAD.size + length
            name = os.fsdecode(data[position - length : position].rstrip(b"\0"))
            if mask & _OF_THE_FOLDER or f"{self._watches.get(watch, '').rstrip('/')}/{name}" in self._names:
                self._gather(gone=bool(mask & (_GONE | _OF_THE_FOLDER)) and not mask & _OVERFLOW)

    def _gather(self, *, gone: bool) -> None:
        self._gone = self._gone and gone
        if self._timer is None:
            self._timer = self._loop.call_later(_GATHERED_SECONDS, self._tell)

    def _tell(self) -> None:
        gone, self._gone, self._timer = self._gone, True, None
        self._told(gone)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        reason = "no more watches, see fs.inotify in sysctl" if number in {errno.ENOSPC, errno.EMFILE} else ""
        raise OSError(number, reason or os.strerror(number))
    return result
