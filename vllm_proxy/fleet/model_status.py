"""One model as others see it: as good as its best instance, why it is not what the file asks for, for what it waits.

The part of a model that is shown.
"""

from dataclasses import replace
from datetime import UTC, datetime

from vllm_proxy.domain import lifecycle
from vllm_proxy.domain.causes import Change
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.decide import Wanted
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.domain.rollback import Rollback
from vllm_proxy.fleet.adapters import AdapterNow, ModelAdapters
from vllm_proxy.fleet.claims import Waits
from vllm_proxy.fleet.history import History
from vllm_proxy.fleet.supervisor import Supervisor

_STOPPED_BY_HAND = Diagnosis(
    Reason.STOPPED_BY_HAND, "stopped by hand; `vllm-proxy start` lets it serve again, and so does a change of it"
)


class ModelStatus:
    """What is wanted of a model, and its instances."""

    adapters: ModelAdapters

    def __init__(self, spec: ModelSpec, history: History) -> None:
        self.spec = spec
        self.name = spec.id
        self.history = history
        self.created_at = datetime.now(UTC)
        self.instances: tuple[Supervisor, ...] = ()
        self._wanted = Wanted.STOP
        self._begun = False
        self._gave_way: Diagnosis | None = None
        self._rollback = Rollback(spec.engine)

    @property
    def state(self) -> State:
        """As good as its best instance."""
        return lifecycle.best(instance.state for instance in self.instances)

    @property
    def updated_at(self) -> datetime:
        """When it last changed its state, UTC."""
        return max((instance.updated_at for instance in self.instances), default=self.created_at)

    @property
    def diagnosis(self) -> Diagnosis | None:
        """Why it is not what the file asks for, where there is a reason."""
        state = self.state
        if not_ended := next((one.diagnosis for one in self.instances if _is_not_ended(one)), None):
            return not_ended
        if state is State.STOPPED:
            died = next((one.diagnosis for one in self.instances if one.diagnosis is not None), self._gave_way)
            return _STOPPED_BY_HAND if self.stopped_by_hand else died
        if state in {State.UNLOADING, State.SLEEPING}:
            return self._gave_way
        if state is not State.ERROR and self._rollback.refusal is not None:
            return self._rollback.refusal
        if state not in {State.LOADING, State.ERROR}:
            return None
        return next((one.diagnosis for one in self.instances if one.state is state and one.diagnosis), None)

    @property
    def waits(self) -> Waits | None:
        """Why it waits for room, where nothing of it serves or comes."""
        if any(one.serves_or_comes for one in self.instances):
            return None
        return next((one.waits for one in self.instances if one.waits is not None), None)

    @property
    def message(self) -> str | None:
        """What is said of it: why it is not what the file asks for, or for what it waits."""
        diagnosis, waits = self.diagnosis, self.waits
        return diagnosis.message if diagnosis is not None else waits.because if waits is not None else None

    @property
    def change(self) -> Change | None:
        """What of its keys would mend that, by the one of two that says how much memory it gets."""
        other = "memory" if self.spec.engine.memory is None else "gpu_memory_utilization"
        diagnosis = self.diagnosis
        return None if diagnosis is None else next((one for one in diagnosis.changes if one.key != other), None)

    @property
    def stopped_by_hand(self) -> bool:
        """Whether somebody stopped it by hand."""
        return self._wanted is Wanted.STOP and self._begun and self.spec.policy.enabled

    @property
    def awaits_request(self) -> bool:
        """Whether the next request starts it."""
        return self._wanted is Wanted.AWAIT and self.spec.policy.enabled

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be ready without a request: `/ready`, the metrics and all that count models wait for it.

        One that somebody stopped or put to sleep by hand is not waited for: by itself none that is always to run
        awaits a request.
        """
        policy = self.spec.policy
        return policy.enabled and policy.start == "always" and not (self.stopped_by_hand or self.awaits_request)

    @property
    def ends(self) -> bool:
        """Whether it is being stopped for good."""
        return self._wanted is Wanted.END

    @property
    def is_to_run(self) -> bool:
        """Whether its instances are to run without a request."""
        return self._wanted is Wanted.RUN and self.spec.policy.enabled

    @property
    def refusal(self) -> Diagnosis | None:
        """Why it runs what was good before, and not what the file asks for."""
        return self._rollback.refusal

    @property
    def runs_nothing(self) -> bool:
        """Whether no instance runs, tries to, or is on its way out."""
        return all(one.state in {State.STOPPED, State.ERROR} for one in self.instances)

    def adapters_now(self) -> list[AdapterNow]:
        """Each adapter that is enabled. Where no instance comes any more, none of them does."""
        found = self.adapters.now()
        if self.state is not State.ERROR:
            return found
        return [replace(one, state="error", message=self.message) if one.state == "loading" else one for one in found]

    def _no_room(self, running: EngineSpec) -> str | None:
        """Why an engine that has no room for an adapter stays; None: another one comes in its place."""
        if self._rollback.refusal is not None:
            return self._rollback.refusal.message
        return None if running != self._rollback.wanted else "restart the model"


def _is_not_ended(one: Supervisor) -> bool:
    return one.diagnosis is not None and one.diagnosis.reason is Reason.NOT_ENDED
