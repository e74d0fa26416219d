"""What every source of devices has in common: `nvml`, `amdgpu`, `machine_memory` and `device_file`.

A source is asked in a thread, since each of them may block. One that cannot say how things are raises, and never
answers with less than there is: `devices` decides what counts then.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from vllm_proxy.domain.inventory import Seen
from vllm_proxy.engine.ownership import Owned


class SourceError(Exception):
    """The devices cannot be looked at. The message says why, without a full stop."""


@dataclass(frozen=True, slots=True)
class Sight:
    """All devices, as they are now. `problem`: what is wrong with those that are missing."""

    devices: tuple[Seen, ...] = ()
    problem: str | None = None


class Source(Protocol):
    """Where devices are looked at. Called by one thread at a time."""

    def look(self, engines: Mapping[str, Owned]) -> Sight:
        """What is there. `engines`: ours that run, by instance.

        Raises:
            SourceError: it cannot be told.
            OSError: as it comes.

        """

    def close(self) -> None:
        """Let go of what it has open. It may be asked again after it."""
