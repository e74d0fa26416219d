"""Every claim on devices: who has what, who waits, and what was decided about it.

Owns the claims, from before an engine starts until nothing of it is left. Who may start, where, and who gives way for
it is decided by `domain/room.py`: the fleet loop has it decide about `now()` after every change, and `follow` carries
that out. Where devices are not managed, engines take turns on those that they use.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial

from vllm_proxy.domain import fit, host_memory, room
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.decide import RoomNow
from vllm_proxy.domain.devices import NO_DEVICES, Allocation, Names
from vllm_proxy.domain.ledger import Ask, Depth, Device, Hold, Standing, Where
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.domain.placement import Machine
from vllm_proxy.domain.room import Moves
from vllm_proxy.fleet.claims import HOST_MEMORY, RESIDUE_BYTES, Claim, Leftover, Tenant, Waits
from vllm_proxy.fleet.managed import Machines
from vllm_proxy.fleet.reports import Reports
from vllm_proxy.fleet.room_history import RoomHistory
from vllm_proxy.runtime.background import notify

EARLIER = "an earlier "  # before the name of an instance, where one of an earlier daemon is there beside its own
NO_TOTAL = (
    "memory is a part of a device whose size nobody knows here: no device is managed ([devices] source); "
    "write gpu_memory_utilization in its place"
)
_INSTANT = 1e-6  # seconds


def _none_used(_: EngineSpec) -> Allocation:
    return NO_DEVICES


def _not_kept(_: EngineSpec, __: int) -> None:
    """Nobody keeps it."""


class Room:
    """The claims of one daemon. `wake` is called after each change."""

    def __init__(self, wake: Callable[[], None], machines: Machines) -> None:
        self.machines = machines
        self.unmanaged: Callable[[EngineSpec], Allocation] = _none_used  # what an engine uses where nobody does
        self.learned: Callable[[EngineSpec, int], None] = _not_kept  # an engine of a spec has so much of each device
        self.history = RoomHistory()
        self.last = RoomNow()  # what was decided about last, and what was decided
        self.moves = Moves()
        self._wake = wake
        self._listeners: list[Callable[[], None]] = []
        self._last_came = -math.inf
        self._claims: dict[Claim, None] = {}  # in the order they came
        self._leftovers: dict[Leftover, None] = {}
        self._refused: dict[Tenant, None] = {}  # for want of memory that was not the daemon's to give

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every decision, and after what is new of the devices."""
        self._listeners.append(listener)

    # For supervisors

    def ask(self, tenant: Tenant) -> Claim:
        """An instance wants to start."""
        return self._add(tenant)

    def hold(self, tenant: Tenant, allocation: Allocation) -> Claim:
        """An engine runs already, and loads as far as anybody knows: it is admitted as it is."""
        claim = self._add(tenant)
        claim.admit(allocation)
        return claim

    def leave(self, name: str, takes: Mapping[str, int]) -> Leftover:
        """An engine that an earlier daemon left is ended. Nothing starts at all before that was tried."""
        left = Leftover(name, takes, self._changed)
        self._leftovers[left] = None
        self._wake()
        return left

    def not_ended(self) -> dict[str, str]:
        """The instances whose engines could not be ended, and why."""
        every: list[Claim | Leftover] = [*self._claims, *self._leftovers]
        return dict(sorted((one.name, one.not_ended) for one in every if one.not_ended is not None))

    def memory(self) -> tuple[Mapping[str, Device], list[Hold]]:
        """The devices as decisions count with them, and who has what of them; nothing where nobody manages any."""
        machine = self.machines.machine()
        if machine is None:
            return {}, []
        left = {one: machine.renamed(one.takes) for one in self._leftovers}
        takes = {claim: self._taken(claim, machine) for claim in self._claims if claim.allocation is not None}
        holds = [*self._leftover_holds(left), *(claim.held(sizes) for claim, sizes in takes.items())]
        return machine.devices({hold.name.removeprefix(EARLIER): hold.takes for hold in holds}), holds

    def held(self) -> dict[str, Mapping[str, int]]:
        """What the engine of each instance has, bytes by device; 0: not known."""
        machine = self.machines.machine()
        has = [(claim, claim.allocation) for claim in self._claims if claim.allocation is not None]
        return {one.name: own.takes if machine is None else self._taken(one, machine) for one, own in has}

    def has_host_memory_for(self, claim: Claim) -> bool:
        """Whether what its engine has of its devices may go to the machine's memory."""
        budget, allocation = self.machines.host_budget(), claim.allocation
        if budget is None or allocation is None or not allocation.gpus or claim.tenant.spec.engine.sleep != 1:
            return True
        return host_memory.fits(claim.host_bytes() or claim.host_estimate(allocation.takes), budget)

    def is_asked(self) -> bool:
        """Whether anybody waits for room, or to be measured."""
        return any(claim.waits or claim.awaits_look for claim in self._claims)

    def fits_beside(self, model: ModelSpec, waiting: Claim | None) -> bool:
        """Whether one more instance of a model finds its room now, and nobody has to give way.

        `waiting`: the claim of that instance, where it has asked already.
        """
        machine = self.machines.machine()
        if waiting is None or machine is None:
            return self.place_of(model) is not None
        if not waiting.waits or waiting.since > machine.looked_at:
            return True
        now = self._managed(machine)
        return waiting.name in room.decide(0.0, now.devices, now.holds, now.asks, now.rules).admit

    def place_of(self, model: ModelSpec) -> Where | None:
        """Where one more instance of a model would run, as things are; None: it would have to wait."""
        machine = self.machines.machine()
        if machine is None:
            return ()
        name, moves = self._tried(machine, model, 0.0, since=math.inf, pressing=False)
        return moves.admit.get(name)

    def _has_room_for(self, model: ModelSpec) -> bool:
        """Whether an instance of a model could come by now, though others may have to go for it."""
        machine = self.machines.machine()
        if machine is None:
            return False
        time = asyncio.get_running_loop().time()
        name, moves = self._tried(machine, model, time, since=time, pressing=True)
        return name not in {*moves.short, *moves.stuck, *moves.refuse}

    def _tried(
        self, machine: Machine, model: ModelSpec, time: float, *, since: float, pressing: bool
    ) -> tuple[str, Moves]:
        """What would be decided if one more instance of a model asked; and its name."""
        now = self._managed(machine)
        wish = machine.wish(model, now.devices)
        ask = Ask(f"{model.id}/+", model.id, wish.needs, wish.count, wish.only, since=since, pressing=pressing)
        return ask.name, room.decide(time, now.devices, now.holds, [*now.asks, ask], now.rules)

    def forget(self, tenant: Tenant) -> None:
        """It does not want to start any more, though it was refused."""
        self._refused.pop(tenant, None)

    def _add(self, tenant: Tenant) -> Claim:
        self.forget(tenant)
        # Nobody came at the same time as another one, so that they get their turns in that order.
        self._last_came = max(asyncio.get_running_loop().time(), self._last_came + _INSTANT)
        claim = Claim(tenant, self._last_came, self._changed)
        self._claims[claim] = None
        self.machines.wake()
        self._wake()
        return claim

    def _changed(self, one: Claim | Leftover) -> None:
        if one.is_done and isinstance(one, Claim):
            self._claims.pop(one, None)
        elif one.is_done and isinstance(one, Leftover):
            self._leftovers.pop(one, None)
        if one.is_done or (isinstance(one, Claim) and one.waits):  # a sleeper asks as any other does
            self.machines.wake()
        self._wake()

    # What is: for the fleet loop

    def now(self) -> RoomNow:
        """Who holds and who asks."""
        machine = self.machines.machine()
        return self._taking_turns() if machine is None else self._managed(machine)

    def _managed(self, machine: Machine) -> RoomNow:
        devices, holds = self.memory()
        return RoomNow(devices, holds, list(self._asks(machine, devices)), machine.eviction)

    def _asks(self, machine: Machine, devices: Mapping[str, Device]) -> Iterator[Ask]:
        stays = Counter(claim.model for claim in self._claims if claim.stays)
        serves = {claim.model for claim in self._claims if claim.standing is Standing.SERVES}
        waiting: set[str] = set()
        for claim in self._waiting():
            if claim.model in serves:
                claim.forget_wait()
            if claim.since > machine.looked_at:  # what is free may have changed: it is being looked at
                continue
            spec = claim.tenant.spec
            always, wanted_since = spec.policy.start == "always", claim.wanted_since()
            first = claim.model not in waiting and not stays[claim.model]
            waiting.add(claim.model)
            # One that comes beside an old one, to take its place, makes nobody go.
            pressing = stays[claim.model] < spec.policy.replicas if always else wanted_since is not None and first
            since = claim.since if always or wanted_since is None else wanted_since
            wish = machine.wish(spec, devices, claim.measured)
            yield Ask(
                claim.name, claim.model, wish.needs, wish.count, wish.only, always, spec.policy.priority, since,
                pressing, claim.place, claim.short,
            )  # fmt: skip

    def _taken(self, claim: Claim, machine: Machine) -> Mapping[str, int]:
        """What it has of each device."""
        assert claim.allocation is not None, "it was admitted"
        takes = machine.renamed(claim.allocation.takes)
        if takes and not all(takes.values()):  # it came while nobody managed the devices
            takes = machine.held_by(claim.tenant.spec, takes)
        if claim.standing is Standing.SLEEPS and claim.allocation.gpus:
            keeps = claim.keeps if claim.keeps is not None else claim.tenant.keeps() or RESIDUE_BYTES
            return {name: min(size, keeps) for name, size in takes.items()}
        if not claim.found:
            return takes
        return {name: fit.held(size, claim.found) for name, size in takes.items()}

    def _taking_turns(self) -> RoomNow:
        """Nobody knows what they have of their devices, so who serves is in nobody's way."""
        wishes = {claim: self._unmanaged(claim) for claim in self._waiting() if not claim.is_unsized}
        moving = {
            claim: claim.allocation
            for claim in self._claims
            if claim.allocation is not None and claim.standing is not Standing.SERVES
        }
        used: list[Allocation | Leftover] = [*wishes.values(), *moving.values(), *self._leftovers]
        names = Names(name for one in used for name in one.takes)
        holds = [
            *self._leftover_holds({one: dict.fromkeys(names.of(one.takes), 0) for one in self._leftovers}),
            *(claim.held(dict.fromkeys(names.of(allocation.takes), 0)) for claim, allocation in moving.items()),
        ]
        asks = []
        for claim, allocation in wishes.items():
            only = names.of(allocation.takes)
            needs = dict.fromkeys(only, 0)
            asks.append(Ask(claim.name, claim.model, needs, len(only), only, since=claim.since, place=claim.place))
        return RoomNow(dict.fromkeys(names.all(), Device()), holds, asks)

    def _unmanaged(self, claim: Claim) -> Allocation:
        if claim.unmanaged is None:
            claim.unmanaged = self.unmanaged(claim.tenant.spec.engine)
        return claim.unmanaged

    def _waiting(self) -> Iterator[Claim]:
        return (claim for claim in self._claims if claim.waits)

    def _leftover_holds(self, takes: Mapping[Leftover, Mapping[str, int]]) -> Iterator[Hold]:
        running = {claim.name for claim in self._claims if not claim.waits}
        for one, sizes in takes.items():
            name = f"{EARLIER}{one.name}" if one.name in running else one.name
            yield Hold(name, "", sizes, Standing.GOES, not_ended=one.not_ended, untried=one.untried)

    # What was decided: by the fleet loop

    def look(self) -> None:
        """The devices were looked at."""
        self._learn(self.machines.machine())
        for tenant in [one for one in self._refused if self._has_room_for(one.spec)]:
            del self._refused[tenant]
            notify([tenant.on_room])
        if self.is_asked():
            self._wake()
        else:
            notify(self._listeners)

    def _learn(self, machine: Machine | None) -> None:
        """What the engines have that serve since before the look began. One that failed has seen nothing."""
        for claim in self._claims:
            if claim.standing is not Standing.SERVES or claim.allocation is None or claim.found is not None:
                continue
            if machine is None or machine.looked_at > claim.since:
                claim.awaits_look = False
            if machine is not None and machine.seen_at > claim.since:
                claim.found = machine.measured(claim.name, machine.renamed(claim.allocation.takes))
                self._wake()
                if claim.found:
                    self.learned(claim.tenant.spec.engine, claim.found)

    def follow(self, now: RoomNow, moves: Moves, time: float) -> None:
        """Carry out what was decided about `now`, and report to those who wait why."""
        self.last, self.moves, machine = now, moves, self.machines.machine()
        claims = {claim.name: claim for claim in self._waiting()}
        asks = {ask.name: ask for ask in now.asks}
        for name, where in moves.admit.items():  # in the order of their turns
            if name in claims:
                self._admit(claims.pop(name), where, asks[name])
        for claim in [claim for claim in self._claims if claim.name in moves.go]:
            if claim.standing in {Standing.SERVES, Standing.SLEEPS}:
                claim.give_way(moves.go[claim.name], moves.go_for[claim.name])
        self._resume({name for one in claims.values() if one.is_wanted(time) and one.name in moves.wait
                      for name in moves.wait[one.name].waits_for})  # fmt: skip
        self._keep_host_memory()
        self._let_go()
        reports = Reports(now, moves, time, self._claims, machine)
        for name, claim in claims.items():
            claim.place, claim.short = moves.place.get(name, ()), moves.short.get(name)
            if name in moves.refuse:
                self._refuse(claim, Reason.DOES_NOT_FIT, reports.refusal(name))
            elif machine is None and claim.is_unsized:
                self._await_devices(claim)
        self._watch_idle()
        if not reports.tell(claims):
            self._wake()
        self.history.follow(now, moves, time, self._claims, lambda: self.memory()[1])
        notify(self._listeners)

    def _admit(self, claim: Claim, where: Where, ask: Ask) -> None:
        machine, spec = self.machines.machine(), claim.tenant.spec
        if claim.allocation is not None:  # it wakes where it sleeps
            claim.admit(claim.allocation)
        elif machine is None:
            claim.admit(self._unmanaged(claim))
        else:
            claim.admit(machine.allocation(spec, where, ask.needs))

    def _refuse(self, claim: Claim, reason: Reason, why: str) -> None:
        """It rests in `error` until there is room, or somebody starts it."""
        self._refused[claim.tenant] = None
        claim.refuse(reason, why)

    def _await_devices(self, claim: Claim) -> None:
        """What `memory` says is a part of a device whose size nobody knows."""
        if (problem := self.machines.problem) is None:
            self._refuse(claim, Reason.INVALID_ARGUMENTS, NO_TOTAL)
        else:
            claim.tell(Waits(f"waits: {problem}", ready_in=None))

    def _resume(self, awaited: AbstractSet[str]) -> None:
        """Who gives way, and is awaited by nobody any more, serves on."""
        for claim in self._claims:
            if claim.standing is Standing.YIELDS and claim.may_resume and claim.name not in awaited:
                claim.resume()
                self._wake()

    def _keep_host_memory(self) -> None:
        """Sleepers end that have more of the machine's memory than they may."""
        budget = self.machines.host_budget()
        if budget is None:
            return
        slept = {one.name: one for one in self._claims if one.host_bytes() and not one.ends}
        sleepers = {name: host_memory.Sleeper(one.host_bytes(), one.at_rest_since) for name, one in slept.items()}
        for name in host_memory.to_end(sleepers, budget):
            slept[name].give_way(Depth.STOP, HOST_MEMORY)
            self.history.note_host_memory_full(slept[name].model)
            self._wake()

    def _let_go(self) -> None:
        """Memory is not set free beside an engine that measures it."""
        comes = [claim for claim in self._claims if claim.standing is Standing.COMES]
        for claim in self._claims:
            if claim.is_drained and not any(claim.meets(other) for other in comes):
                claim.let_go()

    def _watch_idle(self) -> None:
        """Look again when one has no request in flight any more that somebody waits for."""
        awaited = {name for wait in self.moves.wait.values() for name in wait.waits_for}
        for claim in self._claims:
            serves = claim.standing is Standing.SERVES
            if serves and claim.name in awaited and not claim.watches_idle and claim.tenant.idle_since() is None:
                claim.watches_idle = True
                claim.tenant.on_idle(partial(self._is_idle, claim))

    def _is_idle(self, claim: Claim) -> None:
        claim.watches_idle = False
        self._wake()
