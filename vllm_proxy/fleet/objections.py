"""What speaks against a valid configuration: options that its vLLM would refuse, and what this machine cannot hold.

For `desired`, which asks before it adopts one, and for `check`. A misfit that was adopted, since a daemon starts with
it and runs what fits, speaks against no other change: only what is new, or worse than it was, does.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from vllm_proxy.domain import fit
from vllm_proxy.domain.config import Config, Devices, EngineSpec, ModelSpec
from vllm_proxy.domain.file.parse import problems_at
from vllm_proxy.domain.fit import Demand, Misfit
from vllm_proxy.domain.ledger import Device, Where
from vllm_proxy.domain.plan import Action, Kind, Prospect
from vllm_proxy.errors import Problem
from vllm_proxy.runtime.threads import Offload


class Check(Protocol):
    """What is known of the options that engines take."""

    async def problems(self, model: ModelSpec) -> list[tuple[str, str]]:
        """(key path, message) of each that its engine would refuse."""

    def prefetch(self, specs: Iterable[EngineSpec]) -> None:
        """Read the options of programs that are not known yet, in the background."""


class Machine(Protocol):
    """The devices that are managed."""

    def devices(self) -> Mapping[str, Device]:
        """By name."""

    def demand(self, model: ModelSpec) -> Demand:
        """What a model wants, with its devices named in the same way."""


def _nobody_knows(_: ModelSpec) -> Where | None:
    return None


@dataclass(frozen=True, slots=True)
class Hardware:
    """What this machine has. `look`: the devices now, as a `[devices]` table has them; None: nobody manages them."""

    look: Callable[[Devices], Machine | None] | None = None  # None: nobody has looked, so nothing is known to be wrong
    knows: Callable[[Devices], bool] = lambda _: True  # whether its source is the one that is looked at
    place_of: Callable[[ModelSpec], Where | None] = _nobody_knows  # where it would run now; None: it would wait
    measured: Callable[[], Mapping[str, int]] = dict  # by model: bytes that its last engine had of each device

    def wants(self, config: Config) -> "Wants":
        """What its models want of it."""
        models = [model for model in config.models.values() if model.policy.enabled]
        if self.look is None or not self.knows(config.devices):
            return Wants({}, None)
        machine = self.look(config.devices)
        if machine is None:
            return Wants({model.id: fit.demand_of(model, model.engine.memory) for model in models}, None)
        return Wants({model.id: machine.demand(model) for model in models}, machine.devices(), self.measured())


@dataclass(frozen=True, slots=True)
class Wants:
    """What models want, and what there is; None: nobody knows."""

    demands: Mapping[str, Demand]
    devices: Mapping[str, Device] | None
    measured: Mapping[str, int] = field(default_factory=dict)

    def misfits(self) -> list[Misfit]:
        """What can never run. It may take a while."""
        if self.devices is None:
            return fit.unsized(self.demands.values())
        return fit.misfits([*self.demands.values()], self.devices, self.measured)

    def worse_than(self, before: "Wants") -> list[Misfit]:
        """What can never run, and could before, or was not changed and lacked less."""
        if not (found := self.misfits()):
            return found
        unchanged = {name for name, one in self.demands.items() if _size(one) == _size(before.demands.get(name))}
        more = [name for name, one in self.demands.items() if one.always and one != before.demands.get(name)]
        return [_blamed(one, more) for one in fit.worse(found, before.misfits(), unchanged)]


def _blamed(misfit: Misfit, changed: Sequence[str]) -> Misfit:
    """That too many are always to run is said of one that was changed, where one was."""
    if misfit.key != fit.TOGETHER or misfit.model in changed or not changed:
        return misfit
    return replace(misfit, model=changed[-1])


def _size(demand: Demand | None) -> Demand | None:
    """What matters to one instance alone."""
    return None if demand is None else replace(demand, always=False, replicas=1)


def problems_of(misfits: Iterable[Misfit], text: bytes) -> list[Problem]:
    """Where they stand in the file."""
    return _problems(((one.model, one.key, one.message) for one in misfits), text)


def _problems(found: Iterable[tuple[str, str, str]], text: bytes) -> list[Problem]:
    """Of a model, at a path below it."""
    paths = [(("models", model, *path.split(".", 1)), message) for model, path, message in found]
    return problems_at(paths, text.decode(errors="replace"), {})


class Objections:
    """To what follows `running`, the configuration that was adopted last. Texts are those that were parsed."""

    def __init__(
        self, check: Check, hardware: Hardware, running: Callable[[], Config], offload: Offload = asyncio.to_thread
    ) -> None:
        self._check = check
        self._hardware = hardware
        self._running = running
        self._offload = offload

    async def to_options(self, config: Config, text: bytes) -> list[Problem]:
        """What the vLLM of each model that is new or changed would not take, where it is known."""
        running = self._running().models
        changed = [
            model
            for model in config.models.values()
            if model.id not in running or running[model.id].engine != model.engine
        ]
        found = [(one.id, path, message) for one in changed for path, message in await self._check.problems(one)]
        return _problems(found, text)

    async def to_sizes(self, config: Config, text: bytes) -> list[Problem]:
        """What this machine cannot hold, unless that was so before."""
        wants, before = self._hardware.wants(config), self._hardware.wants(self._running())
        return problems_of(await self._offload(wants.worse_than, before), text)

    async def standing(self) -> list[Misfit]:
        """What this machine cannot hold of what was adopted."""
        return await self._offload(self._hardware.wants(self._running()).misfits)

    async def prospects(self, config: Config, actions: Sequence[Action]) -> list[Prospect]:
        """What becomes of each step: where its engine would run, or why it never can."""
        misfits = await self._offload(self._hardware.wants(config).misfits)
        return prospects(actions, misfits, self._hardware.place_of)


def prospects(
    actions: Sequence[Action], misfits: Iterable[Misfit], place_of: Callable[[ModelSpec], Where | None] = _nobody_knows
) -> list[Prospect]:
    """Of each step."""
    changed = [action.model for action in actions if action.to is not None and action.to.policy.start == "always"]
    why = {one.model: one.message for one in (_blamed(misfit, changed) for misfit in misfits)}
    found = []
    for action in actions:
        misfit = why.get(action.model) if action.to is not None else None
        starts = action.to is not None and action.kind in {Kind.START, Kind.REPLACE}
        place = place_of(action.to) if action.to is not None and starts and misfit is None else None
        found.append(Prospect(starts, place, misfit))
    return found
