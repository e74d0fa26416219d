"""The configuration file on disk: read, and replaced atomically.

Whatever fails, the file is the old one or the new one, whole (tests/fleet/test_store.py). Links, owner, mode and
attributes stay as they are. Everything here blocks: callers run it in a thread.
"""

import contextlib
import errno
import fcntl
import os
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from vllm_proxy.errors import RequestError
from vllm_proxy.runtime.files import (
    group_name,
    is_immutable,
    is_mounted,
    may_give_away,
    remove_temporaries,
    replace_file,
    user_name,
)
from vllm_proxy.runtime.regular_file import MOST_BYTES, read_regular_file

_NIX_STORE = Path("/nix/store")
_LOCK_SECONDS, _LOOK_SECONDS = 2.0, 0.01
_NEW_MODE = 0o640  # it may hold keys; umask may narrow it
_NOT_PERMITTED = {errno.EACCES, errno.EPERM}
_READ_ONLY = {
    errno.EROFS: "its file system is read-only; change it where it comes from",
    errno.EBUSY: "it is mounted as a single file; mount its folder instead",
}


class Store:
    """One file."""

    def __init__(self, file: Path, fsync: Callable[[int], None] = os.fsync, *, owner_of: Path | None = None) -> None:
        """`fsync`: makes a descriptor's data durable. `owner_of`: the file whose owner a new one gets, if root may."""
        self.file = file
        self._fsync = fsync
        self._owner_of = owner_of

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            OSError: as it comes, with a `strerror` for people.

        """
        return read_regular_file(self.file)

    def replace(self, data: bytes, expected: bytes) -> None:
        """Write it anew: symbolic links stay and their target is written, with its mode, owner and attributes.

        `expected`: what is there; b"" also where nothing is. Another daemon or command may have written meanwhile.

        Raises:
            RequestError: `config_read_only`, `config_not_written` or `revision_mismatch`; nothing has changed then.

        """
        target = Path(os.path.realpath(self.file))
        before = self._before(target)
        if before is not None and not stat.S_ISREG(before.st_mode):
            raise RequestError("config_not_written", f"cannot write {self.file}: it is no regular file")
        if len(data) > MOST_BYTES:
            raise RequestError("config_not_written", f"cannot write {self.file}: more than {MOST_BYTES} bytes")
        mode, finish = _NEW_MODE, self._give
        if before is not None:
            mode, finish = 0o600, partial(_take_over, target, before)
        try:
            with _locked(target.parent):
                if (read_regular_file(target) if target.exists() else b"") != expected:  # looked at in its turn
                    msg = f"cannot write {self.file}: another program has just done so; try again"
                    raise RequestError("revision_mismatch", msg)
                replace_file(target, data, mode, finish=finish, fsync=self._fsync)
        except OSError as error:
            raise self._refusal(error) from error

    def tidy(self) -> None:
        """Remove what a daemon that was killed while it wrote has left beside the file, unless somebody writes now."""
        target = Path(os.path.realpath(self.file))
        with contextlib.suppress(OSError), _locked(target.parent, wait=False):
            remove_temporaries(target)

    def read_only(self) -> str | None:
        """Why `replace` would raise `config_read_only`: its message, without writing anything; None: it would not."""
        target = Path(os.path.realpath(self.file))
        try:
            before = self._before(target)
            if os.statvfs(target.parent).f_flag & os.ST_RDONLY:
                return self._refusal(OSError(errno.EROFS, "")).message
        except RequestError as error:
            return error.message if error.code == "config_read_only" else None
        except OSError as error:
            refusal = self._refusal(error)
            return refusal.message if refusal.code == "config_read_only" else None
        if before is not None and is_mounted(target):
            return self._refusal(OSError(errno.EBUSY, "")).message
        return None if _is_permitted(target, before) else self._refusal(OSError(errno.EPERM, "")).message

    def _before(self, target: Path) -> os.stat_result | None:
        """The file that is to be replaced; None where there is none.

        Raises:
            RequestError: nobody may replace it, or it cannot be looked at.

        """
        if target.is_relative_to(_NIX_STORE):
            raise self._read_only("it is a part of the Nix store; change it where it is made, then reload")
        try:
            before = target.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refusal(error) from error
        if not before.st_mode & 0o222:
            raise self._read_only("it has no write bit; `chmod u+w` it, or change it where it is made, then reload")
        return before

    def _give(self, new: int) -> None:
        """Made by root beside a file of somebody else's, it is to be read by who reads that one."""
        if self._owner_of is not None and os.geteuid() == 0:
            found = self._owner_of.stat()
            os.fchown(new, found.st_uid, found.st_gid)

    def _refusal(self, error: OSError) -> RequestError:
        if error.errno in _NOT_PERMITTED:
            return self._read_only(_not_permitted(Path(os.path.realpath(self.file))))
        if error.errno in _READ_ONLY:
            return self._read_only(_READ_ONLY[error.errno])
        way_out = "; make room on the disk" if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
        msg = f"cannot write {self.file}: {error.strerror or error}{way_out}; nothing has changed"
        return RequestError("config_not_written", msg)

    def _read_only(self, why: str) -> RequestError:
        return RequestError("config_read_only", f"cannot write {self.file}: {why}")


def _is_permitted(target: Path, before: os.stat_result | None) -> bool:
    """Whether the system lets this user replace a file, as far as it can be asked beforehand."""
    if not os.access(target.parent, os.W_OK | os.X_OK, effective_ids=True) or is_immutable(target.parent):
        return False
    if before is None:
        return True
    ours = before.st_uid == os.geteuid() and before.st_gid in {os.getegid(), *os.getgroups()}
    return (ours or may_give_away()) and not is_immutable(target)


def _not_permitted(target: Path) -> str:
    """Why this user may not replace a file: it or its folder may be somebody else's, as when root has edited it."""
    folder, us = target.parent, os.geteuid()
    try:
        closed = not os.access(folder, os.W_OK | os.X_OK, effective_ids=True)
        owners = {place: place.stat().st_uid for place in (folder, target) if place.exists()}
    except OSError:
        return "the daemon's user may not look at it; give it the file and its folder"
    needed = [place for place in (folder, target) if owners.get(place, us) != us and (closed or place is target)]
    if needed:
        names = " and ".join("it" if place is target else "its folder" for place in needed)
        whose = " and ".join(sorted({user_name(owners[place]) for place in needed}))
        places = " ".join(shlex.quote(str(place)) for place in needed)
        verb = "belongs" if len(needed) == 1 else "belong"
        return f"{names} {verb} to {whose}; `chown {user_name(us)} {places}` lets the daemon replace it"
    if closed:
        return f"its folder has no write bit; `chmod u+wx {shlex.quote(str(folder))}`"
    if target.exists() and (group := target.stat().st_gid) not in {os.getegid(), *os.getgroups()}:
        mine, file = group_name(os.getegid()), shlex.quote(str(target))
        return f"it belongs to the group {group_name(group)}; `chgrp {mine} {file}` lets the daemon replace it"
    return "the system does not permit it; is the file immutable (lsattr)?"


def _take_over(old: Path, before: os.stat_result, new: int) -> None:
    """Give a new file's descriptor the owner, the mode and the attributes of the old one."""
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(new, before.st_uid, before.st_gid)
    os.fchmod(new, stat.S_IMODE(before.st_mode))
    with contextlib.suppress(OSError):  # access control lists and labels, where the file system has them
        for name in os.listxattr(old):
            with contextlib.suppress(OSError):
                os.setxattr(new, name, os.getxattr(old, name))


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """For what is read and then written: each daemon and each command takes this turn, and editors do not.

    Whoever may read the folder can hold it, so it is waited for no longer than a writer takes.

    Raises:
        BlockingIOError: where somebody else has it, and it is not waited for.

    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    give_up = time.monotonic() + _LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                if time.monotonic() < give_up:
                    time.sleep(_LOOK_SECONDS)
                    continue
            except OSError:  # a file system without locks
                pass
            break
        yield
    finally:
        os.close(descriptor)
