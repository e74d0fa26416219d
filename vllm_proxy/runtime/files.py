"""The daemon's own files and folders: read, replaced atomically, removed.

They are acted on later, possibly as root: so no symbolic link is followed, and what another user may have written is
not trusted (tests/engine/test_state.py). `replace_file` is the one atomic replacement here: a temporary file, fsync,
rename.
"""

import contextlib
import ctypes
import errno
import grp
import os
import pwd
import re
import secrets
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from vllm_proxy.errors import StartupError
from vllm_proxy.runtime.regular_file import read_regular_file, refuse_special

log = structlog.get_logger()

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_TEMPORARY = ".new"
# Of statx(2), which Python does not offer yet.
_AT_SYMLINK_NOFOLLOW, _STATX_BTIME, _STATX_BYTES, _BTIME_OFFSET = 0x100, 0x800, 256, 80
_AT_FDCWD, _ATTRIBUTES_OFFSET, _IMMUTABLE, _APPEND, _MOUNT_ROOT = -100, 8, 0x10, 0x20, 0x2000
_CAP_CHOWN = 1  # its bit


def trusted(uid: int) -> bool:
    """Whether what a user has written may be acted on: this user's own, and root's."""
    return uid in {os.geteuid(), 0}


def refuse_foreign(folder: Path) -> None:
    """A folder is this user's or root's; one that others may write is warned of.

    Raises:
        StartupError: it belongs to another user, and what that one writes would be acted on with this user's rights.
        OSError: it cannot be read.

    """
    found = folder.stat()
    if not trusted(found.st_uid):
        raise StartupError(
            f"cannot use {folder}: it belongs to {user_name(found.st_uid)}, and this is {user_name(os.geteuid())}; "
            "run as its owner, or choose another with --state-dir"
        )
    if found.st_mode & _OTHERS_MAY_WRITE:
        log.warning("other users may write into a folder of the daemon's: whoever can decides which engines are ended",
                    folder=str(folder), mode=f"{stat.S_IMODE(found.st_mode):04o}")  # fmt: skip


def refuse_replaced(lock: int | None, path: Path) -> None:
    """The lock that is held is not another one's by now; None is held by nobody.

    Raises:
        OSError: its folder was removed, and another process has made and locked a new one.

    """
    if lock is not None:
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(lock), path.lstat()):
                raise OSError(f"{path.parent} was removed, and is another daemon's now; restart this one")


def become_owner(folder: Path) -> None:
    """As root, become the owner of a folder for good: what that user wrote is then acted on with that user's rights.

    Nothing changes for another user, nor where there is no such folder.

    Raises:
        StartupError: it is root's, and others may write into it, or the way there is another user's link; or its owner
            cannot use it.

    """
    if os.geteuid() != 0:
        return
    try:
        found, link = folder.stat(), folder.lstat()
    except OSError:
        return
    if found.st_uid == 0:
        if found.st_mode & _OTHERS_MAY_WRITE or link.st_uid != 0:
            raise StartupError(f"cannot act as root on {folder}: other users may write there; run as one of them")
        return
    try:
        groups = os.getgrouplist(pwd.getpwuid(found.st_uid).pw_name, found.st_gid)
    except KeyError:  # a user without a name, as in containers
        groups = [found.st_gid]
    os.setgroups(groups)
    os.setresgid(found.st_gid, found.st_gid, found.st_gid)
    os.setresuid(found.st_uid, found.st_uid, found.st_uid)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise StartupError(
            f"cannot use {folder}: its owner, {user_name(found.st_uid)}, may not; look at the folders above it"
        )


def user_name(uid: int) -> str:
    """The name of a user; the number of one that has none, as in containers."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """As `user_name`, of a group."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def read_file(path: Path) -> bytes:
    """A regular file of this user's or root's.

    Raises:
        OSError: it is something else, a link, too large, or cannot be read; FileNotFoundError: it is not there.

    """

    def refuse(found: os.stat_result) -> None:
        refuse_special(found)
        if not trusted(found.st_uid):
            raise PermissionError(errno.EPERM, f"it belongs to {user_name(found.st_uid)}", str(path))

    return read_regular_file(path, flags=os.O_NOFOLLOW, refuse=refuse)


def replace_file(
    path: Path,
    data: bytes,
    mode: int = 0o600,
    *,
    durable: bool = True,
    finish: Callable[[int], None] | None = None,
    fsync: Callable[[int], None] = os.fsync,
) -> None:
    """Replace a file atomically: it has the old content or `data`. `durable`: also after a crash of the machine.

    `finish` is called with the new file's descriptor before the rename; `fsync` makes a descriptor's data durable.

    Raises:
        OSError: it cannot be written; the old one is as it was.

    """
    with _opened(path.parent) as folder:
        temporary = f".{path.name}.{secrets.token_hex(8)}{_TEMPORARY}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, mode, dir_fd=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                if finish is not None:
                    finish(fd)
                if durable:
                    fsync(fd)
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        if durable:
            with contextlib.suppress(OSError):  # a file system that cannot sync a folder has the new one all the same
                fsync(folder)


def created_at(name: str, folder: int) -> float:
    """When a file below a folder's descriptor was made, in seconds of the epoch; links are not followed.

    Where the kernel does not report that: when it was last changed.

    Raises:
        OSError: it is not there, or cannot be looked at.

    """
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    buffer = _statx(folder, name, _STATX_BTIME)
    if buffer is not None:
        (mask,) = struct.unpack_from("=I", buffer, 0)
        seconds, nanoseconds = struct.unpack_from("=qI", buffer, _BTIME_OFFSET)
        if mask & _STATX_BTIME:
            return float(seconds + nanoseconds / 1e9)
    return min(found.st_mtime, found.st_ctime)


def is_mounted(path: Path) -> bool:
    """Whether something is mounted right there; False also where the kernel does not tell."""
    return bool(_attributes(path) & _MOUNT_ROOT)


def is_immutable(path: Path) -> bool:
    """Whether nobody may replace it, root neither (`chattr +i`, `+a`); False also where the kernel does not tell."""
    return bool(_attributes(path) & (_IMMUTABLE | _APPEND))


def may_give_away() -> bool:
    """Whether this thread may give its files to other users and groups: CAP_CHOWN."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/thread-self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) & _CAP_CHOWN)
    return os.geteuid() == 0


def _attributes(path: Path) -> int:
    buffer = _statx(_AT_FDCWD, path, 0)
    return 0 if buffer is None else int(struct.unpack_from("=Q", buffer, _ATTRIBUTES_OFFSET)[0])


def _statx(folder: int, name: str | Path, mask: int) -> ctypes.Array[ctypes.c_char] | None:
    """What statx(2) says of a file; links are not followed. None where it says nothing."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    statx = getattr(ctypes.CDLL(None), "statx", None)
    if statx and statx(folder, os.fsencode(name), _AT_SYMLINK_NOFOLLOW, mask, buffer) == 0:
        return buffer
    return None


def remove_temporaries(path: Path) -> None:
    """Remove what a daemon that was killed while it replaced a file has left beside it."""
    temporary = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}{re.escape(_TEMPORARY)}")
    for left in path.parent.iterdir():
        if temporary.fullmatch(left.name):
            with contextlib.suppress(OSError):
                left.unlink()


def remove_tree(folder: Path) -> None:
    """Remove a folder of this user's with all that is in it. A link, and a folder of somebody else's, is left alone."""
    try:
        found = folder.lstat()
    except OSError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        log.error("a temporary folder is none of ours and is left alone", folder=str(folder))
        return
    shutil.rmtree(folder, ignore_errors=True)  # follows no link below it


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
