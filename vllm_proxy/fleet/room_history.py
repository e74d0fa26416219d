"""What became of those who waited for room: who gave way for whom, what a swap took, what devices did meanwhile.

For the metrics. It is told of every decision once that has begun, and only counts: nothing is decided here, and no
request is looked at. A swap is a start for which others had to give way.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum

from vllm_proxy.domain.decide import RoomNow
from vllm_proxy.domain.histogram import Histogram
from vllm_proxy.domain.ledger import Ask, Depth, Hold, Standing
from vllm_proxy.domain.room import Moves, Wait
from vllm_proxy.fleet.claims import HOST_MEMORY, Claim

_WAITS = (0.05, 0.25, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
_SWAPS = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OVERHEAD = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class How(StrEnum):
    """How a model came for which others had to give way. The values are those of the metrics."""

    COLD = "cold"  # its engine was started
    WAKE = "wake"  # its engine slept, and was woken


class Doing(StrEnum):
    """What a device does that somebody waits for who presses. The values are those of the metrics."""

    SERVING = "serving"
    DRAINING = "draining"
    GOING = "going"  # an engine is being ended, or its memory is not back yet
    COMING = "coming"
    IDLE = "idle"  # nothing of that: time that is lost


_DOES = {
    Standing.SERVES: Doing.SERVING,
    Standing.YIELDS: Doing.DRAINING,
    Standing.GOES: Doing.GOING,
    Standing.COMES: Doing.COMING,
}
_BEST = [*Doing]  # in this order, where several engines are on one device


@dataclass(slots=True)
class _Start:
    """One start, from when it is wanted until it serves."""

    since: float
    swaps: bool = False  # others give way for it
    others: float = 0.0  # seconds that others took, and nobody can shorten
    is_others: bool = False  # they do now


@dataclass(slots=True)
class Counted:
    """What was counted since the daemon began. Seconds, but for what says otherwise."""

    evictions: Counter[tuple[str, Depth, str]] = field(
        default_factory=Counter
    )  # by model, and for which, or HOST_MEMORY
    swaps: Counter[tuple[str, How]] = field(default_factory=Counter)  # by model
    swap_seconds: dict[How, Histogram] = field(default_factory=lambda: {how: Histogram(_SWAPS) for how in How})
    overhead_seconds: dict[How, Histogram] = field(default_factory=lambda: {how: Histogram(_OVERHEAD) for how in How})
    waits: dict[str, Histogram] = field(default_factory=dict)  # by model, until it was admitted
    wanted: dict[tuple[str, Doing], float] = field(default_factory=dict)  # by device

    def keep(self, models: AbstractSet[str], devices: AbstractSet[str]) -> None:
        """Forget the models and the devices that are no more."""
        known = {*models, HOST_MEMORY}
        self.evictions = Counter({key: count for key, count in self.evictions.items() if {key[0], key[2]} <= known})
        self.swaps = Counter({key: count for key, count in self.swaps.items() if key[0] in models})
        self.waits = {model: times for model, times in self.waits.items() if model in models}
        self.wanted = {key: seconds for key, seconds in self.wanted.items() if key[0] in devices}


class RoomHistory:
    """Of one daemon."""

    def __init__(self) -> None:
        self._counted = Counted()
        self._starts: dict[Claim, _Start] = {}  # those that wait or load
        self._doing: dict[str, Doing] = {}  # by device that somebody waits for
        self._at = -math.inf  # when that was so

    def counted(self, now: float, models: AbstractSet[str], devices: AbstractSet[str]) -> Counted:
        """All of it until now, of the models and the devices that there are."""
        self._pass(now)
        self._counted.keep(models, devices)
        return self._counted

    def note_host_memory_full(self, model: str) -> None:
        """An engine of a model that sleeps ends for that."""
        self._counted.evictions[model, Depth.STOP, HOST_MEMORY] += 1

    def follow(
        self, now: RoomNow, moves: Moves, time: float, claims: Iterable[Claim], holds: Callable[[], Iterable[Hold]]
    ) -> None:
        """What was decided has begun. `holds`: who has what since; asked for where somebody waits for a device."""
        self._pass(time)
        known = {claim.name: claim for claim in claims}
        for ask in now.asks:
            if ask.pressing and (claim := known.get(ask.name)) is not None and claim not in self._starts:
                self._starts[claim] = _Start(claim.since)
        self._count(moves, known, time)
        for claim, start in list(self._starts.items()):
            self._follow_start(claim, start, moves, known, time)
        self._doing = _doing(now, moves, holds)

    def _count(self, moves: Moves, claims: Mapping[str, Claim], time: float) -> None:
        """Who was admitted, and who was told to go for whom."""
        for name in moves.admit.keys() & claims.keys():
            claim = claims[name]
            self._counted.waits.setdefault(claim.model, Histogram(_WAITS)).add(max(time - claim.since, 0.0))
        for name, depth in moves.go.items():
            one, whom = claims.get(name), claims.get(moves.go_for[name])
            if one is not None and whom is not None:
                self._counted.evictions[one.model, depth, whom.model] += 1
                if one is not whom and (start := self._starts.get(whom)) is not None:
                    start.swaps = True

    def _follow_start(
        self, claim: Claim, start: _Start, moves: Moves, claims: Mapping[str, Claim], time: float
    ) -> None:
        if claim.waits and claims.get(claim.name) is claim:
            wait = moves.wait.get(claim.name)
            start.is_others = claim.name in moves.short or (wait is not None and _takes_time(wait, claims))
        elif claim.standing is Standing.COMES and not claim.is_done:
            start.is_others = False
        else:
            del self._starts[claim]
            if claim.standing is Standing.SERVES and start.swaps:
                self._served(claim, start, time)

    def _pass(self, now: float) -> None:
        """Time has passed, in which all was as it was decided last."""
        seconds, self._at = max(now - self._at, 0.0), now
        for start in self._starts.values():
            start.others += seconds if start.is_others else 0.0
        wanted = self._counted.wanted
        for device, doing in self._doing.items():
            wanted[device, doing] = wanted.get((device, doing), 0.0) + seconds

    def _served(self, claim: Claim, start: _Start, now: float) -> None:
        engine, took, how, own = claim.tenant.engine, now - start.since, How.COLD, 0.0
        if claim.woke_seconds is not None:
            how, own = How.WAKE, claim.woke_seconds
        elif engine is not None:
            own = engine.age_seconds()
        self._counted.swaps[claim.model, how] += 1
        self._counted.swap_seconds[how].add(took)
        self._counted.overhead_seconds[how].add(max(took - start.others - own, 0.0))


def _takes_time(wait: Wait, claims: Mapping[str, Claim]) -> bool:
    """Whether it waits for what nobody can shorten: turns, requests in flight, ends and starts of other engines."""
    if wait.behind:
        return True
    for name in wait.waits_for:
        claim = claims.get(name)
        if claim is None or claim.standing is not Standing.YIELDS or claim.tenant.in_flight() or claim.is_drained:
            return True
    return False


def _doing(now: RoomNow, moves: Moves, holds: Callable[[], Iterable[Hold]]) -> dict[str, Doing]:
    """What each device does that somebody waits for who presses: the best of what the engines on it do."""
    waits = [(ask, moves.wait[ask.name]) for ask in now.asks if ask.pressing and ask.name in moves.wait]
    doing: dict[str, Doing] = {}
    for ask, wait in waits:
        least = Doing.GOING if ask.name in moves.short else Doing.IDLE  # nothing of ours has what is not free
        for name in wait.where if _is_next(ask, wait, moves) else ():
            if now.devices[name].room < math.inf:
                doing[name] = min(doing.get(name, least), least, key=_BEST.index)
    for hold in holds() if doing else ():
        for name in hold.takes.keys() & doing.keys():
            doing[name] = min(doing[name], _DOES.get(hold.standing, Doing.IDLE), key=_BEST.index)
    for ask, wait in waits:  # who wants several of them waits for the last one: the others are not idle for nothing
        several = [name for name in wait.where if name in doing] if len(wait.where) > 1 else []
        if several and _is_next(ask, wait, moves):
            best = min((doing[name] for name in several), key=_BEST.index)
            doing |= {name: best for name in several if doing[name] is Doing.IDLE}
    return doing


def _is_next(ask: Ask, wait: Wait, moves: Moves) -> bool:
    """Whether it waits for these devices, and not for any of many, nor for what other programs have of them."""
    is_foreign = ask.name in moves.short and ask.name not in moves.place
    count = len(ask.only) or ask.count
    return len(wait.where) == count and ask.name not in {*moves.stuck, *moves.refuse} and not is_foreign
