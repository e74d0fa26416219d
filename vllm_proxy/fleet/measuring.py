"""How much memory of its devices an engine gives back when it falls asleep, as the devices themselves show it."""

import asyncio

from vllm_proxy.domain.ledger import Standing
from vllm_proxy.domain.placement import Machine
from vllm_proxy.fleet.claims import Claim
from vllm_proxy.fleet.room import Room
from vllm_proxy.runtime import clock

_SECONDS = 5.0  # until memory is back that a driver gives back late
_LOOK_SECONDS = 0.01
_AT_LEAST = 0.5  # of what it had
_MOVING = frozenset({Standing.COMES, Standing.YIELDS, Standing.GOES})  # it may take memory, or give some back


class Measuring:
    """Of one engine."""

    def __init__(self, room: Room, claim: Claim) -> None:
        self._room, self._machines = room, room.machines
        self._claim = claim
        self._beside: dict[str, Standing] = {}  # others, as it began
        self._is_by_gauge = False  # what others gave back meanwhile would count, too
        self._before: dict[str, tuple[int, int | None]] = {}
        self._keeps: dict[str, int] = {}

    async def begin(self) -> None:
        """Note what it has now: what was seen last may be older than the engine."""
        machine = self._machines.machine()
        if machine is not None and self._had(machine):  # it can be measured
            machine = await self._look()
        self._before = {} if machine is None else self._had(machine)
        self._beside = self._others()

    async def freed(self) -> bool | None:
        """Whether at least half of what it had is back within some seconds; None: it cannot be measured."""
        if not self._before:
            return None
        began = asyncio.get_running_loop().time()
        while clock.elapsed(began) < _SECONDS:
            machine = await self._look()
            if self._machines.machine() is None:
                return None
            if machine is not None and self._is_back(machine):
                return True
        return False

    async def _look(self) -> Machine | None:
        """The devices, as a look has them that began after this; None: nobody manages them, or none has succeeded."""
        asked = asyncio.get_running_loop().time()
        self._claim.awaits_look = True
        try:
            while (machine := self._machines.machine()) is not None and machine.seen_at <= asked:
                if clock.elapsed(asked) >= _SECONDS:
                    return None
                self._machines.wake()
                await clock.sleep(_LOOK_SECONDS)
            return machine
        finally:
            self._claim.awaits_look = False

    def keeps(self) -> int | None:
        """Bytes of each device that it still has; None: not known, also where others came or went meanwhile."""
        others = self._others()
        is_mixed = others.keys() != self._beside.keys() or bool(_MOVING & {*others.values(), *self._beside.values()})
        return None if self._is_by_gauge and is_mixed else max(self._keeps.values(), default=None)

    def _others(self) -> dict[str, Standing]:
        """Who has something of its devices, and what they do."""
        mine = self._before.keys()
        holds = self._room.memory()[1]
        return {one.name: one.standing for one in holds if one.name != self._claim.name and mine & one.takes.keys()}

    def _had(self, machine: Machine) -> dict[str, tuple[int, int | None]]:
        """What it has of each device, and what is free there; nothing where that is not measured."""
        allocation = self._claim.allocation
        if allocation is None or not allocation.gpus:
            return {}
        found: dict[str, tuple[int, int | None]] = {}
        for name, size in machine.renamed(allocation.takes).items():
            seen = machine.seen.get(name)
            if seen is None or seen.free is None:
                return {}
            found[name] = seen.held.get(self._claim.name, size), seen.free
        return found

    def _is_back(self, machine: Machine) -> bool:
        now = self._had(machine)
        if not now or now.keys() != self._before.keys():
            return False
        for name, (had, free) in self._before.items():
            held, left = now[name]
            seen = machine.seen[name]
            self._is_by_gauge = self._claim.name not in seen.held
            measured = held if not self._is_by_gauge else had - max((left or 0) - (free or 0), 0)
            self._keeps[name] = max(measured, 0)
        return all(self._keeps[name] <= (1 - _AT_LEAST) * had for name, (had, _) in self._before.items())
