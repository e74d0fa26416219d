"""Devices that a TOML file describes, for tests and for machines whose devices nothing else reports.

Each line is a GPU as CUDA counts them: `"0" = {total = "80GiB", free = "12GiB"}`; without `free` it is not measured.
The file is read anew at every look, and counts whole or not at all: somebody may just be writing it.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from vllm_proxy.domain.inventory import Seen
from vllm_proxy.domain.ledger import Kind
from vllm_proxy.domain.toml import dotted
from vllm_proxy.domain.units import parse_size
from vllm_proxy.engine.device_source import Sight, SourceError
from vllm_proxy.engine.ownership import Owned
from vllm_proxy.runtime.regular_file import read_regular_file

_KEYS = {"total", "free"}
_MOST_BYTES = 2**20
_NOT_IN_A_NAME = frozenset(", \t\0")  # CUDA_VISIBLE_DEVICES could not carry it


class DeviceFile:
    """The source that is a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def look(self, _: Mapping[str, Owned], /) -> Sight:
        """What it says. Who holds what is not known.

        Raises:
            SourceError: it cannot be read, or something else stands in it; the message names it.

        """
        try:
            table = tomllib.loads(read_regular_file(self._path, _MOST_BYTES).decode())
        except OSError as error:
            raise SourceError(f"cannot read {self._path}: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise SourceError(f"{self._path} is no TOML") from None
        if not table:
            raise SourceError(f'{self._path} names no device; write a line such as "0" = {{total = "80GiB"}}')
        try:
            return Sight(tuple(_device(name, value) for name, value in table.items()))
        except _InvalidError as error:
            raise SourceError(f"{self._path}: {error}") from None

    def close(self) -> None:
        """Nothing is open."""


class _InvalidError(Exception):
    """Something else than a device. Says nothing of what stands there: the file may be one that was not meant."""


def _device(name: str, value: object) -> Seen:
    if not name or _NOT_IN_A_NAME & set(name):
        raise _InvalidError("expected the index of a device as the name of each table")
    if not isinstance(value, Mapping) or "total" not in value or value.keys() - _KEYS:
        raise _InvalidError(f"{dotted([name])}: expected a table with total and free")
    try:
        total = parse_size(value["total"])
        free = parse_size(value["free"]) if "free" in value else None
    except ValueError:
        raise _InvalidError(f'{dotted([name])}: expected bytes, or a size such as "80GiB"') from None
    if not total or (free is not None and free > total):
        raise _InvalidError(f"{dotted([name])}: expected a total above 0, and no more free than that")
    index = int(name) if name.isascii() and name.isdigit() else None
    return Seen(name, name, index, "as the file says", Kind.GPU, unified=False, total=total, free=free, visible=name)
