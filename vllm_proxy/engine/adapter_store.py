"""Keeps a snapshot of each adapter that engines are given: $STATE/adapters/DIGEST/, which nobody changes.

vLLM reads an adapter that fell out of its memory once more, at the next request for it: where its files are gone, the
whole engine dies. So a snapshot stays for as long as any engine may read it. Its digest is over its files, so another
content is another path, which vLLM's prefix cache takes for its key.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import structlog

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.engine.adapter_source import CONFIG, WEIGHTS, AdapterError, Sources
from vllm_proxy.runtime import files
from vllm_proxy.runtime.regular_file import UnusableFileError, open_regular_file
from vllm_proxy.runtime.threads import Offload

log = structlog.get_logger()

_DIGITS = 32  # of a digest
_PIECE, _SHARED = 2**20, 2**28  # bytes at a time
# Between these two file systems, or on this one, or in this sandbox.
_CANNOT_CLONE = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM})
_MOST_BYTES = {CONFIG: 2**20} | dict.fromkeys(WEIGHTS, 64 * 2**30)
_MOST_SNAPSHOTS = 1000
_SPARE_BYTES = 64 * 2**20  # stay free: the daemon's record of its engines is on the same disk
_SECONDS = 900.0  # for gigabytes, read twice and written once
_HIDDEN = "."  # what is half made, and what is on its way out


class _AbandonedError(Exception):
    """Nobody waits for it any more."""


class AdapterStore:
    """The snapshots of one daemon. No two daemons have the same folder."""

    def __init__(self, folder: Path, sources: Sources, offload: Offload = asyncio.to_thread) -> None:
        """`folder`: in the state directory. `offload`: runs what uses the disk in a thread."""
        self._folder = folder
        self._sources = sources
        self._offload = offload
        self._holders = Counter[Path]()
        self._removing = asyncio.Lock()  # from the decision that nobody needs one until it is out of the way

    async def open(self) -> None:
        """Make the folder, and remove what a daemon that was killed has left half made.

        Raises:
            OSError: it cannot be made.
            StartupError: it is somebody else's.

        """
        await self._offload(self._open)

    def is_own(self, folder: Path) -> bool:
        """Whether it is, or was, a snapshot of this store."""
        return folder.parent == self._folder

    @contextlib.asynccontextmanager
    async def held(self, spec: EngineSpec, path: str, *, is_hub_id: bool) -> AsyncIterator[Path]:
        """The snapshot of what an adapter's path, or its id of the hub, means now. No sweep removes it in the block.

        Raises:
            AdapterError: there is no such adapter, or no room for it.

        """
        source = await self._sources.find(spec, path, is_hub_id=is_hub_id)
        abandoned = threading.Event()
        try:
            async with asyncio.timeout(_SECONDS):
                snapshot = self._folder / await self._offload(_digest_of, source, abandoned)
                self._holders[snapshot] += 1  # from here on no sweep decides against it
                try:
                    async with self._removing:  # but one may have
                        pass
                    await self._offload(self._make, source, snapshot, abandoned)
                except BaseException:
                    self._release(snapshot)
                    raise
        except TimeoutError:
            raise AdapterError(f"cannot copy the adapter in {source}: it takes more than {_SECONDS:g} s") from None
        except OSError as error:
            raise AdapterError(_why(source, error)) from None
        finally:
            abandoned.set()
        try:
            yield snapshot
        finally:
            self._release(snapshot)

    async def sweep(self, used: Callable[[], Iterable[Path]]) -> None:
        """Remove the snapshots that nobody holds or uses. `used` is called once, on the loop, as that is decided."""
        try:
            async with self._removing:
                found = await self._offload(self._snapshots)
                kept = {*used(), *self._holders}
                gone = await self._offload(self._hide, [folder for folder in found if folder not in kept])
            for folder in gone:
                await self._offload(files.remove_tree, folder)
        except OSError as error:
            log.warning("snapshots of adapters that nobody uses cannot be removed",
                        folder=str(self._folder), error=str(error))  # fmt: skip

    def _release(self, snapshot: Path) -> None:
        self._holders[snapshot] -= 1
        if not self._holders[snapshot]:
            del self._holders[snapshot]

    # In a thread

    def _open(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        files.refuse_foreign(self._folder)
        for left in self._folder.glob(f"{_HIDDEN}*"):
            files.remove_tree(left)

    def _snapshots(self) -> list[Path]:
        return [folder for folder in self._folder.iterdir() if not folder.name.startswith(_HIDDEN)]

    def _hide(self, folders: Iterable[Path]) -> list[Path]:
        """Out of the way at once, since the removal of gigabytes takes a while."""
        gone = []
        for folder in folders:
            try:
                gone.append(folder.rename(self._temporary()))
            except OSError as error:
                log.warning("a snapshot of an adapter cannot be removed", folder=str(folder), error=str(error))
        return gone

    def _temporary(self) -> Path:
        return self._folder / f"{_HIDDEN}{secrets.token_hex(8)}"

    def _make(self, source: Path, snapshot: Path, abandoned: threading.Event) -> None:
        """Copy what vLLM reads, unless there is such a snapshot. It is whole, after a crash too, or it is not there.

        Copied, not linked: whoever trains may write into the very same file later. Where the file system can, a copy
        shares its blocks with the original until then.
        """
        if snapshot.is_dir():
            return
        if len(self._snapshots()) >= _MOST_SNAPSHOTS:
            raise OSError(errno.EDQUOT, f"there are {_MOST_SNAPSHOTS} snapshots in {self._folder} already")
        temporary = self._temporary()
        temporary.mkdir(mode=0o700)
        try:
            for name, file in _opened(source):
                self._copy(file, temporary / name, abandoned)
            if _digest_of(temporary, abandoned) != snapshot.name:
                raise OSError(errno.EAGAIN, "it changes while it is read")
            _sync(temporary)
            with contextlib.suppress(OSError):  # somebody else has made the same meanwhile
                temporary.rename(snapshot)
            if not snapshot.is_dir():
                raise OSError(errno.EIO, f"{snapshot} is in the way")
        finally:
            files.remove_tree(temporary)

    def _copy(self, file: BinaryIO, to: Path, abandoned: threading.Event) -> None:
        size = os.fstat(file.fileno()).st_size
        room = os.statvfs(self._folder)
        if size + _SPARE_BYTES > room.f_bavail * room.f_frsize:
            raise OSError(errno.ENOSPC, f"no room on the disk of {self._folder}: it has {size // 2**20 + 1} MiB")
        descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        with os.fdopen(descriptor, "wb") as copy:
            if not _cloned(file, copy, size, abandoned):
                for piece in _pieces(file, abandoned):
                    copy.write(piece)
                copy.flush()
            os.fsync(copy.fileno())


def _cloned(file: BinaryIO, copy: BinaryIO, size: int, abandoned: threading.Event) -> bool:
    """Whether the kernel has made the copy, by sharing blocks where the file system can."""
    done = 0
    try:
        while done < size and (count := os.copy_file_range(file.fileno(), copy.fileno(), min(size - done, _SHARED))):
            done += count
            _give_up(abandoned)
    except OSError as error:
        if error.errno in _CANNOT_CLONE and not done:
            return False
        raise
    return True


def _opened(source: Path) -> Iterator[tuple[str, BinaryIO]]:
    """The files that vLLM reads, one after another, each open until the next is asked for.

    Raises:
        OSError: one is missing, cannot be read, or is larger than is believed.

    """
    for name in (CONFIG, next((name for name in WEIGHTS if (source / name).exists()), WEIGHTS[0])):
        with open_regular_file(source / name) as file:
            if os.fstat(file.fileno()).st_size > _MOST_BYTES[name]:
                raise UnusableFileError(errno.EFBIG, f"{name} is larger than {_MOST_BYTES[name] // 2**20} MiB")
            yield name, file


def _digest_of(source: Path, abandoned: threading.Event) -> str:
    """Of the names and contents of the files that vLLM reads."""
    digest = hashlib.sha256()
    for name, file in _opened(source):
        content = hashlib.sha256()
        for piece in _pieces(file, abandoned):
            content.update(piece)
        digest.update(f"{name} {content.hexdigest()}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def _pieces(file: BinaryIO, abandoned: threading.Event) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        _give_up(abandoned)
        yield piece


def _give_up(abandoned: threading.Event) -> None:
    if abandoned.is_set():
        raise _AbandonedError


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system that cannot sync a folder has it all the same
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(source: Path, error: OSError) -> str:
    why = error.strerror or str(error)
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        missing = Path(error.filename)
        why = f"there is no {missing.name}" if missing.parent.is_dir() else "there is no such folder"
    elif isinstance(error.filename, str):
        why = f"{Path(error.filename).name}: {why}"
    return f"cannot read the adapter in {source}: {why}"
