"""Statistics of a model's engines: how long their starts took, their memory, their tokens, and why they failed.

For the metrics and for estimates of a start. It only counts: nothing is decided here.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.domain.histogram import Histogram
from vllm_proxy.domain.lifecycle import Reason

_START_SECONDS = 60.0  # of a model that has never started
_BUCKETS = (1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)  # seconds


class Kept(Protocol):
    """What is kept of engines over restarts of the daemon, by fingerprint."""

    def starts(self, spec: str) -> Sequence[float]:
        """How many seconds the last starts of a spec took."""

    def add_start(self, spec: str, seconds: float) -> None:
        """One more start of a spec."""

    def memory(self, spec: str) -> int | None:
        """Bytes that the last engine of a spec had of each device; None: not known."""

    def note_memory(self, spec: str, size: int) -> None:
        """An engine of a spec has so many bytes of each device."""


class History:
    """Of one model."""

    def __init__(self, kept: Kept, fingerprint: Callable[[EngineSpec], str]) -> None:
        self.failures: Counter[tuple[str, Reason]] = Counter()  # by instance and reason
        self.startups = Histogram(_BUCKETS)
        self.tokens: Counter[str] = Counter()  # by kind, as the engines themselves count; none: they do not
        self._kept = kept
        self._fingerprint = fingerprint

    def started(self, spec: EngineSpec, seconds: float) -> None:
        """An engine was ready so long after its start."""
        self.startups.add(seconds)
        self._kept.add_start(self._fingerprint(spec), seconds)

    def failed(self, instance: str, reason: Reason) -> None:
        """An engine ended without being asked to, or could not be started."""
        self.failures[instance, reason] += 1

    def start_seconds(self, spec: EngineSpec) -> float:
        """What a start of this spec takes; a guess."""
        past = self.past_starts(spec)
        return statistics.median(past) if past else _START_SECONDS

    def past_starts(self, spec: EngineSpec) -> Sequence[float]:
        """How many seconds the last starts of this spec took, those under earlier daemons too."""
        return self._kept.starts(self._fingerprint(spec))

    def memory(self, spec: EngineSpec) -> int | None:
        """Bytes that the last engine of this spec had of each device, as measured; None: not known."""
        return self._kept.memory(self._fingerprint(spec))
