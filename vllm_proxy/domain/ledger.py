"""The memory of the devices while one decision is made: who holds what, what comes back, what is promised to whom.

For `room`, which decides who starts where, and `eviction`, which says who would have to go for it. Sizes are bytes,
times are seconds of one clock. A device is named as its inventory names it, so one device has one name.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import combinations, islice

_MOST_SETS = 200  # of devices that one ask is planned on: all of them up to 8 devices

type Where = tuple[str, ...]  # the devices of one set
type Allowed = Callable[[str], bool]


class Standing(StrEnum):
    """What a holder of memory does. The values are those of the REST API."""

    COMES = "comes"  # loads or wakes, and measures its devices: nobody else may move there
    SERVES = "serves"
    YIELDS = "yields"  # takes no new requests; those in flight end
    GOES = "goes"  # sets memory free: nobody else may come there
    SLEEPS = "sleeps"


_MOVES = frozenset({Standing.COMES, Standing.GOES})
_LEAVES = frozenset({Standing.YIELDS, Standing.GOES})


class Depth(StrEnum):
    """How far one goes who makes room."""

    SLEEP = "sleep"
    STOP = "stop"


class Kind(StrEnum):
    """What a device is. The values are those of the REST API."""

    GPU = "gpu"
    MIG = "mig"
    MEMORY = "memory"  # the machine's own, where engines compute on its processors


@dataclass(frozen=True, slots=True)
class Device:
    """One device. As it is by default, nothing is known of it, and engines only take turns there."""

    total: int = 0  # as vLLM counts it: an engine has devices of one total, unless its model names others
    room: float = math.inf  # what engines may have together
    foreign: int = 0  # of `room`, what other programs have
    free: float = math.inf  # as measured; inf: it cannot be measured
    kind: Kind = Kind.GPU
    unified: bool = False  # its memory is the machine's own, in which a GPU computes


@dataclass(frozen=True, slots=True)
class Hold:
    """What one instance has."""

    name: str  # "chat/0"
    model: str
    takes: Mapping[str, int]  # by device
    standing: Standing
    keeps: int | None = None  # what it would keep of each device while it sleeps; None: it can only be stopped
    always: bool = False  # never asked to go
    priority: int = 0
    since: float = 0.0  # it serves
    idle_since: float | None = None  # None: requests are in flight
    to: Depth | None = None  # how far it goes, while it yields or goes
    start_seconds: float = 60.0
    wake_seconds: float = 2.0
    not_ended: str | None = None  # why its engine could not be ended: nobody knows when its memory comes back
    untried: bool = False  # an earlier daemon left it, and nobody has tried to end it yet

    def keeps_of(self, device: str, depth: Depth | None) -> int:
        """What it has of a device once it has gone so far; None: not at all."""
        takes = self.takes.get(device, 0)
        if depth is None:
            return takes
        return min(takes, self.keeps) if depth is Depth.SLEEP and self.keeps is not None else 0

    @property
    def may_sleep(self) -> bool:
        """Whether it is awake, and may go no further than to sleep."""
        return self.keeps is not None and self.standing is not Standing.SLEEPS

    @property
    def busy(self) -> bool:
        """Whether requests are in flight."""
        return self.standing is Standing.SERVES and self.idle_since is None


@dataclass(frozen=True, slots=True)
class Short:
    """The ledger has room for an ask, and the devices do not. `evicted`: one more went for it already."""

    since: float
    evicted: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """An instance that wants room. One that sleeps wakes on the devices it has, or is started on others.

    `place` and `short` are what the last decision said of it: they are handed back.
    """

    name: str
    model: str
    needs: Mapping[str, int]  # by device: where it may run, and what it has to find there
    count: int = 1  # how many devices
    only: Where = ()  # exactly these
    always: bool = False
    priority: int = 0
    since: float = 0.0
    pressing: bool = True  # a request or a person waits, and nothing of its model serves: others may have to go
    place: Where = ()
    short: Short | None = None


def admitted(ask: Ask, where: Where) -> Hold:
    """What one has that was just admitted."""
    takes = {device: ask.needs[device] for device in where}
    return Hold(ask.name, ask.model, takes, Standing.COMES, always=ask.always, priority=ask.priority)


class Ledger:
    """What is free, what comes back, and whose turn is next. Changed by one decision as it proceeds."""

    def __init__(self, devices: Mapping[str, Device], holds: Sequence[Hold]) -> None:
        self.devices = devices
        self.holds = {hold.name: hold for hold in holds}
        self.models = {hold.model for hold in holds}
        self.version = 0  # another one after each change: what was asked before may have another answer
        self.going: set[str] = set()  # asked to go by this decision
        self.next: dict[str, str] = {}  # by device: the ask whose turn is next there
        self.reserved: dict[str, str] = {}  # by device: the pressing ask for which others are to go, though not yet
        self._places = {name: place for place, name in enumerate(devices)}
        self._on: dict[str, list[Hold]] = {name: [] for name in devices}
        for hold in holds:
            for name in hold.takes.keys() & devices.keys():
                self._on[name].append(hold)
        self._free = {
            name: device.room - device.foreign - sum(hold.takes[name] for hold in self._on[name])
            for name, device in devices.items()
        }
        self._for_good = {name: sum(hold.takes[name] for hold in on if _stays(hold)) for name, on in self._on.items()}
        self._awake = {name: sum(map(_is_awake, on)) for name, on in self._on.items()}
        self._asleep = {name: len(on) - self._awake[name] for name, on in self._on.items()}
        self._moving = {name for name, on in self._on.items() if any(hold.standing in _MOVES for hold in on)}
        self._back = dict.fromkeys(devices, 0)  # what those have who are on their way out
        for hold in holds:
            if hold.standing in _LEAVES and hold.not_ended is None:
                self._count_back(hold, hold.to or Depth.STOP)

    # Questions

    def on(self, where: Iterable[str]) -> list[Hold]:
        """Those who have something of these devices, each once."""
        found = {hold.name: hold for device in where for hold in self._on[device]}
        return list(found.values())

    def awake(self, where: Iterable[str]) -> int:
        """How many compute on these devices, or will."""
        return sum(self._awake[device] for device in where)

    def left(self, ask: Ask, device: str) -> float:
        """What is left over of a device when the ask has its part; negative: so much is missing."""
        return self._free[device] - self._wants(ask, device)

    def left_later(self, ask: Ask, device: str) -> float:
        """As `left`, once those have gone who are on their way out."""
        return self.left(ask, device) + self._back[device]

    def fits(self, ask: Ask, *, measured: bool) -> Where | None:
        """Where it fits now: on each device nobody moves, and nobody's turn is before it.

        `measured`: and as much is free on the device itself.
        """

        def allowed(name: str) -> bool:
            if name in self._moving or not self.is_open(ask, name) or self.left(ask, name) < 0:
                return False
            return not measured or self.devices[name].free >= self._wants(ask, name)

        return self._best(ask, allowed)

    def will_fit(self, ask: Ask) -> Where | None:
        """Where it fits once those have gone who are on their way out."""
        return self._best(ask, lambda name: self.is_open(ask, name) and self.left_later(ask, name) >= 0)

    def elsewhere(self, ask: Ask) -> Where | None:
        """Other devices, where one that sleeps would fit now if it were started anew."""
        needs = {name: size for name, size in ask.needs.items() if name not in self.holds[ask.name].takes}
        return self.fits(_anew(replace(ask, needs=needs)), measured=True)

    def never_fits(self, ask: Ask, *, anew: bool = False) -> bool:
        """Whether too little would be left even when all had gone that ever may, other programs among them.

        `anew`: one that sleeps would not wake, but be started, wherever it may run.
        """
        own = self.holds.get(ask.name)

        def possible(name: str) -> bool:
            stay = self._for_good[name]
            if own is not None and _stays(own):
                stay -= own.takes.get(name, 0)
            return stay + ask.needs[name] <= self.devices[name].room

        return next(self.sets(_anew(ask) if anew else ask, possible), None) is None

    def is_open(self, ask: Ask, device: str) -> bool:
        """Whether no other ask comes first on this device."""
        return device not in self.next and (ask.pressing or device not in self.reserved)

    def is_leaving(self, ask: Ask) -> Hold | None:
        """What is still there of the instance that asks, if it has to go before."""
        hold = self.holds.get(ask.name)
        return None if hold is None or hold.standing is Standing.SLEEPS else hold

    def sets(self, ask: Ask, allowed: Allowed) -> Iterator[Where]:
        """The sets of devices that it may run on: where it sleeps, what its model names, or any of one total.

        Of many, the first that have most room.
        """
        if (fixed := self._fixed(ask)) is not None:
            if all(name in self.devices and name in ask.needs and allowed(name) for name in fixed):
                yield fixed
            return
        for group in self._groups(ask, allowed):
            if math.comb(len(group), ask.count) > _MOST_SETS:
                group.sort(key=lambda name: -self.left_later(ask, name))
            yield from map(self._ordered, islice(combinations(group, ask.count), _MOST_SETS))

    def _best(self, ask: Ask, allowed: Allowed) -> Where | None:
        """The place it has been promised while that is possible; else the best one.

        There the fewest compute; then the fewest sleep, since they will want their devices again; then least is left
        over. All add up over the devices of a set, so the best of them make the best set.
        """
        if self._fixed(ask) is not None:
            return next(self.sets(ask, allowed), None)
        if self._is_set(ask, ask.place, allowed):
            return ask.place

        def price(name: str) -> tuple[int, int, float]:
            return self._awake[name], self._asleep[name], self.left_later(ask, name)

        found = [sorted(group, key=price)[: ask.count] for group in self._groups(ask, allowed)]
        prices = [tuple(map(sum, zip(*map(price, where), strict=True))) for where in found]
        return self._ordered(min(zip(prices, found, strict=True))[1]) if found else None

    def _groups(self, ask: Ask, allowed: Allowed) -> list[list[str]]:
        """Devices of one total, enough of them for one set."""
        groups: dict[int, list[str]] = {}
        for name, device in self.devices.items():
            if name in ask.needs and allowed(name):
                groups.setdefault(device.total, []).append(name)
        if not ask.count:
            return [[]]
        return [group for group in groups.values() if len(group) >= ask.count]

    def _ordered(self, where: Iterable[str]) -> Where:
        """As the inventory has them: one set has one form, and is recognized."""
        return tuple(sorted(where, key=self._places.__getitem__))

    def _is_set(self, ask: Ask, where: Where, allowed: Allowed) -> bool:
        known = all(name in self.devices and name in ask.needs for name in where)
        return known and len(where) == ask.count and all(map(allowed, where))

    def _fixed(self, ask: Ask) -> Where | None:
        hold = self.holds.get(ask.name)
        return tuple(hold.takes) if hold is not None else ask.only or None

    def _wants(self, ask: Ask, device: str) -> int:
        hold = self.holds.get(ask.name)  # asleep: it has a part of it
        return ask.needs[device] - (hold.takes.get(device, 0) if hold is not None else 0)

    # Changes

    def admit(self, ask: Ask, where: Where) -> None:
        """It comes there now."""
        hold = admitted(ask, where)
        for device in where:
            self._free[device] -= self._wants(ask, device)
            self._for_good[device] += self._wants(ask, device) if hold.always else 0
            self._awake[device] += 1
            self._asleep[device] -= ask.name in self.holds
            self._moving.add(device)
            self._on[device] = [*(other for other in self._on[device] if other.name != ask.name), hold]
        self.holds[ask.name] = hold
        self.models.add(hold.model)
        self.version += len(where)

    def promise(self, ask: Ask, where: Where) -> None:
        """The next turn on these devices is its: nothing of them is given to those behind it."""
        self.next |= dict.fromkeys(where, ask.name)
        self.version += len(where)

    def reserve(self, ask: Ask, where: Where) -> None:
        """Whoever does not press keeps off these devices: others are to go for it, though not yet."""
        for device in where:
            if device not in self.reserved:
                self.reserved[device] = ask.name
                self.version += 1

    def leave(self, go: Mapping[str, Depth]) -> None:
        """These are asked to go."""
        self.going |= go.keys()
        self.version += len(go)
        for name, depth in go.items():
            self._count_back(self.holds[name], depth)

    def stay(self, hold: Hold, depth: Depth) -> None:
        """It is not asked to go so far after all."""
        self.going.remove(hold.name)
        self.version += 1
        self._count_back(hold, depth, -1)

    def _count_back(self, hold: Hold, depth: Depth, times: int = 1) -> None:
        for device in hold.takes.keys() & self._back.keys():
            self._back[device] += times * (hold.takes[device] - hold.keeps_of(device, depth))
            self._awake[device] -= times * _is_awake(hold)
            self._asleep[device] += times * ((depth is Depth.SLEEP) - (not _is_awake(hold)))


def _anew(ask: Ask) -> Ask:
    """As one that sleeps nowhere."""
    return replace(ask, name="")


def _stays(hold: Hold) -> bool:
    return hold.always and hold.standing not in _LEAVES


def _is_awake(hold: Hold) -> bool:
    return hold.standing is not Standing.SLEEPS
