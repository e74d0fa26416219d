"""Statistics of a model's engines: how long starts and wakes took, what memory they had, and why they failed.

For the metrics and for estimates of a start. It only counts: nothing is decided here.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.domain.histogram import Histogram
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.engine.nap import Failed, Operation

MOST_SLEEP_FAILURES = 2  # naps in a row, each from falling asleep until it serves again
_START_SECONDS = 60.0  # of a model that has never started
_WAKE_SECONDS = 2.0  # of an engine that has never woken, at most:
_WAKE_PART = 0.1  # of its start
_BUCKETS = (1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)  # seconds
_NAPS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


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

    def residue(self, spec: str) -> int | None:
        """Bytes that the last engine of a spec had of each device while it slept; None: not known."""

    def note_residue(self, spec: str, size: int) -> None:
        """An engine of a spec has so many bytes of each device while it sleeps."""


class History:
    """Of one model."""

    def __init__(self, kept: Kept, fingerprint: Callable[[EngineSpec], str]) -> None:
        self.failures: Counter[tuple[str, Reason]] = Counter()  # by instance and reason
        self.startups = Histogram(_BUCKETS)
        self.sleeps = Histogram(_NAPS)
        self.wakes: dict[int, Histogram] = {}  # by level
        self.sleep_failures: Counter[Operation] = Counter()
        self._failed_naps: dict[str, list[str]] = {}  # by fingerprint: why those in a row have failed
        self._last_wakes: dict[str, float] = {}  # seconds, by fingerprint
        self._kept = kept
        self._fingerprint = fingerprint

    def started(self, spec: EngineSpec, seconds: float) -> None:
        """An engine was ready so long after its start."""
        self.startups.add(seconds)
        self._kept.add_start(self._fingerprint(spec), seconds)

    def failed(self, instance: str, reason: Reason) -> None:
        """An engine ended without being asked to, or could not be started."""
        self.failures[instance, reason] += 1

    def slept(self, seconds: float) -> None:
        """An engine was put to sleep, which took so long. Whether that was good is known when it serves again."""
        self.sleeps.add(seconds)

    def woke(self, spec: EngineSpec, level: int, seconds: float) -> None:
        """An engine of this spec, which slept at this level, serves again; its wake took so long."""
        self.wakes.setdefault(level, Histogram(_NAPS)).add(seconds)
        self._last_wakes[self._fingerprint(spec)] = seconds
        self._failed_naps.pop(self._fingerprint(spec), None)

    def nap_failed(self, spec: EngineSpec, failed: Failed) -> None:
        """An engine of this spec could not be put to sleep, or not be woken."""
        self.sleep_failures[failed.operation] += 1
        self._failed_naps.setdefault(self._fingerprint(spec), []).append(failed.message)

    def why_awake(self, spec: EngineSpec) -> str | None:
        """Why engines of this spec are not put to sleep any more; None: they are, where they can."""
        failures = self._failed_naps.get(self._fingerprint(spec), [])
        if len(failures) < MOST_SLEEP_FAILURES:
            return None
        return (
            f"{failures[-1]}; until its keys change or the daemon is restarted, since that was the second time in a row"
        )

    def keep_residue(self, spec: EngineSpec, size: int) -> None:
        """An engine of this spec has so many bytes of each device while it sleeps."""
        self._kept.note_residue(self._fingerprint(spec), size)

    def residue(self, spec: EngineSpec) -> int | None:
        """Bytes that the last engine of this spec had of each device while it slept; None: not known."""
        return self._kept.residue(self._fingerprint(spec))

    def start_seconds(self, spec: EngineSpec) -> float:
        """What a start of this spec takes; a guess."""
        past = self.past_starts(spec)
        return statistics.median(past) if past else _START_SECONDS

    def wake_seconds(self, spec: EngineSpec) -> float:
        """What a wake of an engine of this spec takes; a guess."""
        guess = min(_WAKE_SECONDS, self.start_seconds(spec) * _WAKE_PART)
        return self._last_wakes.get(self._fingerprint(spec), guess)

    def past_starts(self, spec: EngineSpec) -> Sequence[float]:
        """How many seconds the last starts of this spec took, those under earlier daemons too."""
        return self._kept.starts(self._fingerprint(spec))

    def memory(self, spec: EngineSpec) -> int | None:
        """Bytes that the last engine of this spec had of each device, as measured; None: not known."""
        return self._kept.memory(self._fingerprint(spec))
