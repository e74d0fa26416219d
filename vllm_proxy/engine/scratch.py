"""The engines' temporary folders: signed with the state directory of their daemon, swept where no record names them.

A folder goes with its engine, and after a kill the record leads the next daemon to it. Where that record is lost, with
a state directory that was removed, the next daemon at the same place removes the folder. It must be certain whose that
is: a folder without a signature, of another state directory, of another user, or in use by a process is left alone
(tests/engine/test_scratch.py).
"""

import os
import re
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec
import structlog

from vllm_proxy.engine.proc import Kernel, boot_id, pid_namespace
from vllm_proxy.runtime import files
from vllm_proxy.runtime.regular_file import read_regular_file

log = structlog.get_logger()

_PREFIX = "vp-"  # short: the path of a socket is
NAME = re.compile(rf"{_PREFIX}\w+")  # of a folder
_SIGNATURE = ".vllm-proxy"
_MOST_BYTES = 8192  # of a signature
_LEAST_SECONDS = 60.0  # a younger folder may be of an engine whose process is still to come


class _Signature(msgspec.Struct):
    """Whose a folder is."""

    state: str  # the state directory
    boot: str
    namespace: str  # of the process ids


def make(scratch: Path, state_dir: Path) -> str:
    """A folder of its own for an engine, of mode 0700.

    Raises:
        OSError: there can be none.

    """
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=scratch)
    sign(Path(folder), state_dir)
    return folder


def sign(folder: Path, state_dir: Path) -> None:
    """Say whose it is. Where that cannot be written, the folder is never swept."""
    text = msgspec.json.encode(_Signature(str(state_dir.resolve()), boot_id(), pid_namespace()))
    try:
        (folder / _SIGNATURE).write_bytes(text)
    except OSError as error:
        log.warning("a temporary folder cannot be signed; if its record is lost too, it stays", folder=str(folder),
                    error=str(error))  # fmt: skip


def sweep(scratch: Path, state_dir: Path) -> None:
    """Remove the folders in `scratch` of this state directory, which is locked, that it has no record of. Blocks.

    What a process still uses is reported and left alone: it is an engine that nobody knows any more.
    """
    ours = str(state_dir.resolve())
    try:
        # As text: what cannot be used of a record is on record all the same.
        records = b"".join(read_regular_file(file) for file in sorted(state_dir.glob("engines.toml*")))
        lost = [each for each in _folders(scratch) if each[1].state == ours and os.fsencode(each[0]) not in records]
        users = _users({str(folder) for folder, _ in lost}) if lost else {}
    except OSError as error:
        log.warning("temporary folders cannot be looked at", folder=str(scratch), error=str(error))
        return
    here = boot_id(), pid_namespace()
    for folder, signature in lost:
        if signature.boot == here[0] and signature.namespace != here[1]:
            continue  # its processes are not seen from here
        if (pid := users.get(str(folder))) is not None:
            log.warning("an engine that is on no record runs, and is left alone; end it by hand", pid=pid,
                        folder=str(folder))  # fmt: skip
            continue
        files.remove_tree(folder)
        log.info("the temporary folder of an engine that is gone and on no record was removed", folder=str(folder))


def _folders(scratch: Path) -> Iterator[tuple[Path, _Signature]]:
    for name in filter(NAME.fullmatch, sorted(os.listdir(scratch))):  # noqa: PTH208 - names alone
        found = _signature(scratch / name)
        if found is not None:
            yield scratch / name, found


def _signature(folder: Path) -> _Signature | None:
    """Of a folder of this user's own; None where there is none that can be trusted."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        at = os.open(folder, flags | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        status = os.fstat(at)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            return None
        fd = os.open(_SIGNATURE, flags | os.O_NONBLOCK, dir_fd=at)
        try:
            signed = os.fstat(fd)
            is_whole = stat.S_ISREG(signed.st_mode) and signed.st_size <= _MOST_BYTES
            if not is_whole or time.time() - signed.st_mtime < _LEAST_SECONDS:
                return None
            return msgspec.json.decode(os.read(fd, _MOST_BYTES), type=_Signature)
        finally:
            os.close(fd)
    except (OSError, msgspec.DecodeError):
        return None
    finally:
        os.close(at)


def _users(folders: Collection[str]) -> dict[str, int]:
    """Who uses a folder, by folder: a process that has it in its environment; 0 for who has a socket in it."""
    kernel = Kernel()
    sockets = Path("/proc/net/unix").read_bytes()
    found = {folder: 0 for folder in folders if os.fsencode(f" {folder}/") in sockets}
    # Whatever the variable: a model's `env` may set TMPDIR, but no other that leads there.
    wanted = {folder: re.compile(rb"=%s[/\0]" % re.escape(os.fsencode(folder))) for folder in folders}
    for process in kernel.processes():
        try:
            variables = kernel.environment(process.pid)
        except OSError:
            continue  # it has ended
        for folder, variable in wanted.items():
            if not found.get(folder) and variable.search(variables):  # the first of them is the one to end
                found[folder] = process.pid
    return found
