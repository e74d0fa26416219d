"""Who would have to go so that an ask finds its room, and from when on: the plan that loses least.

For `room`, which decides whether they go. Nothing goes that can be spared; who may go and when is said here alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import groupby

from vllm_proxy.domain.ledger import Ask, Depth, Hold, Ledger, Standing, Where

_SETTLED = frozenset({Standing.SERVES, Standing.SLEEPS})  # may be asked to go
_EVER = _SETTLED | {Standing.COMES}  # or will be, once it serves


type _Worth = tuple[int, bool, float, str]  # priority, in use, seconds that its return costs where it ends, name


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator sets, and how long one is left alone that serves. Seconds, or parts of what a return costs."""

    max_wait: float = 30.0  # a request that waits longer makes even a busy one go
    min_residency: float = 10.0  # it serves at least so long
    patience: float = 0.5  # of its return: so long an idle one may expect its next request
    most_patience: float = 5.0
    worth: float = 1.0  # of its return: so long a busy one serves at least


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Who goes, how far and from when on (inf: not known yet), so that an ask has its room on these devices."""

    where: Where
    go: Mapping[str, Depth]
    at: float
    loss: tuple[float, ...]  # less is better


@dataclass(frozen=True, slots=True)
class _Part:
    """Of a plan, on some of its devices: who goes how far, from when on, and what is left over then."""

    gone: Sequence[tuple[Hold, Depth]]
    at: float
    left: float


class Planner:
    """Makes plans while one decision is made. `wanted`: the instances that a pressing ask is for."""

    def __init__(self, now: float, rules: Rules, ledger: Ledger, wanted: AbstractSet[str]) -> None:
        self._now, self._rules, self._ledger, self._wanted = now, rules, ledger, wanted
        self._worths: dict[str, _Worth] = {}
        self._version = -1  # of the ledger that this is about:
        self._able_on: dict[tuple[str, AbstractSet[Standing]], list[Hold]] = {}
        self._known: dict[str, Plan | None] = {}  # by ask

    def plan(self, ask: Ask) -> Plan | None:
        """The one that loses least; the place that was chosen before, unless who goes elsewhere may go now.

        So an ask that has waited too long is not sent from one place to another, while others come where it was.
        """
        self._forget_what_has_changed()
        if ask.name not in self._known:
            self._known[ask.name] = self._plan(ask)
        return self._known[ask.name]

    def _forget_what_has_changed(self) -> None:
        if self._version != self._ledger.version:
            self._version = self._ledger.version
            self._able_on.clear()
            self._known.clear()

    def _plan(self, ask: Ask) -> Plan | None:
        plans = self._plans(ask, _SETTLED) or self._plans(ask, _EVER)
        best = min(plans, key=lambda plan: (plan.loss, plan.where), default=None)
        kept = next((plan for plan in plans if plan.where == ask.place), None)
        return kept if kept is not None and best is not None and best.at > self._now else best

    def by_worth(self, holds: Iterable[Hold]) -> list[Hold]:
        """In the order in which they are spared: by priority, those in use, those whose return costs most."""
        return sorted(holds, key=self._worth, reverse=True)

    def foreign_in_the_way(self, ask: Ask) -> Where | None:
        """Where it could be given room if other programs had nothing."""

        def possible(name: str) -> bool:
            foreign = self._ledger.devices[name].foreign
            return foreign > 0 and self._left_at_most(ask, name, self._able(ask, name, _EVER)) + foreign >= 0

        return next(self._ledger.sets(ask, lambda name: self._ledger.is_open(ask, name) and possible(name)), None)

    def one_more(self, ask: Ask, where: Where) -> str | None:
        """Whom to ask next, where all had gone that had to and the devices are still short; None: nobody may go now."""
        able = [hold for device in where for hold in self._able(ask, device, _SETTLED)]
        able = [hold for hold in able if self._may_go_at(hold, Depth.STOP, ask) <= self._now]
        return min(able, key=self._worth).name if able else None

    def _plans(self, ask: Ask, standings: AbstractSet[Standing]) -> list[Plan]:
        able = {name: self._able(ask, name, standings) for name in self._ledger.devices}
        left = {name: self._left_at_most(ask, name, able[name]) for name in ask.needs.keys() & able.keys()}
        sets = self._ledger.sets(ask, lambda name: self._ledger.is_open(ask, name) and left[name] >= 0)
        apart = all(len(hold.takes) == 1 for holds in able.values() for hold in holds)
        parts: dict[Where, _Part] = {}
        plans = []
        for where in sets:  # of devices that share no holder each is looked at once, whatever sets it is in
            pieces = [(name,) for name in where] if apart else [where]
            for piece in pieces:
                if piece not in parts:
                    parts[piece] = self._part(ask, piece, able, left)
            plans.append(self._joined(where, [parts[piece] for piece in pieces]))
        return plans

    def _part(self, ask: Ask, where: Where, able: Mapping[str, Sequence[Hold]], most: Mapping[str, float]) -> _Part:
        left = {name: most[name] for name in where}
        holds: Sequence[Hold] = able[where[0]] if len(where) == 1 else self._merged(able[name] for name in where)
        gone: list[tuple[Hold, Depth]] = []
        for _, alike in groupby(holds, key=lambda hold: self._worth(hold)[:2]):
            gone += _go(list(alike), left)
        at = max((self._may_go_at(hold, depth, ask) for hold, depth in gone), default=self._now)
        return _Part(gone, max(at, self._now), sum(left.values()))

    def _merged(self, able: Iterable[Iterable[Hold]]) -> list[Hold]:
        return self.by_worth({hold.name: hold for holds in able for hold in holds}.values())

    def _joined(self, where: Where, parts: Sequence[_Part]) -> Plan:
        gone = [one for part in parts for one in part.gone]
        at = max((part.at for part in parts), default=self._now)
        loss = self._loss(where, gone, at, sum(part.left for part in parts))
        return Plan(where, {hold.name: depth for hold, depth in gone}, at, loss)

    def _loss(self, where: Where, gone: Sequence[tuple[Hold, Depth]], at: float, left: float) -> tuple[float, ...]:
        """Busy ones, then priority, then seconds (of their returns, and until they may go), then the placement."""
        busy = sum(hold.busy for hold, _ in gone)
        priority = max((hold.priority for hold, _ in gone), default=-math.inf)
        seconds = sum(self._cost(hold, depth) for hold, depth in gone) + at - self._now
        awake = (len(hold.takes.keys() & {*where}) for hold, _ in gone if hold.standing is not Standing.SLEEPS)
        return (busy, priority, seconds, self._ledger.awake(where) - sum(awake), left)

    def _able(self, ask: Ask, device: str, standings: AbstractSet[Standing]) -> list[Hold]:
        """Who may be asked to go for it, and was not yet; worth most first."""
        self._forget_what_has_changed()
        if (found := self._able_on.get((device, standings))) is None:
            able = (hold for hold in self._ledger.on([device]) if hold.standing in standings and not hold.always)
            found = self._able_on[device, standings] = self.by_worth(
                hold for hold in able if hold.name not in self._ledger.going
            )
        return [hold for hold in found if hold.model != ask.model] if ask.model in self._ledger.models else found

    def _left_at_most(self, ask: Ask, device: str, able: Iterable[Hold]) -> float:
        return self._ledger.left_later(ask, device) + sum(hold.takes[device] for hold in able)

    def _may_go_at(self, hold: Hold, depth: Depth, ask: Ask) -> float:
        """When it may be asked: not while it has served too short, nor while its next request is likely to come."""
        if hold.standing is Standing.SLEEPS:
            return self._now
        if hold.standing is Standing.COMES:
            return math.inf
        rules, back = self._rules, _return_seconds(hold, depth)
        at_least = hold.since + rules.min_residency
        busy = max(at_least, hold.since + rules.worth * back, ask.since + rules.max_wait)
        if hold.idle_since is None:
            return busy
        return min(busy, max(at_least, hold.idle_since + min(rules.patience * back, rules.most_patience)))

    def _worth(self, hold: Hold) -> _Worth:
        if (known := self._worths.get(hold.name)) is not None:
            return known
        in_use = hold.busy or hold.name in self._wanted
        worth = self._worths[hold.name] = (hold.priority, in_use, self._cost(hold, Depth.STOP), hold.name)
        return worth

    def _cost(self, hold: Hold, depth: Depth) -> float:
        """What its return costs from there, in seconds; less of one that was not used for long."""
        idle = 0.0 if hold.idle_since is None else max(self._now - hold.idle_since, 0.0)
        return _return_seconds(hold, depth) / (1 + idle)


def _go(holds: Sequence[Hold], left: dict[str, float]) -> list[tuple[Hold, Depth]]:
    """Who of these goes, and how far; worth most first. What the others keep is taken from what is `left`.

    First as many as can be are kept from their end, and then from their sleep: nobody is ended where it does that
    others sleep who are worth as much.
    """
    depths: dict[str, Depth | None] = {}
    for hold in holds:
        depth = least(hold, left)
        depths[hold.name] = Depth.SLEEP if depth is None and hold.may_sleep else depth
        _take(hold, depths[hold.name], left)
    for hold in holds:
        if depths[hold.name] is Depth.SLEEP:
            _take(hold, Depth.SLEEP, left, -1)
            depths[hold.name] = least(hold, left)
            _take(hold, depths[hold.name], left)
    return [(hold, depth) for hold in holds if (depth := depths[hold.name]) is not None]


def _take(hold: Hold, depth: Depth | None, left: dict[str, float], times: int = 1) -> None:
    """What it keeps is not left any more; or is again."""
    for name in hold.takes.keys() & left.keys():
        left[name] -= times * hold.keeps_of(name, depth)


def least(hold: Hold, left: Mapping[str, float]) -> Depth | None:
    """How far it has to go, where so much is left of each device without it; None: it can be spared."""
    milder: Iterable[Depth | None] = (None, Depth.SLEEP) if hold.may_sleep else (None,)
    for depth in milder:
        if all(left[device] >= hold.keeps_of(device, depth) for device in hold.takes.keys() & left.keys()):
            return depth
    return Depth.STOP


def _return_seconds(hold: Hold, depth: Depth) -> float:
    """What it costs to have it back from there; of one that sleeps: how much more than to wake it."""
    if hold.standing is Standing.SLEEPS:
        return max(hold.start_seconds - hold.wake_seconds, 0.0)
    return hold.wake_seconds if depth is Depth.SLEEP else hold.start_seconds
