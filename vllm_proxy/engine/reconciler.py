"""What runs follows what the file asks for. Its one rule: only this module makes and ends models."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import structlog

from vllm_proxy.domain.config import Config, EngineSpec, ModelSpec
from vllm_proxy.domain.plan import Action, plan
from vllm_proxy.engine.history import History
from vllm_proxy.engine.launch import bury
from vllm_proxy.engine.model import Model
from vllm_proxy.engine.process import end_session, is_alive
from vllm_proxy.engine.state import EngineRecord, StateDirectory
from vllm_proxy.engine.supervisor import Surroundings
from vllm_proxy.errors import RequestError

log = structlog.get_logger()

_ORPHAN_GRACE_SECONDS = 10.0
_BURIAL_SECONDS = 45.0  # until what ignores SIGTERM is killed, reaped and tidied up behind

type Adoptable = dict[str, dict[int, EngineRecord]]  # by model and instance


def sort_out(
    records: Iterable[EngineRecord], models: Mapping[str, ModelSpec], fingerprint: Callable[[EngineSpec], str]
) -> tuple[Adoptable, list[EngineRecord]]:
    """What an earlier daemon left: engines that are what the file asks for and live, and all others.

    An index is a name: after a replacement that put new beside old, the only instance may be number 1.
    """
    adoptable: Adoptable = {}
    others: list[EngineRecord] = []
    # Of two engines of one instance, the one that has served; of too many, those in front.
    for record in sorted(records, key=lambda record: (not record.ready, record.instance)):
        model_id, _, number = record.instance.rpartition("/")
        model = models.get(model_id)
        wanted = (
            model is not None
            and model.policy.enabled
            and len(adoptable.get(model_id, {})) < model.policy.replicas
            and fingerprint(model.engine) == record.spec
            and is_alive(record.pid, record.started)
        )
        mine = adoptable.setdefault(model_id, {})
        if wanted and int(number) not in mine:
            mine[int(number)] = record
        else:
            others.append(record)
    return adoptable, others


async def end_left(records: Iterable[EngineRecord], state: StateDirectory) -> bool:
    """End engines that an earlier daemon left: every live process of each session. True when nothing is left."""

    async def end(record: EngineRecord) -> bool:
        log.warning("ending an engine that an earlier daemon left", instance=record.instance, pid=record.pid)
        return await bury(record, partial(end_session, record.pid, record.started, _ORPHAN_GRACE_SECONDS), state)

    return all(await asyncio.gather(*(end(record) for record in records)))


class Reconciler:
    """All models of one daemon."""

    def __init__(
        self, config: Config, around: Surroundings, state: StateDirectory, fingerprint: Callable[[EngineSpec], str]
    ) -> None:
        self.config = config
        self.registry = around.registry
        self._around = around
        self._state = state
        self._fingerprint = fingerprint
        self._listeners: list[Callable[[Model], None]] = []
        self._models: dict[str, Model] = {}
        self._clearing: asyncio.Task[None] | None = None
        self._burials: set[asyncio.Task[None]] = set()
        self.stopping = asyncio.Event()  # set: nothing that has no end goes on

    def listen(self, listener: Callable[[Model], None]) -> None:
        """Call `listener` with a model after every change of what it shows."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Run every enabled model, on engines of an earlier daemon where they fit. Returns at once."""
        adoptable, others = sort_out(self._state.left_behind(), self.config.models, self._fingerprint)
        self._clearing = asyncio.create_task(self._clear(others))
        for spec in self.config.models.values():
            self._declare(spec)
        for model in self._models.values():
            model.begin(adoptable.get(model.spec.id, {}))

    def adopt(self, config: Config) -> tuple[Action, ...]:
        """Follow another configuration; returns what it changes. Returns at once: the models go on by themselves."""
        actions = plan(config.models, self.specs())
        self.config = config
        if self.stopping.is_set():
            return actions
        self.registry.update(config.models)
        for action in actions:
            log.info("plan", model=action.model, action=action.kind, reason=action.reason)
        # In the order of the plan: who leaves a GPU is in its line before who comes.
        for model_id in reversed(dict.fromkeys(action.model for action in reversed(actions))):
            self._follow(model_id)
        for model_id in config.models:  # what no action is about may be written in other words
            self._follow(model_id)
        self._sort()
        return actions

    def _sort(self) -> None:
        """The file's order, here and for requests; what ends comes last."""
        self.registry.update(self.config.models)
        present = [model for model_id in self.config.models if not (model := self._models[model_id]).ends]
        ending = [model for model in self._models.values() if model.ends]
        self._models = {model.spec.id: model for model in (*present, *ending)}

    def specs(self) -> dict[str, ModelSpec]:
        """What was adopted and is not about to go."""
        return {model_id: model.spec for model_id, model in self._models.items() if not model.ends}

    async def stop(self) -> None:
        """Stop every model at the same time, or leave its engines where the file says so; returns when it is done."""
        self.stopping.set()
        self.registry.close()
        keep = self.config.server.on_exit == "keep"
        ends = [model.end(keep=keep and not model.ends) for model in self._models.values()]
        if ends or self._burials:
            await asyncio.wait({*ends, *self._burials})
        if self._clearing is not None:
            await asyncio.wait({self._clearing})

    def longest_stop(self) -> float:
        """Seconds that `stop` takes at most, unless the kernel holds a process back."""
        grace = max((model.spec.policy.stop_timeout for model in self._models.values()), default=0.0)
        return self.config.server.shutdown_timeout + grace + _BURIAL_SECONDS

    def hurry(self) -> None:
        """Do not wait for requests in flight any more."""
        self._around.hurry.set()

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
            raise RequestError("model_not_found", f"cannot find model {model_id!r}: GET /models lists them")
        return self._models[model_id]

    def log_files(self, model_id: str) -> list[tuple[str, Path]]:
        """Each instance of a model, at least the first, and where its engines' output is.

        Raises:
            RequestError: `model_not_found`.

        """
        names = [one.name for one in self.model(model_id).instances] or [f"{model_id}/0"]
        return [(name, self._state.log_file(name)) for name in names]

    def _declare(self, spec: ModelSpec) -> None:
        history = History(self._state, self._fingerprint)
        model = self._models[spec.id] = Model(spec, self._around, history, self._changed)
        self.registry.declare(spec, model.wake)

    def _follow(self, model_id: str) -> None:
        """Have one model be what the file says now."""
        spec, model = self.config.models.get(model_id), self._models.get(model_id)
        if model is None:
            assert spec is not None, "whatever has an action is in the file, or runs"
            self._declare(spec)
            self._models[model_id].begin({})
        elif model.ends:
            return  # what the file says of it now begins when it has ended
        elif spec is not None:
            model.become(spec)
        else:
            burial = asyncio.create_task(self._bury(model, model.end(keep=False)), name=f"end of {model_id}")
            self._burials.add(burial)
            burial.add_done_callback(self._burials.discard)

    async def _bury(self, model: Model, ending: asyncio.Task[None]) -> None:
        """When nothing is left of a model that is gone from the file, its name may come again."""
        await asyncio.wait({ending})
        model_id = model.spec.id
        del self._models[model_id]
        self.registry.forget(model_id)
        self._tell(model)
        if model_id in self.config.models and not self.stopping.is_set():
            self._follow(model_id)
            self._sort()

    async def _clear(self, left: list[EngineRecord]) -> None:
        try:
            await end_left(left, self._state)
        finally:
            self._around.cleared.set()

    def _changed(self, model: Model) -> None:
        message = model.diagnosis.message if model.diagnosis else None
        self.registry.report(model.spec.id, model.state, message, rests=model.rests)
        self._tell(model)

    def _tell(self, model: Model) -> None:
        for listener in self._listeners:
            listener(model)
