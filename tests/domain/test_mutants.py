"""Each rule of the room is held by a test: a fault in its source, one for each rule, is found by the facts about it."""

import pytest

from tests.domain import mutants

LEDGER, EVICTION, ROOM = mutants.MODULES

# The rule that is broken: where, what stands there, what a careless change would make of it.
FAULTS = {
    "those who wait too long come by age": (
        ROOM,
        "return (1, 0, ask.since, ask.name)",
        "return (1, 0, -ask.since, ask.name)",
    ),
    "waiting too long beats priority": (ROOM, "return (1, 0, ask.since", "return (2, -ask.priority, ask.since"),
    "always comes first": (ROOM, "if ask.pressing and ask.always:", "if False:"),
    "who does not press comes last": (ROOM, "(2 if ask.pressing else 3,", "(2,"),
    "always, but not pressing, comes last": (ROOM, "if ask.pressing and ask.always:", "if ask.always:"),
    "priority comes before age": (
        ROOM,
        "return (2 if ask.pressing else 3, -ask.priority,",
        "return (2 if ask.pressing else 3, 0,",
    ),
    "who does not press makes nobody go": (ROOM, "if ask.pressing and (plan :=", "if (plan :="),
    "waiting too long needs pressing": (ROOM, "return ask.pressing and ask.since", "return ask.since"),
    "its own engine has to be gone": (
        ROOM,
        "elif (own := self._ledger.is_leaving(ask)) is not None:",
        "elif (own := None) is not None:",
    ),
    "orphans first": (ROOM, "            if untried:", "            if False:"),
    "nobody goes before it is time": (ROOM, "is_time = plan.at <= self._now + _EARLY_SECONDS", "is_time = True"),
    "who waits too long keeps its turn": (
        ROOM,
        "if is_time or _is_overdue(ask, self._now, self._rules):",
        "if is_time:",
    ),
    "a small one passes": (ROOM, "if is_time or _is_overdue(ask, self._now, self._rules):", "if True:"),
    "who does not press keeps away": (ROOM, "            self._ledger.reserve(ask, plan.where)", "            pass"),
    "a place is handed back": (ROOM, "            self._place[ask.name] = plan.where\n", ""),
    "what is promised is taken": (ROOM, "        self._ledger.promise(ask, where)", "        pass"),
    "who goes is counted": (ROOM, "        self._ledger.leave(go)", "        pass"),
    "it looks again": (ROOM, "            self._look_at(plan.at)", "            pass"),
    "spared in the end": (ROOM, "        self._spare()\n", ""),
    "a decision is final": (ROOM, "        if not moves.go:\n", "        if True:\n"),
    "devices are measured": (ROOM, "ledger.fits(ask, measured=True)", "ledger.fits(ask, measured=False)"),
    "one more goes": (ROOM, "more = None if short.evicted else", "more = None and"),
    "one more, and no second": (ROOM, "more = None if short.evicted else self", "more = self"),
    "stuck is said": (ROOM, "            self._stuck.append(ask.name)", "            pass"),
    "a comer is alone": (LEDGER, "if name in self._moving or not self.is_open", "if not self.is_open"),
    "leaving ones move": (
        LEDGER,
        "_MOVES = frozenset({Standing.COMES, Standing.GOES})",
        "_MOVES = frozenset({Standing.COMES})",
    ),
    "coming ones move": (
        LEDGER,
        "_MOVES = frozenset({Standing.COMES, Standing.GOES})",
        "_MOVES = frozenset({Standing.GOES})",
    ),
    "who is admitted moves": (LEDGER, "            self._moving.add(device)\n", ""),
    "what is admitted is taken": (LEDGER, "            self._free[device] -= self._wants(ask, device)\n", ""),
    "no backfill": (LEDGER, "return device not in self.next and (", "return ("),
    "other programs have memory": (LEDGER, "device.room - device.foreign - sum(", "device.room - sum("),
    "what a sleeper keeps is held": (
        LEDGER,
        "min(takes, self.keeps) if depth is Depth.SLEEP",
        "0 if depth is Depth.SLEEP",
    ),
    "a sleeper has a part": (LEDGER, "(hold.takes.get(device, 0) if hold is not None else 0)", "0"),
    "a sleeper wakes where it sleeps": (
        LEDGER,
        "return tuple(hold.takes) if hold is not None else ask.only or None",
        "return ask.only or None",
    ),
    "not ended, not promised": (
        LEDGER,
        "if hold.standing in _LEAVES and hold.not_ended is None:",
        "if hold.standing in _LEAVES:",
    ),
    "gangs have one total": (LEDGER, "groups.setdefault(device.total, [])", "groups.setdefault(0, [])"),
    "gangs are whole": (LEDGER, "[: ask.count] for group in", "[:1] for group in"),
    "fewest awake": (LEDGER, "return self._awake[name], self._asleep", "return 0, self._asleep"),
    "least left over": (LEDGER, "self._asleep[name], self.left_later(ask, name)", "self._asleep[name], 0"),
    "then fewest asleep": (LEDGER, "self._asleep[name], self.left_later", "0, self.left_later"),
    "who falls asleep will sleep": (LEDGER, "times * ((depth is Depth.SLEEP) -", "times * (0 -"),
    "who ends sleeps no more": (LEDGER, "- (not _is_awake(hold)))", "- 0)"),
    "who wakes sleeps no more": (LEDGER, "            self._asleep[device] -= ask.name in self.holds\n", ""),
    "a sleeper moves": (ROOM, "if where is not None and self._is_sooner_anew(ask, own):", "if False:"),
    "where that is sooner": (ROOM, "if where is not None and self._is_sooner_anew(ask, own):", "if where is not None:"),
    "a long wait that is known": (ROOM, "if latest < known < math.inf:", "if False:"),
    "one that nobody knows": (ROOM, "if latest < known < math.inf:", "if latest < known:"),
    "a wait as long as a start": (ROOM, "return self._is_due(ask.since + own.start_seconds)", "return False"),
    "who comes back in a moment": (ROOM, "                return False  # in a moment", "                pass"),
    "who drains may take long": (ROOM, "in _STAY | {Standing.GOES} for hold", "in Standing for hold"),
    "memory that does not come back": (ROOM, "(ask.short is not None and self._is_over(ask.short))", "False"),
    "one moves where it fits": (
        LEDGER,
        "self.fits(_anew(replace(ask, needs=needs)), measured=True)",
        "next(iter(self.sets(_anew(replace(ask, needs=needs)), lambda _: True)), None)",
    ),
    "and elsewhere": (LEDGER, "if name not in self.holds[ask.name].takes}", "}"),
    "its place is kept meanwhile": (ROOM, "                self._keep_place(ask, own)\n", ""),
    "never there, so elsewhere": (ROOM, "and not self._ledger.never_fits(ask, anew=True):", "and False:"),
    "never anywhere, so it sleeps on": (ROOM, "and not self._ledger.never_fits(ask, anew=True):", "and True:"),
    "places are kept": (LEDGER, "if self._is_set(ask, ask.place, allowed):", "if False:"),
    "always is what makes stuck": (LEDGER, "return hold.always and hold.standing not in _LEAVES", "return True"),
    "always never goes": (EVICTION, "in standings and not hold.always", "in standings"),
    "not the same model": (EVICTION, "[hold for hold in found if hold.model != ask.model]", "found"),
    "nobody goes twice": (EVICTION, "hold for hold in able if hold.name not in self._ledger.going", "able"),
    "answers are for what is asked": (ROOM, "*ask.needs.items(), ", "*ask.needs, "),
    "answers are for so many devices": (ROOM, "None, ask.count, ask.only,", "None, ask.only,"),
    "answers are for these devices": (ROOM, "ask.count, ask.only, ask.place,", "ask.count, ask.place,"),
    "answers are for a place": (ROOM, "ask.only, ask.place, ask.pressing,", "ask.only, ask.pressing,"),
    "answers are for who presses": (ROOM, "ask.place, ask.pressing, overdue, model)", "ask.place, overdue, model)"),
    "answers are for the overdue": (ROOM, "ask.pressing, overdue, model)", "ask.pressing, model)"),
    "answers are for a model": (ROOM, "overdue, model)", "overdue)"),
    "answers change with what is given": (
        LEDGER,
        "        self.models.add(hold.model)\n        self.version += len(where)",
        "        self.models.add(hold.model)",
    ),
    "answers change with what is promised": (
        LEDGER,
        "dict.fromkeys(where, ask.name)\n        self.version += len(where)",
        "dict.fromkeys(where, ask.name)",
    ),
    "models that come count": (LEDGER, "        self.models.add(hold.model)\n", ""),
    "overdue plans are made": (
        ROOM,
        "== _MOST_IN_VAIN and not _is_overdue(ask, self._now, self._rules)",
        "== _MOST_IN_VAIN",
    ),
    "comers are not asked": (
        EVICTION,
        "if hold.standing is Standing.COMES:\n            return math.inf\n",
        "if False:\n            return math.inf\n",
    ),
    "turns are kept beside comers": (
        EVICTION,
        "self._plans(ask, _SETTLED) or self._plans(ask, _EVER)",
        "self._plans(ask, _SETTLED)",
    ),
    "nobody ends where others may sleep": (
        EVICTION,
        "Depth.SLEEP if depth is None and hold.may_sleep else depth",
        "depth",
    ),
    "then as many as can be stay awake": (EVICTION, "depths[hold.name] = least(hold, left)", "pass"),
    "the most valuable is spared first": (EVICTION, "key=self._worth, reverse=True)", "key=self._worth)"),
    "priority is spared": (EVICTION, "(hold.priority, in_use, self._cost", "(0, in_use, self._cost"),
    "who is in use is spared": (EVICTION, "(hold.priority, in_use, self._cost", "(hold.priority, False, self._cost"),
    "who is wanted is spared": (EVICTION, "in_use = hold.busy or hold.name in self._wanted", "in_use = hold.busy"),
    "idle ones are worth less": (EVICTION, "_return_seconds(hold, depth) / (1 + idle)", "_return_seconds(hold, depth)"),
    "returns are worth something": (EVICTION, "_return_seconds(hold, depth) / (1 + idle)", "1 / (1 + idle)"),
    "nothing goes that can be spared": (
        EVICTION,
        "(None, Depth.SLEEP) if hold.may_sleep else (None,)",
        "(Depth.SLEEP,) if hold.may_sleep else ()",
    ),
    "no further than it has to": (EVICTION, "(None, Depth.SLEEP) if hold.may_sleep else (None,)", "(None,)"),
    "min_residency": (EVICTION, "at_least = hold.since + rules.min_residency", "at_least = hold.since"),
    "busy ones wait for max_wait": (EVICTION, ", ask.since + rules.max_wait)", ")"),
    "busy ones are worth their start": (EVICTION, "hold.since + rules.worth * back, ", ""),
    "idle ones are left alone a while": (
        EVICTION,
        "hold.idle_since + min(rules.patience * back, rules.most_patience)",
        "hold.idle_since",
    ),
    "and no longer": (EVICTION, "min(rules.patience * back, rules.most_patience)", "rules.patience * back"),
    "max_wait ends patience": (EVICTION, "return min(busy, max(at_least", "return max(busy, max(at_least"),
    "the fewest busy": (EVICTION, "return (busy, priority, seconds,", "return (0, priority, seconds,"),
    "the least priority": (EVICTION, "return (busy, priority, seconds,", "return (busy, 0, seconds,"),
    "the least time": (EVICTION, "return (busy, priority, seconds,", "return (busy, priority, 0,"),
    "how far they go": (EVICTION, "sum(self._cost(hold, depth)", "sum(self._cost(hold, Depth.STOP)"),
    "waiting is time": (EVICTION, "for hold, depth in gone) + at - self._now", "for hold, depth in gone)"),
    "kept until others may go now": (
        EVICTION,
        "return kept if kept is not None and best is not None and best.at > self._now else best",
        "return best",
    ),
    "but not longer": (EVICTION, "and best.at > self._now else best", "else best"),
}


@pytest.mark.parametrize("rule", FAULTS)
def test_a_fault_in_a_rule_is_found(rule: str) -> None:
    """By a fact in test_room.py, which takes milliseconds; `python -m tests.domain.mutants` tries all small faults."""
    module, right, wrong = FAULTS[rule]
    source = mutants.source_of(module)
    assert source.count(right) >= 1, "the list is as the source"
    assert mutants.found_by({module: source.replace(right, wrong, 1)}) is not None


def test_without_a_fault_nothing_is_found() -> None:
    """Else the above would say nothing."""
    assert mutants.found_by({}) is None
