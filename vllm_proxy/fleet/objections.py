"""What speaks against a valid configuration: options that its vLLM would refuse, and what this machine cannot hold.

For `desired`, which asks before it adopts one, and for `check`. A misfit that was adopted, since a daemon starts with
it and runs what fits, speaks against no other change: only what is new, or worse than it was, does.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from vllm_proxy.domain import fit
from vllm_proxy.domain.config import Config, Devices, EngineDefaults, EngineSpec, ModelSpec
from vllm_proxy.domain.file.parse import problems_at
from vllm_proxy.domain.fit import Demand, Misfit
from vllm_proxy.domain.ledger import Device, Where
from vllm_proxy.domain.leftover import crowded_out
from vllm_proxy.domain.options import OptionTable
from vllm_proxy.domain.placement import Machine
from vllm_proxy.domain.plan import Action, Prospect
from vllm_proxy.domain.toml import KeyPath
from vllm_proxy.engine.devices import Inventory
from vllm_proxy.errors import Problem
from vllm_proxy.fleet.oversights import ineffective, oversights
from vllm_proxy.runtime.regular_file import read_regular_file
from vllm_proxy.runtime.threads import Offload
from vllm_proxy.runtime.turns import in_turns


class Check(Protocol):
    """What is known of the options that engines take."""

    @property
    def versions(self) -> frozenset[str]:
        """Those of vLLM that were found so far."""

    async def problems(self, model: ModelSpec) -> list[tuple[str, str]]:
        """(key path, message) of each that its engine would refuse."""

    async def of_engine(self, engine: EngineDefaults) -> OptionTable | None:
        """All that the program of `[engine]` takes; None where that is not known."""

    def prefetch(self, specs: Iterable[EngineSpec]) -> None:
        """Read the options of programs that are not known yet, in the background."""


def _nowhere(_: ModelSpec) -> Where | None:
    return None


def _not_known(_: Devices) -> Machine | None:
    return None


def _not_measured(_: EngineSpec) -> int | None:
    return None


@dataclass(frozen=True, slots=True)
class Hardware:
    """What this machine has. `look`: as a `[devices]` table has it; None: nobody knows, and nothing is said of it."""

    look: Callable[[Devices], Machine | None] = _not_known
    place_of: Callable[[ModelSpec], Where | None] = _nowhere  # where one more engine would run now; None: it would wait
    measured: Callable[[EngineSpec], int | None] = _not_measured  # bytes that its last engine had of each device

    def wants(self, config: Config) -> "Wants":
        """What the models want of it that are not off."""
        machine = self.look(config.devices)
        if machine is None:
            return Wants({}, {})
        demands = {model.id: machine.demand(model) for model in config.models.values() if model.policy.enabled}
        named = {name for one in demands.values() for name in one.named or ()}
        devices = {name: device for name, device in machine.devices().items() if name in machine.usable | named}
        measured = {name: size for name in demands if (size := self.measured(config.models[name].engine)) is not None}
        return Wants(demands, devices, measured)


@dataclass(frozen=True, slots=True)
class Wants:
    """What models want, and what there is; no devices: nobody manages them."""

    demands: Mapping[str, Demand]
    devices: Mapping[str, Device]
    measured: Mapping[str, int] = field(default_factory=dict)

    def misfits(self) -> list[Misfit]:
        """What can never run. It may take a while."""
        if not self.devices:
            return fit.unsized(self.demands.values())
        return fit.misfits([*self.demands.values()], self.devices, self.measured)

    def warnings(self) -> list[Misfit]:
        """What can never run, with what comes and goes and never has room beside what always runs."""
        found = self.misfits()
        return [*found, *crowded_out([*self.demands.values()], self.devices, self.measured, found)]

    def worse_than(self, before: "Wants") -> list[Misfit]:
        """What can never run, and could before, or was not changed and lacked less."""
        if not (found := self.misfits()):
            return found
        unchanged = {name for name, one in self.demands.items() if _size(one) == _size(before.demands.get(name))}
        more = [name for name, one in self.demands.items() if one.always and one != before.demands.get(name)]
        return [_blamed(one, more) for one in fit.worse(found, before.misfits(), unchanged)]


async def misfits_here(config: Config, folder: Path, env: Mapping[str, str]) -> tuple[list[Misfit], str | None]:
    """What this machine can never run, for commands that run without a daemon; and why that is not known.

    `folder`: of the file. `env`: what engines would inherit.
    """
    wants, unknown = await _wants_here(config, folder, env)
    return wants.misfits(), unknown


async def _wants_here(config: Config, folder: Path, env: Mapping[str, str]) -> tuple[Wants, str | None]:
    inventory = Inventory(config.devices.source, folder, env, dict)
    try:
        await inventory.look()
        if inventory.problem is not None and not inventory.managed:
            return Wants({}, {}), inventory.problem
        machine = Machine(inventory.devices, inventory.usable, config.devices)
        return Hardware(lambda _: machine).wants(config), inventory.problem
    finally:
        inventory.close()


async def warnings_here(config: Config, file: Path, env: Mapping[str, str]) -> list[str]:
    """As `check` says it: no problem of the file, which may be for another machine."""
    wants, unknown = await _wants_here(config, file.parent, env)
    found = [(_path(one.model, one.key), f"on this machine: {one.message}") for one in wants.warnings()]
    here = oversights(config, file.parent, env, shares=not found)  # else they are counted in bytes
    found += [(path, f"on this machine: {message}") for path, message in here]
    found += ineffective(config, file.parent)
    text = read_regular_file(file).decode(errors="replace") if found else ""
    told = [f"{problem.place(str(file))}: {problem.message}" for problem in problems_at(found, text, {})]
    return told if unknown is None else [*told, unknown]


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
    paths = [(_path(model, path), message) for model, path, message in found]
    return problems_at(paths, text.decode(errors="replace"), {})


def _path(model: str, path: str) -> KeyPath:
    return ("models", model, *path.split(".", 1))


def _program(engine: EngineDefaults | EngineSpec) -> tuple[tuple[str, ...] | None, str]:
    """What is run to learn the options: a program, and what it is given."""
    return engine.command, repr(sorted(engine.env.items()))


class Objections:
    """To what follows `running`, the configuration that was adopted last. Texts are those that were parsed."""

    def __init__(
        self, check: Check, hardware: Hardware, running: Callable[[], Config], offload: Offload = asyncio.to_thread
    ) -> None:
        self._check = check
        self._hardware = hardware
        self._running = running
        self._offload = offload

    async def to_options(self, config: Config, text: bytes, *, only_known: bool = False) -> list[Problem]:
        """What the vLLM of each model that is new or changed would not take, where it is known.

        `only_known`: of programs that the configuration starts already, in an environment that it gives them: others
        are not looked at, still less run, since who wrote the text may not have them run.
        """
        running = self._running().models
        changed = [
            model
            for model in config.models.values()
            if model.id not in running or running[model.id].engine != model.engine
        ]
        if only_known and changed:
            known = {_program(self._running().engine), *(_program(one.engine) for one in running.values())}
            changed = [model for model in changed if _program(model.engine) in known]
        found = [(one.id, path, message) for one in changed for path, message in await self._check.problems(one)]
        return _problems(found, text)

    async def to_sizes(self, config: Config, text: bytes) -> list[Problem]:
        """What this machine cannot hold, unless that was so before."""
        wants, before = self._hardware.wants(config), self._hardware.wants(self._running())
        return problems_of(await self._offload(wants.worse_than, before), text)

    async def options(self) -> OptionTable | None:
        """Those of the vLLM that `[engine]` starts; None where they cannot be had soon."""
        return await self._check.of_engine(self._running().engine)

    async def standing(self) -> list[Misfit]:
        """What this machine cannot hold of what was adopted, or has no room for beside what always runs."""
        return await self._offload(self._hardware.wants(self._running()).warnings)

    async def prospects(self, config: Config, actions: Sequence[Action]) -> list[Prospect]:
        """What becomes of each step: where its engine would run, or why it never can."""
        wants = self._hardware.wants(config)
        why = reasons(await self._offload(wants.misfits), actions)
        found = []
        async for action in in_turns(actions):  # of thousands it takes a while
            misfit = why.get(action.model) if action.to is not None else None
            place = None
            if action.to is not None and action.starts and misfit is None and wants.devices:
                place = self._hardware.place_of(action.to)
            found.append(Prospect(place, misfit))
        return found


def reasons(misfits: Iterable[Misfit], actions: Sequence[Action]) -> dict[str, str]:
    """Why models can never run, by model, as a plan says it."""
    changed = [action.model for action in actions if action.to is not None and action.to.policy.start == "always"]
    return {one.model: one.message for one in (_blamed(misfit, changed) for misfit in misfits)}
