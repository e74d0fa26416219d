"""What a path of the configuration leads to, a file or the folder of an adapter: its revision, and what is there.

The revision of a file is that of its bytes. Of a folder, whose weights may be large, it is that of the names, sizes and
times of its files.
"""

import os
import stat
from pathlib import Path

from vllm_proxy.domain.adapters import CONFIG
from vllm_proxy.domain.config import revision_of
from vllm_proxy.domain.references import AdapterFolder
from vllm_proxy.runtime.regular_file import is_folder, read_regular_file

_MOST_FILES = 1000  # of one folder
_MOST_CONFIG_BYTES = 2**20


def revision_at(path: Path) -> str:
    """Of what is there, "" where that cannot be read."""
    try:
        return _of_folder(path) if is_folder(path) else revision_of(read_regular_file(path))
    except OSError:
        return ""


def adapter_folder(path: Path) -> AdapterFolder:
    """What is in the folder of an adapter."""
    try:
        if not path.is_dir():
            return AdapterFolder(problem="there is no such folder", has_place=is_folder(path.parent))
    except OSError as error:
        return AdapterFolder(problem=f"its folder cannot be looked at: {error.strerror}", has_place=True)
    if not (revision := revision_at(path)):
        return AdapterFolder(problem=f"its folder cannot be read, or has more than {_MOST_FILES} files")
    try:
        return AdapterFolder(revision, read_regular_file(path / CONFIG, _MOST_CONFIG_BYTES))
    except OSError as error:
        return AdapterFolder(revision, problem=f"cannot read {CONFIG} in it: {error.strerror or error}")


def files_in(folder: Path) -> list[tuple[str, int, int]]:
    """The regular files of a folder, by name: each with its size and when it was changed.

    Raises:
        OSError: it cannot be read, or there are too many.

    """
    found: list[tuple[str, int, int]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if len(found) >= _MOST_FILES:
                msg = f"more than {_MOST_FILES} files"
                raise OSError(msg)
            try:
                status = entry.stat()
            except OSError:  # it has just gone, or is a link to nowhere
                continue
            if stat.S_ISREG(status.st_mode):
                found.append((entry.name, status.st_size, status.st_mtime_ns))
    return sorted(found)


def _of_folder(folder: Path) -> str:
    return revision_of(repr(files_in(folder)).encode())
