"""Which engine spec the instances of a model are to run: the file's, or the last good one while the file's fails.

Its one rule: a spec that an engine was ready with is not given up for one that fails.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import structlog

from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.runtime.background import run_once

log = structlog.get_logger()

_BY_CHANCE = frozenset({Reason.PORT_IN_USE, Reason.NOT_ENDED})  # says nothing about the spec


class Instance(Protocol):
    """One instance, as far as it is judged here."""

    spec: ModelSpec

    @property
    def state(self) -> State:
        """What it is now."""

    @property
    def failure(self) -> Diagnosis | None:
        """Why its last engine failed."""


class Check(Protocol):
    """What can be said of a spec before anything is started with it."""

    async def objection(self, model: ModelSpec) -> Diagnosis | None:
        """Why no engine would start with it."""


class Trial:
    """Of one model. `changed` is called when a check has come to its end."""

    def __init__(self, wanted: ModelSpec, check: Check, changed: Callable[[], None]) -> None:
        self.refusal: Diagnosis | None = None  # the file's spec failed; the good one is run
        self._wanted = wanted
        self._check = check
        self._changed = changed
        self._good: EngineSpec | None = None  # the last one that an engine was ready with
        self._checked: EngineSpec | None = None  # nothing is known against it
        self._checking: asyncio.Task[None] | None = None

    def change(self, wanted: ModelSpec) -> None:
        """The file asks for this; what failed before is tried again."""
        self._wanted = wanted
        self.refusal = self._checked = None
        if self._checking is not None:
            self._checking.cancel()
            self._checking = None

    def target(self, instances: Sequence[Instance]) -> EngineSpec:
        """What the instances are to run now."""
        self._learn(instances)
        wanted = self._wanted.engine
        if self._good is None or wanted == self._good:
            return wanted
        if self.refusal is None and self._checked != wanted:
            if self._checking is None:
                self._begin_check(self._wanted)
            return self._good
        failures = [one.failure for one in instances if one.spec.engine == wanted]
        failure = next((found for found in failures if found and found.reason not in _BY_CHANCE), None)
        if self.refusal is None and failure is not None:
            self._refuse(failure)
        return self._good if self.refusal else wanted

    def _learn(self, instances: Sequence[Instance]) -> None:
        active = [one for one in instances if one.state not in {State.STOPPED, State.UNLOADING}]
        ready = [one.spec.engine for one in active if one.state is State.READY]
        if self._wanted.engine in ready:
            self._good, self.refusal = self._wanted.engine, None
        elif ready and self._good is None:
            self._good = ready[0]
        if active and all(one.state is State.ERROR and one.spec.engine == self._good for one in active):
            self._good = self.refusal = None  # it is good no more

    def _refuse(self, failure: Diagnosis) -> None:
        message = f"the change failed and what was ready before is kept; the next edit tries again: {failure.message}"
        self.refusal = Diagnosis(Reason.REPLACEMENT_FAILED, message)
        log.error("a replacement failed", model=self._wanted.id, reason=failure.reason, message=failure.message)

    def _begin_check(self, wanted: ModelSpec) -> None:
        # A check that failed has found nothing; what it would have found, the engine tells soon.
        failed = partial(self._end_check, wanted, None)
        self._checking = run_once(partial(self._look, wanted), f"check of {wanted.id}", failed)

    async def _look(self, wanted: ModelSpec) -> None:
        self._end_check(wanted, await self._check.objection(wanted))

    def _end_check(self, wanted: ModelSpec, found: Diagnosis | None) -> None:
        if wanted is not self._wanted:
            return
        self._checking = None
        self._checked = wanted.engine
        if found is not None:
            self._refuse(found)
        self._changed()
