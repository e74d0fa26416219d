"""The file that takes the output of one engine; memory, where the disk is full or read-only.

A log that cannot be kept must not cost an engine: its output then goes to a memfd, and `problem` says why. The file is
held open, so it can be read after its name is gone.
"""

import errno
import os
from pathlib import Path
from typing import Self

from vllm_proxy.runtime.regular_file import UnusableFileError, refuse_special

_ROOM_BYTES = 2**20  # less than that is a full disk: an engine that cannot write its log dies of it
MOST_BYTES = 64 * 2**20  # then it is cut
MOST_BYTES_IN_MEMORY = 8 * 2**20


class LogFile:
    """One engine's log. Read at `path`, which is of this process; close it at last."""

    def __init__(self, fd: int, name: str, problem: str | None, *, in_memory: bool) -> None:
        self.problem = problem  # why it is not kept on disk, as last seen
        self.path = Path(f"/proc/self/fd/{fd}")
        self.most_bytes = MOST_BYTES_IN_MEMORY if in_memory else MOST_BYTES
        self._fd = fd
        self._name = name
        self._in_memory = in_memory

    @classmethod
    def make(cls, file: Path) -> Self:
        """The file, or memory where it cannot be written.

        Raises:
            OSError: when there can be neither.

        """
        try:
            file.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if (problem := _of_the_file(fd) or _of_the_disk(fd)) is None:
                return cls(fd, str(file), None, in_memory=False)
            os.close(fd)
        except OSError as error:
            problem = error.strerror or str(error)
        problem = f"its output is not kept on disk: cannot write {file}: {problem}"
        return cls(os.memfd_create("vllm-proxy log"), str(file), problem, in_memory=True)

    @classmethod
    def of_running(cls, pid: int, name: str) -> Self:
        """That of an engine of an earlier daemon, by what is on record; its name may be gone.

        Raises:
            OSError: when nothing can be held open.

        """
        try:
            return cls(os.open(name, os.O_RDWR | os.O_CLOEXEC), name, None, in_memory=name.startswith("/proc/"))
        except OSError:
            output = Path(f"/proc/{pid}/fd/1")
            if output.is_symlink() and str(output.readlink()) == f"{name} (deleted)":
                return cls(os.open(output, os.O_RDWR | os.O_CLOEXEC), name, None, in_memory=False)
        return cls(os.memfd_create("vllm-proxy log"), name, f"its log cannot be read: {name}", in_memory=True)

    def recorded(self, pid: int) -> str:
        """Where a later daemon finds it while process `pid`, whose output it takes, lives."""
        return f"/proc/{pid}/fd/1" if self._in_memory else self._name

    def check(self) -> str | None:
        """Why it is not kept on disk any more, None where it is. May wait for the disk."""
        if self._in_memory:
            return self.problem
        try:
            gone = os.fstat(self._fd).st_nlink == 0
            what = f"{self._name} was removed" if gone else _of_the_disk(self._fd)
        except OSError as error:
            what = error.strerror
        self.problem = f"its output is not kept on disk: {what}" if what else None
        return self.problem

    def close(self) -> None:
        """It is read no more."""
        os.close(self._fd)


def _of_the_file(fd: int) -> str | None:
    """What would block an engine that writes to it, such as a FIFO that nobody reads."""
    try:
        refuse_special(os.fstat(fd))
    except UnusableFileError as error:
        return error.strerror
    return None


def _of_the_disk(fd: int) -> str | None:
    disk = os.fstatvfs(fd)
    if disk.f_flag & os.ST_RDONLY:
        return os.strerror(errno.EROFS)
    if disk.f_blocks and disk.f_bavail * disk.f_frsize < _ROOM_BYTES:
        return os.strerror(errno.ENOSPC)
    return None
