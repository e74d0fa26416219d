"""One instance of a model as others see it: its state, how far it is, its engine, and why it is not ready.

The part of a supervisor that is shown. States change by the table of `domain/lifecycle.py` alone.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from vllm_proxy.domain import progress
from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.decide import InstanceNow
from vllm_proxy.domain.diagnose import Diagnosis, Exit
from vllm_proxy.domain.lifecycle import Event, Life, Phase, Reason, State
from vllm_proxy.domain.progress import Progress
from vllm_proxy.engine.interface import Engine
from vllm_proxy.engine.meter import Meter
from vllm_proxy.engine.nap import Failed
from vllm_proxy.fleet.failure import LastExit
from vllm_proxy.fleet.history import History
from vllm_proxy.fleet.tenancy import Tenancy

log = structlog.get_logger()


class Instance(Tenancy):
    """Number `index` of a model. `changed` is called after every change of what it shows."""

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        history: History,
        changed: Callable[[], None],
        wanted_since: Callable[[], float | None],
    ) -> None:
        super().__init__(spec, history, changed, wanted_since)
        self.index = index
        self.name = f"{spec.id}/{index}"
        self.phase: Phase | None = None
        self.fraction: float | None = None  # of the phase
        self.diagnosis: Diagnosis | None = None
        self.last_exit: LastExit | None = None
        self.updated_at = datetime.now(UTC)
        self.started_at: datetime | None = None
        self.ready_at: datetime | None = None
        self.restarts = 0
        self.engine: Engine | None = None
        self.meter: Meter | None = None  # of the last engine that served
        self.sleeps = False  # its engine does, though it may be loading: it waits for room to wake
        self._life = Life()
        self._failure: Diagnosis | None = None  # of its last engine, until the next one serves

    @property
    def state(self) -> State:
        """What it is now."""
        return self._life.state

    @property
    def serves_or_comes(self) -> bool:
        """Whether an engine of it serves, or will without waiting for room."""
        return self.state is State.READY or (self.engine is not None and not self.sleeps)

    def now(self, *, renew: bool) -> InstanceNow:
        """As the loop decides about it. `renew`: it is to be started anew."""
        return InstanceNow(
            self.index,
            self.state,
            self.spec.engine,
            self.failure,
            renew or self.has_room,
            self.yields,
            self.awaits_room,
            self.serves_on,
            self.may_sleep(),
            self.sleeps,
        )

    @property
    def failure(self) -> Diagnosis | None:
        """Why its last engine failed; None where one serves, or the first one is on its way."""
        return self._failure if self.state in {State.LOADING, State.ERROR} else None

    def seconds_left(self) -> float | None:
        """How long this start may still take, as the last ones of the same spec went; None where nothing is known."""
        if self.state is not State.LOADING or self.engine is None or self.engine.asleep:
            return None
        return progress.estimate(self._history.past_starts(self.spec.engine), self.engine.age_seconds())

    def _transition(self, event: Event, phase: Phase | None = None, *, generation: int | None = None) -> None:
        before = self._life
        self._life = before.after(event, before.generation if generation is None else generation)
        if self._life is before:  # a late event
            return
        if self._life.state is not before.state:
            self.updated_at = datetime.now(UTC)
        self._notify(phase)

    def _notify(self, phase: Phase | None, fraction: float | None = None) -> None:
        self.phase, self.fraction = phase, fraction
        self._changed()

    def _show_wait(self, why: Diagnosis | None) -> None:
        """A start waits for something; None: for nothing that may not come, and the last failure is shown again."""
        if self.state is State.LOADING:
            self.diagnosis = why or self._failure
            self._notify(Phase.QUEUED)

    def _note_nap_failed(self, reason: Reason, failed: Failed) -> None:
        """Its engine is ended: started anew where it was to wake, and only then."""
        self.last_exit = LastExit(Diagnosis(reason, failed.message), Exit(None, None), datetime.now(UTC), ())
        self._history.failed(self.name, reason)
        log.warning("an engine is ended that cannot be trusted any more", instance=self.name, reason=reason,
                    why=failed.message)  # fmt: skip

    def wake(self) -> None:
        """Have it wake once there is room: it sleeps, and is loading where somebody waits for it. Returns at once."""
        self.forget_return()
        if self.claim is not None:
            self.claim.wakes()
        is_wanted = self.spec.policy.start == "always" or self.wanted_since() is not None
        if is_wanted and self.state is State.SLEEPING:
            self._transition(Event.START, Phase.QUEUED)

    def sleep_on(self, *, asks: bool) -> None:
        """Its engine sleeps, and nobody waits for it. `asks`: it wakes where there is room for it. Returns at once."""
        if self.claim is not None and not asks:
            self.claim.sleeps_on()
        if self.state is State.LOADING:
            self._transition(Event.SLEPT, Phase.SLEEPING)

    def _note_died(self, last: LastExit) -> None:
        """Its engine has ended by itself while it slept, or was to: no other one is started for that."""
        why = last.diagnosis
        self.last_exit = last
        self._history.failed(self.name, why.reason)
        if self.state is State.SLEEPING:
            self.diagnosis = replace(why, message=f"{why.message}; its next request starts another")
        log.warning("an engine ended by itself", instance=self.name, reason=why.reason, message=why.message)

    def _note_ready(self, engine: Engine, woke_seconds: float | None) -> None:
        """It serves. `woke_seconds`: since it has woken, which took so long; None: since its engine was started."""
        self.ready_at = datetime.now(UTC)
        self.diagnosis = self._failure = None
        if woke_seconds is not None:
            log.info("engine awake", instance=self.name, seconds=round(woke_seconds, 2))
            return
        seconds = round(engine.age_seconds(), 1)
        if not engine.was_ready:
            self._history.started(self.spec.engine, seconds)
        log.info("engine ready", instance=self.name, seconds=seconds)

    def _progress(self, now: Progress) -> None:
        self._notify(now.phase, now.fraction)
