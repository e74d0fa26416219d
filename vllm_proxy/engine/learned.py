"""What engines taught about their specs, over restarts of the daemon: numbers by fingerprint, in a file of its own.

For the state directory. Only estimates depend on it, so a file that cannot be read counts as empty, and one that cannot
be written costs nothing but what it would have told the next daemon.
"""

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from vllm_proxy.runtime import files

_SPECS_KEPT = 200  # those that something was learned of last


class Learned:
    """The last `kept` numbers of each spec, in the table `name` of a file. `write` replaces that file."""

    def __init__(self, file: Path, name: str, kept: int, write: Callable[[Path, Mapping[str, object]], None]) -> None:
        self.file = file
        self._name = name
        self._kept = kept
        self._write = write
        self._found: dict[str, list[float]] | None = None  # read when first asked for

    def of(self, spec: str) -> Sequence[float]:
        """What was learned of a spec, by its fingerprint; the last is the newest."""
        return self._all().get(spec, [])

    def add(self, spec: str, number: float) -> None:
        """Something was learned of a spec."""
        every = self._all()
        mine = [*every.pop(spec, []), number][-self._kept :]
        self._found = dict(list(every.items())[1 - _SPECS_KEPT :]) | {spec: mine}
        self._write(self.file, {self._name: self._found})

    def _all(self) -> dict[str, list[float]]:
        if self._found is None:
            try:
                document = tomllib.loads(files.read_file(self.file).decode())
                found = msgspec.convert(document[self._name], dict[str, list[float]])
                self._found = {spec: [one for one in numbers if 0 <= one < math.inf] for spec, numbers in found.items()}
            except (OSError, ValueError, KeyError, RecursionError):
                self._found = {}
        return self._found
