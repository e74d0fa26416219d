"""Reads regular files, whole ones up to a size limit; for files that a user names, such as the configuration.

A FIFO or a device could block its reader for ever, or give something else each time. So the type is checked on the open
descriptor before anything is read.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 16 * 2**20

_KINDS = {
    stat.S_IFIFO: "a pipe or FIFO, which can be read once",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


class UnusableFileError(OSError):
    """It is there, and cannot be read as a file is. `strerror` says why."""


def is_missing(path: Path) -> bool:
    """Whether that is certain: in a folder that is closed to this user something may be there."""
    try:
        return not path.exists()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder, as far as this user may look; `Path.is_dir` raises where that is not far enough."""
    try:
        return path.is_dir()
    except OSError:
        return False


def refuse_special(found: os.stat_result) -> None:
    """Nothing for a regular file.

    Raises:
        UnusableFileError: for anything else.

    """
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        why = f"it is {kind}; expected a regular file, since it is read again and again"
        raise UnusableFileError(errno.EINVAL, why)


@contextlib.contextmanager
def open_regular_file(
    path: Path, *, flags: int = 0, refuse: Callable[[os.stat_result], None] = refuse_special
) -> Iterator[BinaryIO]:
    """A regular file, to be read while the block lasts.

    `flags`: more of open(2). `refuse` raises for what is not to be read, once it is open.

    Raises:
        UnusableFileError: it is no regular file.
        OSError: as it comes.

    """
    try:
        # Opened without waiting for a FIFO's writer, and without making a terminal this process's own.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | flags)
    except OSError as error:
        if error.errno in {errno.ENXIO, errno.ENODEV}:  # sockets and devices refuse already here
            refuse_special(path.stat())
        raise
    try:
        refuse(os.fstat(descriptor))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_regular_file(
    path: Path,
    most: int = MOST_BYTES,
    *,
    flags: int = 0,
    refuse: Callable[[os.stat_result], None] = refuse_special,
) -> bytes:
    """The bytes of a regular file; it blocks for no longer than the file's disk does.

    Raises:
        UnusableFileError: it is no regular file, or has more than `most` bytes.
        OSError: as it comes.

    """
    with open_regular_file(path, flags=flags, refuse=refuse) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UnusableFileError(errno.EFBIG, f"it is larger than {most // 2**20} MiB")
    return data
