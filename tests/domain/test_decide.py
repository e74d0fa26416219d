"""What the fleet does next, and why something is not done now: facts about values."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.config import EngineSpec, Policy, Restart
from vllm_proxy.domain.decide import (
    InstanceNow,
    ModelDecision,
    ModelNow,
    Retry,
    RoomNow,
    Snapshot,
    Wanted,
    decide,
    decide_model,
)
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.ledger import Ask, Depth, Device, Hold, Standing
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.domain.rollback import Rollback
from vllm_proxy.domain.room import Moves

READY, LOADING, ERROR, STOPPED, UNLOADING, SLEEPING = (
    State.READY, State.LOADING, State.ERROR, State.STOPPED, State.UNLOADING, State.SLEEPING,
)  # fmt: skip
OLD, NEW = EngineSpec(model="old"), EngineSpec(model="new")
CRASHED = Diagnosis(Reason.CRASHED, "it crashed")


def chat(*states: State, wanted: Wanted = Wanted.RUN, engine: EngineSpec = OLD, **policy: object) -> ModelNow:
    """A model whose instances are in these states and run what is wanted; `policy` are policy keys."""
    instances = tuple(InstanceNow(index, state, engine) for index, state in enumerate(states))
    return ModelNow("chat", Policy.model_validate(policy), wanted, Rollback(OLD), instances)


def on_demand(*states: State, wanted: Wanted = Wanted.RUN, idle: float = 0.0, timeout: float = 100.0) -> ModelNow:
    """One that is started by requests, and has been idle for so many seconds."""
    return replace(chat(*states, wanted=wanted, start="on-demand", idle_timeout=timeout), idle_seconds=idle)


def steps(model: ModelNow) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The instances to stop, and those to start."""
    decided = decide_model(model)
    return decided.stop, decided.start


# What is wanted


def test_a_model_that_is_to_run_is_started_with_all_its_replicas() -> None:
    """And left alone when they run, load, or rest in error."""
    assert steps(chat(replicas=3)) == ((), (0, 1, 2))
    assert steps(chat(READY, LOADING, ERROR, replicas=3)) == ((), ())


@pytest.mark.parametrize("wanted", [Wanted.AWAIT, Wanted.STOP, Wanted.END])
def test_a_model_that_is_not_to_run_is_stopped_whatever_it_does(wanted: Wanted) -> None:
    """What has stopped or is about to is not asked again."""
    assert steps(chat(READY, LOADING, ERROR, STOPPED, UNLOADING, wanted=wanted, replicas=5)) == ((0, 1, 2), ())


def test_a_disabled_model_runs_nothing() -> None:
    """Though it is wanted."""
    assert steps(chat(READY, enabled=False)) == ((0,), ())
    assert steps(chat(enabled=False)) == ((), ())


def test_an_instance_to_be_renewed_goes_though_it_runs_what_is_wanted() -> None:
    """And is started when it has stopped."""
    model = chat(READY)
    renewed = replace(model, instances=(replace(model.instances[0], renew=True),))
    assert steps(renewed) == ((0,), ())
    assert steps(chat(STOPPED)) == ((), (0,))


# On demand


def test_a_model_that_awaits_a_request_starts_when_one_came() -> None:
    """One that waits, or one that could not: a queue of no size refuses, and the model is started all the same."""
    sleeping = on_demand(STOPPED, wanted=Wanted.AWAIT)
    assert (decide_model(sleeping).wanted, steps(sleeping)) == (Wanted.AWAIT, ((), ()))
    for asked in (replace(sleeping, requested=True), replace(sleeping, waits_since=0.0)):
        assert (decide_model(asked).wanted, steps(asked)) == (Wanted.RUN, ((), (0,)))


@pytest.mark.parametrize("wanted", [Wanted.STOP, Wanted.END])
def test_no_request_starts_what_a_hand_stopped_or_what_ends(wanted: Wanted) -> None:
    """A hand is stronger than a request."""
    asked = replace(on_demand(STOPPED, wanted=wanted), requested=True, waits_since=0.0)
    assert (decide_model(asked).wanted, steps(asked)) == (wanted, ((), ()))


def test_a_model_that_nobody_asked_for_long_enough_is_unloaded() -> None:
    """Before, it is looked at again when that time has come."""
    assert decide_model(on_demand(READY, idle=40)) == ModelDecision(Wanted.RUN, Rollback(OLD, good=OLD), recheck_in=60)
    unloaded = decide_model(on_demand(READY, idle=100))
    assert (unloaded.wanted, unloaded.stop, unloaded.recheck_in) == (Wanted.AWAIT, (0,), math.inf)
    early = decide_model(on_demand(READY, idle=99.9995))
    assert early.wanted is Wanted.AWAIT, "a timer may fire a moment too early"


def test_a_model_in_use_is_not_idle() -> None:
    """However short its idle_timeout is."""
    for timeout in (100.0, 0.0001):
        assert decide_model(on_demand(READY, timeout=timeout)).wanted is Wanted.RUN
    waited_for = replace(on_demand(READY, idle=1000), waits_since=1.0)
    assert decide_model(waited_for).wanted is Wanted.RUN


@pytest.mark.parametrize("model", [
    on_demand(READY, idle=1000, timeout=0),
    replace(chat(READY, idle_timeout=10), idle_seconds=1000),
    on_demand(ERROR, idle=1000),
    on_demand(LOADING, idle=1000),
    on_demand(UNLOADING, idle=1000),
    on_demand(READY, idle=0, wanted=Wanted.STOP),
])  # fmt: skip
def test_what_has_no_idle_time_is_not_looked_at_for_it(model: ModelNow) -> None:
    """No timeout, always on, an error that stays for people to see; the time counts from when it can be used."""
    decided = decide_model(model)
    assert (decided.wanted, decided.recheck_in) == (model.wanted, math.inf)


# Which spec, and how it comes


def changed(*instances: InstanceNow, **policy: object) -> ModelNow:
    """A model that was ready with the old spec and is to run the new one, which nothing is known against."""
    rollback = Rollback(NEW, good=OLD, checked=NEW)
    return ModelNow("chat", Policy.model_validate(policy), Wanted.RUN, rollback, instances)


def test_a_change_is_checked_before_anything_is_stopped_for_it() -> None:
    """The good spec is what its instances are to run until then."""
    model = replace(changed(InstanceNow(0, READY, OLD)), rollback=Rollback(NEW, good=OLD))
    decided = decide_model(model)
    assert (decided.check, decided.stop, decided.start) == (True, (), ())
    assert not decide_model(changed(InstanceNow(0, READY, OLD))).check


@pytest.mark.parametrize(
    ("strategy", "expected"), [("auto", ((0,), ())), ("surge", ((), (2,))), ("drain", ((0, 1), ()))]
)
def test_a_change_comes_by_its_strategy(strategy: str, expected: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """One after another; new beside old; all old ones away first."""
    old = InstanceNow(0, READY, OLD), InstanceNow(1, READY, OLD)
    assert steps(changed(*old, replicas=2, replace=strategy)) == expected


@pytest.mark.parametrize(("strategy", "expected"), [("auto", ((0,), ())), ("surge", ((), (2,))), ("drain", ((0,), ()))])
def test_a_restart_never_takes_all_away_at_once(
    strategy: str, expected: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """Two that run the same spec get along."""
    model = chat(READY, READY, replicas=2, replace=strategy)
    renewed = tuple(replace(one, renew=True) for one in model.instances)
    assert steps(replace(model, instances=renewed)) == expected


def test_a_change_that_failed_goes_back_to_what_was_ready() -> None:
    """In the same step that learns of it."""
    decided = decide_model(changed(InstanceNow(0, LOADING, NEW, CRASHED)))
    assert (decided.rollback.failed, decided.rollback.target, decided.stop) == (CRASHED, OLD, (0,))


# Starts


def on(*devices: str) -> dict[str, int]:
    """What engines have that take turns."""
    return dict.fromkeys(devices, 0)


def here(*parts: Hold | Ask) -> RoomNow:
    """A room whose devices nobody manages."""
    names = {name for part in parts for name in (part.takes if isinstance(part, Hold) else part.needs)}
    holds = [part for part in parts if isinstance(part, Hold)]
    return RoomNow(dict.fromkeys(names, Device()), holds, [part for part in parts if isinstance(part, Ask)])


def asks(name: str, *devices: str, since: float = 0.0) -> Ask:
    """One that wants to start there."""
    return Ask(name, name.partition("/")[0], on(*devices), len(devices), devices, since=since)


def test_who_starts_is_what_the_room_says() -> None:
    """Nobody beside one that loads or leaves; who came first comes first, on other devices nobody waits."""
    loads = Hold("a/0", "a", on("0"), Standing.COMES)
    first, second, other = asks("b/0", "0", "1", since=1), asks("c/0", "1", since=2), asks("d/0", "2", since=3)
    moves = decide(Snapshot(room=here(loads, first, second, other)), 9.0).moves
    assert {**moves.admit} == {"d/0": ("2",)}
    assert (moves.wait["b/0"].waits_for, moves.wait["c/0"].behind) == (("a/0",), ("b/0",))


def test_where_nobody_asks_there_is_nothing_to_decide() -> None:
    """However many there are."""
    assert decide(Snapshot(room=here(Hold("a/0", "a", on("0"), Standing.GOES))), 0.0).moves == Moves()


def test_who_gives_way_is_stopped_and_an_on_demand_model_awaits_its_next_request() -> None:
    """One that is to run whatever happens asks again once it has gone."""
    yields = InstanceNow(0, READY, OLD, yields=Depth.STOP)
    decided = decide_model(replace(on_demand(), instances=(yields,)))
    assert (decided.wanted, decided.stop, decided.start) == (Wanted.AWAIT, (0,), ())
    warm = replace(chat(start="warm"), instances=(yields,))
    assert (decide_model(warm).wanted, decide_model(warm).stop) == (Wanted.RUN, (0,))
    gone = replace(warm, instances=(replace(yields, state=STOPPED),))
    assert decide_model(gone).start == (0,)


def test_an_on_demand_model_that_may_sleep_sleeps_in_place_of_ending() -> None:
    """Where nobody asked for it for a while, or others want its room; its next request wakes it."""
    may = InstanceNow(0, READY, OLD, may_sleep=True)
    idle = replace(on_demand(idle=100, timeout=100), instances=(may,))
    assert moves(idle) == (Wanted.AWAIT, (), (0,), ())
    gives_way = replace(on_demand(), instances=(replace(may, yields=Depth.SLEEP),))
    assert moves(gives_way) == (Wanted.AWAIT, (), (0,), ())
    assert moves(replace(gives_way, instances=(replace(may, yields=Depth.STOP),))) == (Wanted.AWAIT, (0,), (), ())
    asleep = replace(may, state=SLEEPING)
    waits = replace(on_demand(wanted=Wanted.AWAIT), instances=(asleep,))
    assert moves(waits) == (Wanted.AWAIT, (), (), ())
    assert moves(replace(waits, waits_since=0.0)) == (Wanted.RUN, (), (), (0,))


def test_a_sleeper_that_is_not_what_is_wanted_ends() -> None:
    """Of another spec, told to make room, more than asked for, or stopped by hand."""
    asleep = InstanceNow(0, SLEEPING, OLD, may_sleep=True)
    waits = replace(on_demand(wanted=Wanted.AWAIT), instances=(asleep,))
    others = [
        replace(waits, instances=(replace(asleep, engine=NEW),), rollback=Rollback(OLD, good=OLD)),
        replace(waits, instances=(replace(asleep, yields=Depth.STOP),)),
        replace(waits, instances=(replace(asleep, renew=True),)),
        replace(waits, wanted=Wanted.STOP),
        replace(waits, wanted=Wanted.END),
    ]
    assert [moves(other)[1] for other in others] == [(0,)] * 5
    two = replace(waits, instances=(asleep, replace(asleep, index=1)))
    assert moves(two)[1] == (1,)


def moves(model: ModelNow) -> tuple[Wanted, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """What is wanted then; the instances to stop, to put to sleep and to wake."""
    decided = decide_model(model)
    assert decided.start == ()
    return decided.wanted, decided.stop, decided.sleep, decided.wake


def test_a_model_whose_other_instance_serves_on_does_not_await_a_request() -> None:
    """The one that gave way comes back when there is room."""
    instances = (InstanceNow(0, READY, OLD, yields=Depth.STOP), InstanceNow(1, READY, OLD))
    decided = decide_model(replace(on_demand(), policy=Policy(start="on-demand", replicas=2), instances=instances))
    assert (decided.wanted, decided.stop, decided.start) == (Wanted.RUN, (0,), ())


def test_new_beside_old_where_that_does_not_fit_is_one_by_one() -> None:
    """The old one goes first."""
    surge = replace(changed(InstanceNow(0, READY, OLD)), policy=Policy(replace="surge"))
    assert steps(surge) == ((), (1,))
    assert steps(replace(surge, fits_beside=False)) == ((0,), ())


# Failures


def retry(failures: int = 1, reason: Reason = Reason.CRASHED, jitter: float = 0.0, **restart: object) -> Retry:
    """An engine that failed at second 100."""
    return Retry("chat/0", reason, failures, 100.0, jitter, Restart.model_validate(restart))


def left(asked: Retry, time: float) -> float | None:
    """Seconds until the next try; None: given up."""
    return decide(Snapshot(retries=[asked]), time).retries["chat/0"]


def test_the_pause_before_the_next_try_doubles_up_to_its_maximum() -> None:
    """It counts from the failure."""
    pauses = [left(retry(failures, backoff=2, max_backoff=10, max_failures=9), 100.0) for failures in range(1, 6)]
    assert pauses == [2, 4, 8, 10, 10]
    assert [left(retry(backoff=2), time) for time in (101.0, 102.0, 500.0)] == [1, 0, 0]
    assert left(retry(backoff=2), 101.9999) == 0, "a timer may fire a moment too early"


def test_the_pause_is_shorter_by_up_to_a_quarter() -> None:
    """So that those who failed together do not come back together."""
    assert left(retry(backoff=2, jitter=1.0), 100.0) == 1.5


def test_what_the_machine_lacks_is_waited_for_as_long_as_it_takes() -> None:
    """Processes, say: no model is given up for that."""
    lacking = replace(retry(30, max_failures=3, backoff=1, max_backoff=60), of_machine=True)
    assert left(lacking, 100.0) == 60
    assert left(replace(lacking, reason=Reason.COMMAND_NOT_FOUND), 100.0) is None


def test_an_instance_is_given_up_after_so_many_failures_in_a_row() -> None:
    """The last one included; a policy that allows more, or less, counts as it is now."""
    assert left(retry(2, max_failures=3), 100.0) is not None
    assert left(retry(3, max_failures=3), 100.0) is None
    assert left(retry(3, max_failures=4), 100.0) is not None


@pytest.mark.parametrize("reason", [Reason.INVALID_ARGUMENTS, Reason.COMMAND_NOT_FOUND])
def test_what_no_retry_can_mend_is_given_up_at_once(reason: Reason) -> None:
    """Only a change can."""
    assert left(retry(reason=reason, max_failures=100), 100.0) is None


# All of it, by values alone


type Move = tuple[int, State]  # an instance, and what it is in the end


class Fleet:
    """One model whose decisions are carried out step by step, as the daemon does it."""

    def __init__(self, model: ModelNow, devices: Sequence[frozenset[str]]) -> None:
        self.model = model
        self.holds: dict[str, Hold] = {}  # of those that move
        self.asks: dict[str, Ask] = {}
        self._devices = devices  # of each instance, by index
        self._times = itertools.count()
        for one in model.instances:
            if one.state in {LOADING, UNLOADING}:
                self._hold(one.index, Standing.COMES if one.state is LOADING else Standing.GOES)

    @property
    def room(self) -> RoomNow:
        """As it is decided about."""
        return here(*self.holds.values(), *self.asks.values())

    def turn(self, most: int | None = None) -> bool:
        """Carry out what is decided, or its first `most` steps; whether there was anything to do."""
        decided = decide(Snapshot(models=[self.model]), 0.0).models["chat"]
        learned = replace(self.model, wanted=decided.wanted, rollback=decided.rollback)
        news, self.model = learned != self.model, learned
        steps = [partial(self._stop, index) for index in decided.stop]
        steps += [partial(self._start, index) for index in decided.start]
        for step in steps[:most]:
            step()
        admitted = decide(Snapshot(room=self.room), 0.0).moves.admit
        for name in admitted:
            del self.asks[name]
            self._hold(int(name.rpartition("/")[2]), Standing.COMES)
        return news or bool(steps) or bool(admitted)

    def settle(self) -> None:
        """Carry out decisions until there is nothing to do."""
        for _ in range(5):
            if not self.turn():
                return
        raise AssertionError("one decision leads to the next without end, though nothing happens")

    def to_the_end(self, choose: Callable[[list[Move]], Move]) -> None:
        """Whatever moves gets there in the end, one after another; a check finds nothing."""
        for _ in range(100):
            self.settle()
            if self.model.rollback.needs_check:
                self.model = replace(self.model, rollback=self.model.rollback.check_ended(None))
                continue
            loads = [name for name, hold in self.holds.items() if hold.standing is Standing.COMES]
            loading = [int(name.rpartition("/")[2]) for name in loads]
            leaving = [one.index for one in self.model.instances if one.state is UNLOADING]
            moving = [*((index, READY) for index in loading), *((index, STOPPED) for index in leaving)]
            if not moving:
                return
            self.ends_up(*choose(moving))
        raise AssertionError("it has no end")

    def active(self) -> list[tuple[State, EngineSpec]]:
        """What is not stopped."""
        return [(one.state, one.engine) for one in self.model.instances if one.state is not STOPPED]

    def ends_up(self, index: int, state: State) -> None:
        """One that moved is there."""
        self._set(index, replace(self._instance(index), state=state))
        del self.holds[f"chat/{index}"]

    def _instance(self, index: int) -> InstanceNow:
        return next(one for one in self.model.instances if one.index == index)

    def _stop(self, index: int) -> None:
        self._set(index, replace(self._instance(index), state=UNLOADING, renew=False))
        self.asks.pop(f"chat/{index}", None)
        self._hold(index, Standing.GOES)

    def _start(self, index: int) -> None:
        self._set(index, InstanceNow(index, LOADING, self.model.rollback.target))
        name = f"chat/{index}"
        self.asks[name] = asks(name, *sorted(self._devices_of(index)), since=next(self._times))

    def _hold(self, index: int, standing: Standing) -> None:
        name = f"chat/{index}"
        self.holds[name] = Hold(name, "chat", on(*self._devices_of(index)), standing)

    def _devices_of(self, index: int) -> frozenset[str]:
        return self._devices[index % len(self._devices)]

    def _set(self, index: int, one: InstanceNow) -> None:
        others = (other for other in self.model.instances if other.index != index)
        instances = tuple(sorted((*others, one), key=lambda one: one.index))
        self.model = replace(self.model, instances=instances)


@st.composite
def models(draw: st.DrawFn, states: Sequence[State] = tuple(State)) -> ModelNow:
    """In the middle of anything."""
    engines = st.sampled_from([OLD, NEW])
    rows = draw(st.lists(st.tuples(st.sampled_from(states), engines, st.booleans()), max_size=5))
    instances = tuple(
        InstanceNow(index, state, engine, None, renew) for index, (state, engine, renew) in enumerate(rows)
    )
    policy = Policy(
        replicas=draw(st.integers(1, 4)),
        replace=draw(st.sampled_from(["auto", "surge", "drain"])),
        start=draw(st.sampled_from(["always", "on-demand"])),
        enabled=draw(st.sampled_from([True, True, False])),
    )
    good = draw(st.none() | engines)
    rollback = Rollback(
        draw(engines), good, draw(st.none() | engines), draw(st.none() | st.just(CRASHED)) if good else None
    )
    model = ModelNow("chat", policy, draw(st.sampled_from(Wanted)), rollback, instances)
    return replace(model, waits_since=draw(st.none() | st.just(0.0)))


NO_ERROR = (READY, LOADING, STOPPED, UNLOADING)  # one in error is news of its spec, as long as it is there
ON_DEVICES = st.lists(st.frozensets(st.sampled_from(["0", "1", "2"]), max_size=2), min_size=1, max_size=3)


@given(models(), ON_DEVICES)
def test_the_same_fleet_gives_the_same_decision_and_what_was_carried_out_is_not_decided_again(
    model: ModelNow, devices: list[frozenset[str]]
) -> None:
    """As long as nothing happens, there is an end to it."""
    snapshot = Snapshot(models=[model], room=Fleet(model, devices).room)
    assert decide(snapshot, 0.0) == decide(snapshot, 0.0)
    fleet = Fleet(model, devices)
    fleet.settle()
    decided = decide_model(fleet.model)
    assert (decided.stop, decided.start, decided.wanted) == ((), (), fleet.model.wanted)


@given(models(NO_ERROR), ON_DEVICES, st.data())
def test_whatever_ends_first_a_model_becomes_what_is_wanted_of_it(
    model: ModelNow, devices: list[frozenset[str]], data: st.DataObject
) -> None:
    """Every start that is let in becomes ready, every stop comes to its end, every check finds nothing."""
    fleet = Fleet(model, devices)
    fleet.to_the_end(lambda moving: data.draw(st.sampled_from(moving)))
    runs = fleet.model.wanted is Wanted.RUN and model.policy.enabled
    assert (fleet.holds, fleet.asks) == ({}, {})
    assert fleet.active() == [(READY, fleet.model.rollback.target)] * (model.policy.replicas if runs else 0)


@given(models(NO_ERROR), ON_DEVICES, st.lists(st.integers(0, 3), max_size=6))
def test_decisions_that_are_cut_off_in_the_middle_lead_to_the_same_end(
    model: ModelNow, devices: list[frozenset[str]], cuts: list[int]
) -> None:
    """What was done of one is seen, and the rest is decided again."""
    whole, cut = Fleet(model, devices), Fleet(model, devices)
    whole.to_the_end(lambda moving: moving[0])
    for most in cuts:
        cut.turn(most)
    cut.to_the_end(lambda moving: moving[0])
    assert cut.active() == whole.active()
    assert (cut.model.wanted, cut.model.rollback, cut.holds) == (whole.model.wanted, whole.model.rollback, {})


@given(models(), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_when_to_look_again_is_a_time_to_come(model: ModelNow, idle: float, timeout: float, time: float) -> None:
    """Never before now, and in no time at all only where something follows."""
    policy = Policy.model_validate(model.policy.model_dump() | {"idle_timeout": timeout})
    found = decide(Snapshot(models=[replace(model, policy=policy, idle_seconds=idle)], retries=[retry()]), time)
    assert found.models["chat"].recheck_in >= 0
    pause = found.retries["chat/0"]
    assert pause is not None
    assert pause >= 0
