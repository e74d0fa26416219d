"""What runs follows what the file asks for. Its one rule: only this module starts and stops supervisors."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

import structlog

from vllm_proxy.domain import lifecycle
from vllm_proxy.domain.config import Config, ModelSpec
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.engine.process import end_session
from vllm_proxy.engine.state import EngineRecord
from vllm_proxy.engine.supervisor import Supervisor, Surroundings

log = structlog.get_logger()

_ORPHAN_GRACE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model now: what the file asks, what is, and its instances."""

    spec: ModelSpec
    state: State
    diagnosis: Diagnosis | None
    created_at: datetime
    updated_at: datetime
    instances: tuple[Supervisor, ...]


async def end_orphans(records: list[EngineRecord]) -> list[EngineRecord]:
    """End what an earlier daemon left behind: every live process of each recorded session, its leader dead or not.

    Returns those that could not be ended.
    """

    async def end(record: EngineRecord) -> bool:
        log.warning("ending an engine that an earlier daemon left", instance=record.instance, pid=record.pid)
        try:
            return await end_session(record.pid, record.started, _ORPHAN_GRACE_SECONDS)
        except OSError as error:  # not ours to signal
            log.error("the engine cannot be ended", instance=record.instance, pid=record.pid, error=str(error))
            return False

    ended = await asyncio.gather(*(end(record) for record in records))
    return [record for record, gone in zip(records, ended, strict=True) if not gone]


class Reconciler:
    """All models of one daemon."""

    def __init__(self, config: Config, around: Surroundings, started_at: datetime) -> None:
        self.config = config
        self.registry = around.registry
        self._around = around
        self._started_at = started_at
        self._listeners: list[Callable[[], None]] = []
        self._supervisors: Mapping[str, tuple[Supervisor, ...]] = {}

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of any model's status."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Begin to run every enabled model. Returns at once."""
        self._around.registry.declare(self.config.models.values())
        self._supervisors = {model.id: self._instances(model) for model in self.config.models.values()}
        for supervisors in self._supervisors.values():
            for supervisor in supervisors:
                supervisor.start()

    async def stop(self) -> None:
        """Stop every instance at the same time; returns when nothing is left of any."""
        self._around.registry.close()
        everyone = [supervisor for supervisors in self._supervisors.values() for supervisor in supervisors]
        for result in await asyncio.gather(*(supervisor.stop() for supervisor in everyone), return_exceptions=True):
            if isinstance(result, Exception):
                log.error("an instance did not stop cleanly", error=repr(result))

    def hurry(self) -> None:
        """Do not wait for requests in flight any more."""
        self._around.hurry.set()

    def models(self) -> list[ModelStatus]:
        """Every model in the file's order."""
        return [self.model(model_id) for model_id in self.config.models]

    def model(self, model_id: str) -> ModelStatus:
        """One model.

        Raises:
            KeyError: when the file has no such model.

        """
        spec = self.config.models[model_id]
        instances = self._supervisors.get(model_id, ())
        state = lifecycle.best(instance.state for instance in instances)
        speakers = [instance for instance in instances if instance.state is state]
        speaker = next((instance for instance in speakers if instance.diagnosis), None)
        updated_at = max((instance.updated_at for instance in instances), default=self._started_at)
        diagnosis = speaker.diagnosis if speaker and state in {State.LOADING, State.ERROR} else None
        return ModelStatus(spec, state, diagnosis, self._started_at, updated_at, instances)

    def _instances(self, model: ModelSpec) -> tuple[Supervisor, ...]:
        def changed() -> None:
            self._changed(model.id)

        replicas = model.policy.replicas if model.policy.enabled else 0
        return tuple(Supervisor(model, index, self._around, changed) for index in range(replicas))

    def _changed(self, model_id: str) -> None:
        status = self.model(model_id)
        message = status.diagnosis.message if status.diagnosis else None
        self._around.registry.report(model_id, status.state, message)
        for listener in self._listeners:
            listener()
