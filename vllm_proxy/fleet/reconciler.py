"""What runs follows what the file asks for. Its one rule: only this module makes and ends models."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import structlog

from vllm_proxy.domain.config import Config, EngineSpec, ModelSpec
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.domain.plan import Action
from vllm_proxy.engine.ending import LAST_TRIES_SECONDS, end_engine
from vllm_proxy.engine.process import end_processes, is_alive
from vllm_proxy.engine.state import EngineRecord, StateDirectory
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.gate import Leaving
from vllm_proxy.fleet.history import History
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.supervisor import Supervisor, Surroundings
from vllm_proxy.runtime.background import run_once, tell

log = structlog.get_logger()

_ORPHAN_GRACE_SECONDS = 10.0
_ENDING_SECONDS = 40.0 + LAST_TRIES_SECONDS  # until what ignores SIGTERM is killed, reaped and tidied up behind

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
            and is_alive(record.identity)
        )
        mine = adoptable.setdefault(model_id, {})
        if wanted and int(number) not in mine:
            mine[int(number)] = record
        else:
            others.append(record)
    return adoptable, others


async def end_left(records: Iterable[EngineRecord], state: StateDirectory) -> bool:
    """End engines that an earlier daemon left: each process that is provably theirs. True when nothing is left."""

    async def end(record: EngineRecord) -> bool:
        log.warning("ending an engine that an earlier daemon left", instance=record.instance, pid=record.pid)
        end = partial(end_processes, record.identity)
        if (why := await end_engine(record, end, state, _ORPHAN_GRACE_SECONDS)) is not None:
            log.error("an engine cannot be ended", instance=record.instance, why=why)
        return why is None

    return all(await asyncio.gather(*(end(record) for record in records)))


class _Left:
    """An engine that an earlier daemon left and that is being ended. `changed` is called when it could not be."""

    def __init__(self, leaving: Leaving, changed: Callable[[], None]) -> None:
        self.tried = asyncio.Event()
        self._leaving = leaving
        self._changed = changed

    def stop_timeout(self) -> float:
        """Seconds between SIGTERM and SIGKILL."""
        return _ORPHAN_GRACE_SECONDS

    def waits(self, why: str | None) -> None:
        """It does not start."""

    def not_ended(self, why: str) -> None:
        """Who needs what it has waits on."""
        self._leaving.fails(why)
        self.tried.set()
        self._changed()

    def ended(self) -> None:
        """Nobody waits for it any more."""
        self._leaving.gone()
        self.tried.set()
        self._changed()


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
        self._clearing: list[asyncio.Task[None]] = []
        self._lefts: list[_Left] = []
        self._ends: set[asyncio.Task[None]] = set()
        self.stopping = around.stopping

    def listen(self, listener: Callable[[Model], None]) -> None:
        """Call `listener` with a model after every change of what it shows."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Run every enabled model, on engines of an earlier daemon where they fit. Returns at once."""
        adoptable, others = sort_out(self._state.left_behind(), self.config.models, self._fingerprint)
        self._clearing = [self._clear(record) for record in others]
        self._clearing.append(run_once(self._all_tried, "first tries to end what was left"))
        for spec in self.config.models.values():
            self._declare(spec)
        for model in self._models.values():
            model.begin(adoptable.get(model.spec.id, {}))

    def adopt(self, config: Config, actions: Sequence[Action]) -> None:
        """Follow another configuration, of which `actions` is the plan. Returns at once: models go on by themselves."""
        self.config = config
        if self.stopping.is_set():
            return
        self.registry.update(config.models)
        for action in actions:
            log.info("plan", model=action.model, action=action.kind, reason=action.reason)
        # In the order of the plan: who leaves a GPU is in its line before who comes.
        in_order = list(reversed(dict.fromkeys(action.model for action in reversed(actions))))
        for model_id in dict.fromkeys((*in_order, *config.models)):  # what no action is about may be worded anew
            self._follow(model_id)
        self._sort()

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
        await asyncio.wait({*ends, *self._ends, *self._clearing})

    def longest_stop(self) -> float:
        """Seconds that `stop` takes at most."""
        grace = max((model.spec.policy.stop_timeout for model in self._models.values()), default=0.0)
        return self.config.server.shutdown_timeout + grace + _ENDING_SECONDS

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
        instances = self.model(model_id).instances
        if not instances:
            return [(f"{model_id}/0", self._state.log_file(f"{model_id}/0"))]
        return [(one.name, self._log_of(one)) for one in instances]

    def _log_of(self, one: Supervisor) -> Path:
        """Of what runs the file that it has open: on disk there may be none."""
        return one.engine.log.path if one.engine and one.engine.log.problem else self._state.log_file(one.name)

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
            end = run_once(partial(self._end, model, model.end(keep=False)), f"end of {model_id}")
            self._ends.add(end)
            end.add_done_callback(self._ends.discard)

    async def _end(self, model: Model, ending: asyncio.Task[None]) -> None:
        """When nothing is left of a model that is gone from the file, its name may come again."""
        await asyncio.wait({ending})
        if any(one.state is not State.STOPPED for one in model.instances):  # nobody could end it
            return
        model_id = model.spec.id
        del self._models[model_id]
        self.registry.forget(model_id)
        tell(self._listeners, model)
        if model_id in self.config.models and not self.stopping.is_set():
            self._follow(model_id)
            self._sort()

    def _clear(self, record: EngineRecord) -> asyncio.Task[None]:
        """End an engine of an earlier daemon. Nobody who needs what it has starts before."""

        def changed() -> None:
            model_id = record.instance.rpartition("/")[0]
            if model := self._models.get(model_id) or next(iter(self._models.values()), None):
                tell(self._listeners, model)

        leaving = self._around.gate.leave(frozenset(record.devices), record.instance)
        left = _Left(leaving, changed)
        self._lefts.append(left)
        end = partial(self._around.launcher.end_left, record, left)
        task = run_once(end, f"end of {record.instance}")
        task.add_done_callback(lambda _: left.tried.set())  # whatever ended it
        return task

    async def _all_tried(self) -> None:
        """What an earlier daemon left is gone, or known not to go: ports and memory are as free as they will be."""
        await asyncio.gather(*(left.tried.wait() for left in self._lefts))
        self._around.cleared.set()

    def not_ended(self) -> dict[str, str]:
        """The instances whose engines could not be ended, those of an earlier daemon included, and why."""
        return self._around.gate.not_ended()

    def _changed(self, model: Model) -> None:
        tell([self._report, *self._listeners], model)

    def _report(self, model: Model) -> None:
        message = model.diagnosis.message if model.diagnosis else None
        self.registry.report(model.spec.id, model.state, message, rests=model.rests)
