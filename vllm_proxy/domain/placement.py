"""Where an instance may run on managed devices, what it needs there, and what its engine is told of them.

For `fleet/room.py`, which asks with it. Values alone: the devices as their inventory last saw them, and a model's keys.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from vllm_proxy.domain import fit, inventory
from vllm_proxy.domain.config import Devices, ModelSpec
from vllm_proxy.domain.devices import ANY_DEVICE, Allocation
from vllm_proxy.domain.eviction import Rules
from vllm_proxy.domain.fit import Demand
from vllm_proxy.domain.inventory import Seen
from vllm_proxy.domain.ledger import Device, Kind, Where


@dataclass(frozen=True, slots=True)
class Wish:
    """What an instance may have: `count` of the devices in `needs` (bytes of each), or exactly `only`."""

    needs: Mapping[str, int]
    count: int
    only: Where = ()


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices that are managed, and what `[devices]` says of them."""

    seen: Mapping[str, Seen]
    usable: frozenset[str]  # those that an engine may be placed on that names none
    rules: Devices
    looked_at: float = math.inf  # when the last look at them began, on the loop's clock
    seen_at: float = -math.inf  # when the one began that saw them so: a later one may have failed
    default_share: float | None = None  # of the installed vLLM, where it is known

    def devices(self, held: Mapping[str, Mapping[str, int]] | None = None) -> Mapping[str, Device]:
        """As the ledger counts them. `held`: what it has for engines of ours, by instance and device."""
        return inventory.ledger_devices(
            self.seen, reserve=self.rules.reserve, limits=self.rules.limit, held_by_ledger=held or {}
        )

    def name_of(self, name: str) -> str:
        """The name of a device in the ledger; one that nobody knows is left as it is."""
        return inventory.resolve(name, self.seen) or name

    def demand(self, model: ModelSpec) -> Demand:
        """What a model asks for, its devices named as the ledger does."""
        demand = fit.demand_of(model, model.engine.memory, self.default_share)
        if demand.named is None:
            return demand
        return replace(demand, named=tuple(map(self.name_of, demand.named)))

    def wish(self, model: ModelSpec, devices: Mapping[str, Device], measured: int | None = None) -> Wish:
        """Where an instance may run. `measured`: bytes that its last engine had of each device."""
        demand = self.demand(model)
        if not demand.count:
            return Wish({}, 0)
        if demand.named is None:
            devices = {name: device for name, device in devices.items() if name in self.usable}
        needs = fit.needs(demand, devices, measured)
        if demand.elsewhere:  # which of them it will have is not known
            return Wish(needs, len(needs), tuple(needs))
        return Wish(needs, demand.count, demand.named or ())

    def renamed(self, takes: Mapping[str, int]) -> dict[str, int]:
        """What an engine has, its devices named as the ledger does; all of them where it is not known which."""
        if ANY_DEVICE in takes:
            return dict.fromkeys(self.seen, takes[ANY_DEVICE])
        return {self.name_of(name): size for name, size in takes.items()}

    def held_by(self, model: ModelSpec, devices: Iterable[str]) -> dict[str, int]:
        """What an engine has of the devices that it runs on, where nobody has put that on record."""
        where = tuple(devices)
        needs = fit.needs(replace(self.demand(model), named=where), self.devices())
        return {name: needs.get(name, 0) for name in where}

    def measured(self, instance: str, devices: Iterable[str]) -> int:
        """Bytes that an engine has of each of its devices, the largest; 0: that cannot be measured."""
        return max((self.seen[name].held.get(instance, 0) for name in devices if name in self.seen), default=0)

    def allocation(self, model: ModelSpec, where: Where, needs: Mapping[str, int]) -> Allocation:
        """What its engine is told when it starts there."""
        spec = model.engine
        takes = {name: needs[name] for name in where}
        if spec.memory == 0 or not where:
            return Allocation(visible=())
        share = None
        if spec.memory is not None:
            share = fit.share_of(spec.memory, min(self.seen[name].total for name in where))
        seen = [self.seen[name] for name in where]
        gpus, unified = all(one.kind is not Kind.MEMORY for one in seen), any(one.unified for one in seen)
        visible = None
        if gpus and not self.demand(model).elsewhere:
            visible = tuple(one.visible or one.name for one in seen)
        return Allocation(takes, visible, share, gpus, unified)

    @property
    def eviction(self) -> Rules:
        """When others have to give way."""
        return Rules(self.rules.max_wait, self.rules.min_residency)
