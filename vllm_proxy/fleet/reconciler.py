"""The set of models of one daemon, kept as the adopted file says.

Only this module creates and removes models. A file is followed as one event of the fleet loop, which decides what each
model does about it; whoever waits for an adoption may give up waiting, and it goes on.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from vllm_proxy.domain.adapters import Lora
from vllm_proxy.domain.config import Config, EngineSpec, ModelSpec
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.domain.plan import Action
from vllm_proxy.engine.ending import LAST_TRIES_SECONDS
from vllm_proxy.engine.state import EngineRecord, StateDirectory
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.dependencies import Dependencies
from vllm_proxy.fleet.history import History
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.orphans import Orphan, classify, loras
from vllm_proxy.fleet.supervisor import Supervisor
from vllm_proxy.runtime.background import notify, run_once
from vllm_proxy.runtime.turns import in_batches

log = structlog.get_logger()

_AT_ONCE_SECONDS = 1.0  # in which a model has ended that ran nothing, unless a bug is in the way
_NAMED = 10  # models in the answer to a name that is none
_ENDING_SECONDS = 40.0 + LAST_TRIES_SECONDS  # until what ignores SIGTERM is killed, reaped and tidied up behind


@dataclass(frozen=True, slots=True)
class _Adopted:
    """Another configuration is to be followed: an event for the fleet loop."""

    reconciler: "Reconciler"
    config: Config
    actions: Sequence[Action]

    @property
    def name(self) -> str:
        """As the log has it."""
        return "adoption of the file"

    async def apply(self) -> None:
        """Apply to each model what the file says of it."""
        await self.reconciler.follow(self.config, self.actions)


class Reconciler:
    """All models of one daemon."""

    def __init__(
        self, config: Config, shared: Dependencies, state: StateDirectory, fingerprint: Callable[[EngineSpec], str]
    ) -> None:
        self.config = self._followed = config  # what all models are, and what they are about to be
        self.registry = shared.registry
        self._shared = shared
        self.room = shared.loop.room
        self.room.unmanaged = shared.launcher.allocation
        self.room.learned = lambda spec, size: state.note_memory(fingerprint(spec), size)
        self._state = state
        self._fingerprint = fingerprint
        self._listeners: list[Callable[[Model], None]] = []
        self._models: dict[str, Model] = {}
        self._orphans: list[asyncio.Task[None]] = []  # their ends
        self._ends: dict[asyncio.Task[None], bool] = {}  # of models gone from the file; whether that takes no time
        self.stopping = shared.stopping
        self.watchers = shared.watchers

    def listen(self, listener: Callable[[Model], None]) -> None:
        """Call `listener` with a model after every change of what it shows."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Run every enabled model, on engines of an earlier daemon where they fit. Returns at once."""
        records = self._state.orphans()
        self.config = self._followed = self.config.with_loras(loras(records, self.config.models, self._fingerprint))
        adoptable, others = classify(records, self.config.models, self._fingerprint)
        self._orphans = [self._end_orphan(record) for record in others]
        for record in (one for records in adoptable.values() for one in records.values()):
            self._shared.adapters.expect(record.own_name)
        self._shared.adapters.sweep_soon()
        for spec in self.config.models.values():
            self._declare(spec)
        for model in self._models.values():
            model.begin(adoptable.get(model.spec.id, {}))
        self._shared.loop.start()

    async def adopt(self, config: Config, actions: Sequence[Action]) -> None:
        """Follow another configuration, of which `actions` is the plan.

        Returns when what follows has begun, and models that ran nothing are gone where the file has them no more. Who
        gives up waiting changes nothing about it.
        """
        followed = self._shared.loop.post(_Adopted(self, config, actions))
        await asyncio.wait({followed})
        if not followed.cancelled():
            followed.result()
        if ends := [end for end, at_once in self._ends.items() if at_once]:
            await asyncio.wait(ends, timeout=_AT_ONCE_SECONDS)

    async def follow(self, config: Config, actions: Sequence[Action]) -> None:
        """Have each model be what this configuration says. For the fleet loop; with many, requests run meanwhile."""
        self._followed = config
        if self.stopping.is_set():
            return
        self.room.machines.use(config.devices)
        self.registry.update(config.models)
        async for planned in in_batches(actions):
            for action in planned:
                log.info("plan", model=action.model, action=action.kind, reason=action.reason)
        # In the order of the plan: an engine that leaves a GPU has its claim before one that is to start there. What
        # has no action may still be written differently, or have come since the plan was made.
        in_order = reversed(dict.fromkeys(action.model for action in reversed(actions)))
        async for some in in_batches(dict.fromkeys((*in_order, *self._models, *config.models))):
            for model_id in some:
                if not self.stopping.is_set():
                    self._follow_model(model_id)
        self.config = config
        self._sort()

    def _sort(self) -> None:
        """The file's order, here and for requests; what ends comes last."""
        self.registry.update(self._followed.models)
        there = [self._models[model_id] for model_id in self._followed.models if model_id in self._models]
        present = [model for model in there if not model.ends]
        ending = [model for model in self._models.values() if model.ends]
        self._models = {model.spec.id: model for model in (*present, *ending)}

    def specs(self) -> dict[str, ModelSpec]:
        """What was adopted and is not about to go."""
        return {model_id: model.spec for model_id, model in self._models.items() if not model.ends}

    def loras(self) -> dict[str, Lora | None]:
        """What the engines of each model can hold of adapters: of one that was refused, what runs in its place."""
        return {model_id: _lora_of(model) for model_id, model in self._models.items() if not model.ends}

    async def stop(self) -> None:
        """Stop every model at the same time, or leave its engines where the file says so; returns when it is done."""
        self.stopping.set()
        self.registry.close()
        self._shared.adapters.close()
        keep = self.config.server.on_exit == "keep"
        ends = [model.end(keep=keep and not model.ends) for model in self._models.values()]
        if waits := {*ends, *self._ends, *self._orphans}:
            await asyncio.wait(waits)
        await self._shared.loop.close()

    def longest_stop(self) -> float:
        """Seconds that `stop` takes at most."""
        grace = max((model.spec.policy.stop_timeout for model in self._models.values()), default=0.0)
        return self.config.server.shutdown_timeout + grace + _ENDING_SECONDS

    def skip_drain(self) -> None:
        """Do not wait for requests in flight any more."""
        self._shared.skip_drain.set()

    def models(self) -> Sequence[Model]:
        """Every model in the file's order."""
        return list(self._models.values())

    def knows(self, model_id: str) -> bool:
        """Whether there is such a model, one that drains for the last time included."""
        return model_id in self._models

    def model(self, model_id: str) -> Model:
        """One model.

        Raises:
            RequestError: `model_not_found`.

        """
        if model_id not in self._models:
            some = ", ".join([*list(self._models)[:_NAMED], *(["..."] if len(self._models) > _NAMED else [])])
            there = f"there is {some}" if some else "there are none"
            msg = f"cannot find model {model_id!r}: {there}; `vllm-proxy status` and GET /models list them"
            raise RequestError("model_not_found", msg)
        return self._models[model_id]

    def log_files(self, model_id: str) -> list[tuple[str, Path]]:
        """Each instance of a model, at least the first, and where its engines' output is.

        Raises:
            RequestError: `model_not_found`.

        """
        instances = self.model(model_id).instances
        if not instances:
            return [(f"{model_id}/0", self._state.log_file(f"{model_id}/0"))]
        return [(one.name, self._log_of(one)) for one in instances]

    def _log_of(self, one: Supervisor) -> Path:
        """Of what runs the file that it has open: on disk there may be none."""
        return one.engine.log.path if one.engine and one.engine.log.problem else self._state.log_file(one.name)

    def _declare(self, spec: ModelSpec) -> None:
        history = History(self._state, self._fingerprint)
        model = self._models[spec.id] = Model(spec, self._shared, history, self._changed)
        self.registry.declare(spec, model.request)

    def _follow_model(self, model_id: str) -> None:
        """Have one model be what the file says now."""
        spec, model = self._followed.models.get(model_id), self._models.get(model_id)
        if model is None:
            if spec is not None:
                self._declare(spec)
                self._models[model_id].begin({})
        elif model.ends:
            return  # what the file says of it now begins when it has ended
        elif spec is not None:
            model.adopt_spec(spec)
        else:
            at_once = model.runs_nothing
            end = run_once(partial(self._end, model, model.end(keep=False)), f"end of {model_id}")
            self._ends[end] = at_once
            end.add_done_callback(self._ends.pop)

    async def _end(self, model: Model, ending: asyncio.Future[None]) -> None:
        """When nothing is left of a model that is gone from the file, its name may come again."""
        await asyncio.wait({ending})
        if any(one.state is not State.STOPPED for one in model.instances):  # it could not be ended
            return
        model_id = model.spec.id
        del self._models[model_id]
        self._shared.loop.forget(model)
        self.registry.forget(model_id)
        notify(self._listeners, model)
        if model_id in self._followed.models and not self.stopping.is_set():
            self._follow_model(model_id)
            self._sort()

    def _end_orphan(self, record: EngineRecord) -> asyncio.Task[None]:
        """End an engine of an earlier daemon. Nothing that needs its devices starts before."""

        def changed() -> None:
            model_id = record.instance.rpartition("/")[0]
            if model := self._models.get(model_id) or next(iter(self._models.values()), None):
                notify(self._listeners, model)

        leftover = self.room.leave(record.instance, record.place.allocation.takes)
        end = partial(self._shared.launcher.end_orphan, record, Orphan(leftover, changed))
        return run_once(end, f"end of {record.instance}", lambda: leftover.failed("a fault of the daemon: see its log"))

    @property
    def state_problem(self) -> str | None:
        """Why the record of engines, or what they taught, is not on disk; None: it is."""
        return self._state.problem

    def not_ended(self) -> dict[str, str]:
        """The instances whose engines could not be ended, those of an earlier daemon included, and why."""
        return self.room.not_ended()

    def _changed(self, model: Model) -> None:
        notify([self._report, *self._listeners], model)

    def _report(self, model: Model) -> None:
        message = model.diagnosis.message if model.diagnosis else None
        waits = model.waits
        if waits is None:
            self.registry.report_room(model.spec.id, None, None, None)
        else:
            self.registry.report_room(model.spec.id, waits.because, waits.no_room, waits.ready_in)
        self.registry.report(model.spec.id, model.state, message, stopped_by_hand=model.stopped_by_hand)
        if model.spec.adapters:
            self.registry.report_adapters(model.spec.id, model.adapters.problems())


def _lora_of(model: Model) -> Lora | None:
    if not model.spec.policy.enabled:  # nothing is kept for it
        return None
    specs = [one.spec for one in model.instances] or [model.spec]
    return model.spec.lora if any(spec.engine == model.spec.engine for spec in specs) else specs[0].lora
