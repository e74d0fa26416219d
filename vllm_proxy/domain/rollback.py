"""Decides which engine spec a model runs: the file's, or the last good one while the file's fails (rollback).

For `decide`. A spec with which an engine became ready is kept until another one succeeds, or until it fails itself.
Pure values: the check before a start, and the log, are in `fleet/model.py`; `rollout` decides which instances change
over when.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason, State

_BY_CHANCE = frozenset({Reason.PORT_IN_USE, Reason.NOT_ENDED})
_GOOD = frozenset({State.READY, State.SLEEPING})  # it serves, or has served
_IDLE = frozenset({State.STOPPED, State.UNLOADING})


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one instance says about the spec that it runs."""

    engine: EngineSpec
    state: State
    failure: Diagnosis | None  # why its last engine failed


@dataclass(frozen=True, slots=True)
class Rollback:
    """Of one model."""

    wanted: EngineSpec  # the file's
    good: EngineSpec | None = None  # the last one that an engine was ready with
    checked: EngineSpec | None = None  # nothing is known against it
    failed: Diagnosis | None = None  # why the file's spec is not run, but the good one

    def change(self, wanted: EngineSpec) -> "Rollback":
        """The file asks for this; what failed before is tried again."""
        return replace(self, wanted=wanted, checked=None, failed=None)

    def check_ended(self, found: Diagnosis | None) -> "Rollback":
        """What can be said of the wanted spec without a start; None: nothing against it."""
        return replace(self, checked=self.wanted, failed=found or self.failed)

    @property
    def refusal(self) -> Diagnosis | None:
        """The failure as the model shows it."""
        if self.failed is None:
            return None
        kept = "the change failed and what was ready before is kept; the next edit tries again"
        return Diagnosis(Reason.REPLACEMENT_FAILED, f"{kept}: {self.failed.message}", self.failed.changes)

    @property
    def needs_check(self) -> bool:
        """Whether the wanted spec would replace a good one, and nobody has looked at it yet."""
        return self.good not in (None, self.wanted) and self.failed is None and self.checked != self.wanted

    @property
    def target(self) -> EngineSpec:
        """What the instances are to run now."""
        if self.good is None or not (self.failed or self.needs_check):
            return self.wanted
        return self.good

    def update(self, attempts: Sequence[Attempt]) -> "Rollback":
        """What follows from how the instances fare."""
        now = self._with_good(attempts)
        if now.good in (None, now.wanted) or now.failed or now.needs_check:
            return now
        failures = (one.failure for one in attempts if one.engine == now.wanted)
        return replace(now, failed=next((why for why in failures if why and not _is_by_chance(why)), None))

    def _with_good(self, attempts: Sequence[Attempt]) -> "Rollback":
        active = [one for one in attempts if one.state not in _IDLE]
        ready = [one.engine for one in active if one.state in _GOOD]
        now = self
        if now.wanted in ready:
            now = replace(now, good=now.wanted, failed=None)
        elif ready and now.good is None:
            now = replace(now, good=ready[0])
        if active and all(one.state is State.ERROR and one.engine == now.good for one in active):
            now = replace(now, good=None, failed=None)  # it is good no more
        return now


def _is_by_chance(why: Diagnosis) -> bool:
    """Whether it says nothing about the spec."""
    return why.of_machine or why.reason in _BY_CHANCE
