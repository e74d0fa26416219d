"""Decides who gets room on the devices, where, and who makes room for whom.

Looks only at what is, so it may be asked after every change: what it said and was carried out, it does not say again.
An ask gets all of its devices at once, and holds nothing while it waits: nobody waits in a circle. Memory that comes
back is promised to one ask at a time. Whoever does not press makes nobody go, so two models without requests never take
turns in evicting each other. Who goes is in `eviction`, sums are in `ledger`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from vllm_proxy.domain.eviction import Plan, Planner, Rules, least
from vllm_proxy.domain.ledger import Ask, Depth, Device, Hold, Ledger, Short, Standing, Where, admitted

_STAY = frozenset({Standing.SERVES, Standing.SLEEPS})
_EARLY_SECONDS = 1e-3  # what is due so soon is due now: a timer may fire as much too early
_MOST_IN_VAIN = 32  # plans of one decision that nobody may follow yet; who is behind them has one when it is overdue
_SHORT_SECONDS = 10.0  # so long devices may be short of what the ledger says


@dataclass(frozen=True, slots=True)
class Wait:
    """Why an ask waits, for people and for `Retry-After`."""

    where: Where = ()  # its place, promised or planned; else where it may run at all
    waits_for: tuple[str, ...] = ()  # instances that move there, leave, or are to go
    behind: tuple[str, ...] = ()  # asks whose turn is before its
    at: float = math.inf  # when those may go that are to go; inf: not known
    not_ended: str | None = None  # why an engine in its way could not be ended


@dataclass(frozen=True, slots=True)
class Moves:
    """What is done now. `place` and `short` are handed back with the asks next time."""

    admit: Mapping[str, Where] = field(default_factory=dict)
    go: Mapping[str, Depth] = field(default_factory=dict)
    go_for: Mapping[str, str] = field(default_factory=dict)  # for which ask each of them goes
    place: Mapping[str, Where] = field(default_factory=dict)  # whose turn is next where
    short: Mapping[str, Short] = field(default_factory=dict)
    wait: Mapping[str, Wait] = field(default_factory=dict)  # every ask that is not admitted, with the reason
    look_again: float = math.inf  # when something else becomes possible by time alone
    stuck: tuple[str, ...] = ()  # would not fit if all had gone that ever may
    refuse: tuple[str, ...] = ()  # the ledger has room, and the devices were short of it for too long


def decide(
    now: float, devices: Mapping[str, Device], holds: Sequence[Hold], asks: Sequence[Ask], rules: Rules
) -> Moves:
    """What starts and what goes now.

    Where somebody goes that is decided once more, as if it had begun: what one ask sets in motion may be all that
    another one waited for. So the next decision has nothing to add.
    """
    admit: dict[str, Where] = {}
    go: dict[str, Depth] = {}
    go_for: dict[str, str] = {}
    while True:
        moves = _Decision(now, devices, holds, asks, rules).made()
        admit |= moves.admit
        go |= moves.go
        go_for |= moves.go_for
        if not moves.go:
            return replace(moves, admit=admit, go=go, go_for=go_for)
        holds, asks = _followed(holds, asks, moves)


def _followed(holds: Sequence[Hold], asks: Sequence[Ask], moves: Moves) -> tuple[list[Hold], list[Ask]]:
    """What is, once these moves have begun."""
    stay = [hold for hold in holds if hold.name not in moves.go and hold.name not in moves.admit]
    leave = [replace(hold, standing=Standing.YIELDS, to=moves.go[hold.name]) for hold in holds if hold.name in moves.go]
    come = [admitted(ask, moves.admit[ask.name]) for ask in asks if ask.name in moves.admit]
    wait = [ask for ask in asks if ask.name not in moves.admit]
    return [*stay, *leave, *come], [_kept(ask, moves) for ask in wait]


def _kept(ask: Ask, moves: Moves) -> Ask:
    """With what was said of it."""
    place, short = moves.place.get(ask.name, ()), moves.short.get(ask.name)
    same = place == ask.place and short == ask.short
    return ask if same else replace(ask, place=place, short=short)


def _is_overdue(ask: Ask, now: float, rules: Rules) -> bool:
    return ask.pressing and ask.since + rules.max_wait <= now + _EARLY_SECONDS


def _turn(ask: Ask, now: float, rules: Rules) -> tuple[float | str, ...]:
    """Who is always to run; who has waited too long, by age; who presses; who does not. Then by priority and by age."""
    if ask.pressing and ask.always:
        return (0, -ask.priority, ask.since, ask.name)
    if _is_overdue(ask, now, rules):
        return (1, 0, ask.since, ask.name)
    return (2 if ask.pressing else 3, -ask.priority, ask.since, ask.name)


type _Answer = Callable[[Ask], None]  # carries out what an ask gets in its turn


class _Decision:
    """One decision: asks get their turns, one after another, and the ledger keeps what was given to those before.

    Of thousands that wait most want the same, so what one was answered holds for the next until the ledger changes.
    """

    def __init__(
        self, now: float, devices: Mapping[str, Device], holds: Sequence[Hold], asks: Sequence[Ask], rules: Rules
    ) -> None:
        self._now, self._rules = now, rules
        self._ledger = ledger = Ledger(devices, holds)
        self._asks = {ask.name: ask for ask in sorted(asks, key=lambda ask: _turn(ask, now, rules))}
        wanted = {ask.name for ask in asks if ask.pressing}
        self._planner = Planner(now + _EARLY_SECONDS, rules, ledger, wanted)
        self._admit: dict[str, Where] = {}
        self._go: dict[str, Depth] = {}
        self._go_for: dict[str, str] = {}
        self._place: dict[str, Where] = {}
        self._short: dict[str, Short] = {}
        self._wait: dict[str, Wait] = {}
        self._planned: set[str] = set()  # of those who go: for the memory that the ledger says they have
        self._in_vain = 0
        self._stuck: list[str] = []
        self._refuse: list[str] = []
        self._look_again = math.inf
        self._version = -1  # of the ledger that these are about:
        self._answers: dict[tuple[object, ...], _Answer] = {}  # by what is asked for
        self._reasons: dict[tuple[Where, Plan | None], Wait] = {}

    def made(self) -> Moves:
        """All of it."""
        untried = tuple(sorted(hold.name for hold in self._ledger.holds.values() if hold.untried))
        for ask in self._asks.values():
            if untried:  # its memory and its port may be in use, wherever it is
                self._wait[ask.name] = Wait(waits_for=untried)
            elif (own := self._ledger.is_leaving(ask)) is not None:
                self._wait[ask.name] = Wait(waits_for=(own.name,), not_ended=own.not_ended)
                self._keep_place(ask, own)
            elif ask.name not in self._go:  # one that goes asks again when it has gone
                self._give_turn(ask)
                if ask.pressing and not _is_overdue(ask, self._now, self._rules) and ask.name in self._wait:
                    self._look_at(ask.since + self._rules.max_wait)
        self._spare()
        return Moves(
            self._admit, self._go, self._go_for, self._place, self._short, self._wait,
            self._look_again, tuple(self._stuck), tuple(self._refuse),
        )  # fmt: skip

    def _give_turn(self, ask: Ask) -> None:
        self._forget_what_has_changed()
        if (own := self._ledger.holds.get(ask.name)) is not None:
            self._answer_asleep(ask, own)(ask)
            return
        model = ask.model if ask.model in self._ledger.models else None
        overdue = _is_overdue(ask, self._now, self._rules)
        wants = (*ask.needs.items(), None, ask.count, ask.only, ask.place, ask.pressing, overdue, model)
        if (answer := self._answers.get(wants)) is None:
            answer = self._answers[wants] = self._answer(ask)
        answer(ask)

    def _answer_asleep(self, ask: Ask, own: Hold) -> _Answer:
        """It wakes where it sleeps, unless it serves sooner elsewhere, where nobody has to go for it."""
        if self._ledger.fits(ask, measured=True) is None:
            where = self._ledger.elsewhere(ask)
            if where is not None and self._is_sooner_anew(ask, own):
                return partial(self._moves_to, where)
        return self._answer(ask)

    def _is_sooner_anew(self, ask: Ask, own: Hold) -> bool:
        """Whether it waits where it sleeps for longer than a start takes: that is known, or it has waited so long."""
        ledger, latest = self._ledger, self._now + own.start_seconds + _EARLY_SECONDS
        if ledger.never_fits(ask) or (ask.short is not None and self._is_over(ask.short)):
            return True
        if (where := ledger.will_fit(ask)) is not None:
            if all(hold.standing in _STAY | {Standing.GOES} for hold in ledger.on(where)):
                return False  # in a moment
        elif ask.pressing:
            plan = self._planner.plan(ask)
            known = math.inf if plan is None else plan.at + own.wake_seconds
            if latest < known < math.inf:
                return True
        return self._is_due(ask.since + own.start_seconds)

    def _moves_to(self, where: Where, ask: Ask) -> None:
        """It ends where it sleeps, and its turn is next where it will be started."""
        self._ask_to_go(ask, {ask.name: Depth.STOP})
        self._promise(where, ask)

    def _keep_place(self, ask: Ask, own: Hold) -> None:
        """Where it will be started, while what slept elsewhere is ended."""
        moves = own.to is Depth.STOP and ask.place and not own.takes.keys() & {*ask.place}
        if moves and self._ledger.elsewhere(ask) == ask.place:
            self._place[ask.name] = ask.place
            self._ledger.promise(ask, ask.place)

    def _answer(self, ask: Ask) -> _Answer:
        """What it gets, which depends on what it asks for, and neither on its name nor on when it came."""
        ledger = self._ledger
        if (where := ledger.fits(ask, measured=True)) is not None:
            return partial(self._comes, where)
        if (where := ledger.fits(ask, measured=False)) is not None:
            return partial(self._lacks, where)
        if (where := ledger.will_fit(ask)) is not None:
            return partial(self._promise, where)
        return self._is_stuck if ledger.never_fits(ask) else self._answer_where_full(ask)

    def _answer_where_full(self, ask: Ask) -> _Answer:
        if self._in_vain == _MOST_IN_VAIN and not _is_overdue(ask, self._now, self._rules):
            return self._waits
        if ask.pressing and (plan := self._planner.plan(ask)) is not None:
            self._in_vain += plan.at > self._now + _EARLY_SECONDS
            return partial(self._follow, plan)
        if (where := self._planner.foreign_in_the_way(ask)) is not None:
            return partial(self._lacks_for_others, where)
        return self._waits

    def _forget_what_has_changed(self) -> None:
        if self._version != self._ledger.version:
            self._version = self._ledger.version
            self._answers.clear()
            self._reasons.clear()

    def _comes(self, where: Where, ask: Ask) -> None:
        self._admit[ask.name] = where
        self._ledger.admit(ask, where)

    def _waits(self, ask: Ask) -> None:
        self._note_wait(ask, ask.only or tuple(ask.needs))

    def _promise(self, where: Where, ask: Ask) -> None:
        self._note_wait(ask, where)
        self._place[ask.name] = where
        self._ledger.promise(ask, where)

    def _is_stuck(self, ask: Ask) -> None:
        if ask.name in self._ledger.holds and not self._ledger.never_fits(ask, anew=True):
            self._ask_to_go(ask, {ask.name: Depth.STOP})  # never where it sleeps: it asks for another place
        else:
            self._stuck.append(ask.name)
        self._waits(ask)

    def _follow(self, plan: Plan, ask: Ask) -> None:
        """Now, where it is time; else its turn is kept where it has waited too long, and lesser ones stay away."""
        is_time = plan.at <= self._now + _EARLY_SECONDS
        if is_time:
            self._ask_to_go(ask, plan.go)
            self._planned |= plan.go.keys()
        else:
            self._look_at(plan.at)
        self._note_wait(ask, plan.where, plan)
        if is_time or _is_overdue(ask, self._now, self._rules):
            self._place[ask.name] = plan.where
            self._ledger.promise(ask, plan.where)
        else:
            self._ledger.reserve(ask, plan.where)

    def _spare(self) -> None:
        """Nobody goes, or as far, who need not, now that it is known who else goes: some make room on several."""
        ledger = self._ledger
        for hold in self._planner.by_worth(ledger.holds[name] for name in self._planned):
            depth = self._go.pop(hold.name)
            ledger.stay(hold, depth)
            left = {device: ledger.left_later(self._asks[ledger.next[device]], device) + hold.takes[device]
                    for device in hold.takes.keys() & ledger.next.keys()}  # fmt: skip
            enough = {device: size for device, size in left.items() if size >= hold.keeps_of(device, depth)}
            if (needed := least(hold, enough)) is None:
                del self._go_for[hold.name]
            else:
                self._go[hold.name] = needed
                ledger.leave({hold.name: needed})

    def _lacks(self, where: Where, ask: Ask) -> None:
        """The devices have less than the ledger says. After a while one more goes; after another it is refused."""
        if not ask.pressing:
            self._note_wait(ask, where)
            return
        short = ask.short or Short(self._now)
        if any(hold.standing in {Standing.YIELDS, Standing.GOES} for hold in self._ledger.on(where)):
            short = Short(self._now, short.evicted)  # more may come back
        if self._is_over(short):
            more = None if short.evicted else self._planner.one_more(ask, where)
            if more is None:
                self._note_wait(ask, where)
                self._refuse.append(ask.name)
                return
            self._ask_to_go(ask, {more: Depth.STOP})
            short = Short(self._now, evicted=True)
        self._short[ask.name] = short
        self._promise(where, ask)

    def _lacks_for_others(self, where: Where, ask: Ask) -> None:
        """Other programs have what it needs. They may go; after a while it is refused."""
        self._note_wait(ask, where)
        short = ask.short or Short(self._now)
        if ask.pressing and self._is_over(short):
            self._refuse.append(ask.name)
        elif ask.pressing:
            self._short[ask.name] = short

    def _is_over(self, short: Short) -> bool:
        return self._is_due(short.since + _SHORT_SECONDS)

    def _is_due(self, at: float) -> bool:
        if at <= self._now + _EARLY_SECONDS:
            return True
        self._look_at(at)
        return False

    def _ask_to_go(self, ask: Ask, go: Mapping[str, Depth]) -> None:
        self._go |= go
        self._go_for |= dict.fromkeys(go, ask.name)
        self._ledger.leave(go)

    def _look_at(self, at: float) -> None:
        self._look_again = min(self._look_again, at)

    def _note_wait(self, ask: Ask, where: Where, plan: Plan | None = None) -> None:
        """Before its own promise is in the ledger."""
        if (known := self._reasons.get((where, plan))) is None:
            known = self._reasons[where, plan] = self._reason(where, plan)
        self._wait[ask.name] = known

    def _reason(self, where: Where, plan: Plan | None) -> Wait:
        ledger = self._ledger
        on = ledger.on(name for name in where if name in ledger.devices)
        leaving = {hold.name for hold in on if hold.standing not in _STAY}
        turns = {turn for name in where for turn in (ledger.next.get(name), ledger.reserved.get(name)) if turn}
        at = self._now if leaving else math.inf
        return Wait(
            where,
            tuple(sorted(leaving.union(plan.go if plan else ()))),
            tuple(sorted(turns)),
            at if plan is None else plan.at,
            next((hold.not_ended for hold in on if hold.not_ended is not None), None),
        )
