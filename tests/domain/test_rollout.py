"""Which instances go and come, and that nobody is left without one where that can be helped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.lifecycle import State
from vllm_proxy.domain.rollout import Replica, Steps, Strategy, steps

READY, LOADING, ERROR, STOPPED, UNLOADING, SLEEPING = (
    State.READY, State.LOADING, State.ERROR, State.STOPPED, State.UNLOADING, State.SLEEPING,
)  # fmt: skip
STRATEGIES = st.sampled_from(Strategy)


def present(*rows: tuple[State, bool]) -> list[Replica]:
    """Instances 0, 1, ...: state, and whether it runs what is wanted."""
    return [Replica(index, state, up_to_date) for index, (state, up_to_date) in enumerate(rows)]


@pytest.mark.parametrize("strategy", Strategy)
def test_as_many_as_wanted_are_started_and_then_nothing(strategy: Strategy) -> None:
    """From nothing, all at once; when they run, or try to, nothing is left to do."""
    assert steps([], 3, strategy) == Steps(start=(0, 1, 2))
    assert steps(present((LOADING, True), (READY, True), (ERROR, True)), 3, strategy) == Steps()


@pytest.mark.parametrize("strategy", Strategy)
def test_fewer_replicas_take_the_last_ones_away(strategy: Strategy) -> None:
    """The others are not touched; none at all for a model that is disabled."""
    running = present((READY, True), (READY, True), (READY, True))
    assert steps(running, 1, strategy) == Steps(stop=(1, 2))
    assert steps(running, 0, strategy) == Steps(stop=(0, 1, 2))


@pytest.mark.parametrize("strategy", Strategy)
def test_more_replicas_start_behind_the_others(strategy: Strategy) -> None:
    """An index that is free is used again."""
    assert steps(present((READY, True), (STOPPED, True)), 3, strategy) == Steps(start=(1, 2))


@pytest.mark.parametrize("strategy", [Strategy.ONE_BY_ONE, Strategy.DRAIN])
def test_a_single_instance_goes_before_its_successor_comes(strategy: Strategy) -> None:
    """Into the same place, when the last process of the old one is gone."""
    assert steps(present((READY, False)), 1, strategy) == Steps(stop=(0,))
    assert steps(present((UNLOADING, False)), 1, strategy) == Steps()
    assert steps(present((STOPPED, False)), 1, strategy) == Steps(start=(0,))


def test_one_by_one_waits_until_the_new_one_serves() -> None:
    """Then the next one goes; one that rests in error is not waited for."""
    assert steps(present((READY, False), (READY, False)), 2, Strategy.ONE_BY_ONE) == Steps(stop=(0,))
    assert steps(present((LOADING, True), (READY, False)), 2, Strategy.ONE_BY_ONE) == Steps()
    assert steps(present((READY, True), (READY, False)), 2, Strategy.ONE_BY_ONE) == Steps(stop=(1,))
    assert steps(present((ERROR, True), (READY, False)), 2, Strategy.ONE_BY_ONE) == Steps(stop=(1,))


def test_one_by_one_with_more_replicas_starts_those_first() -> None:
    """They serve sooner, and nobody has to go for them."""
    assert steps(present((READY, False)), 2, Strategy.ONE_BY_ONE) == Steps(start=(1,))


def test_surge_takes_the_old_one_away_when_the_new_one_is_ready() -> None:
    """At no time fewer than wanted serve, and one more than wanted runs."""
    assert steps(present((READY, False)), 1, Strategy.SURGE) == Steps(start=(1,))
    assert steps(present((READY, False), (LOADING, True)), 1, Strategy.SURGE) == Steps()
    assert steps(present((READY, False), (READY, True)), 1, Strategy.SURGE) == Steps(stop=(0,))
    assert steps(present((READY, False), (READY, False)), 2, Strategy.SURGE) == Steps(start=(2,))


def test_drain_takes_all_old_ones_away_at_once() -> None:
    """For two that do not get along."""
    assert steps(present((READY, False), (READY, False)), 2, Strategy.DRAIN) == Steps(stop=(0, 1))
    assert steps(present((STOPPED, False), (UNLOADING, False)), 2, Strategy.DRAIN) == Steps(start=(0,))


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("state", [LOADING, ERROR])
def test_what_does_not_serve_and_is_not_wanted_goes_at_once(strategy: Strategy, state: State) -> None:
    """There is nothing to protect."""
    assert steps(present((state, False), (state, False)), 2, strategy) == Steps(stop=(0, 1))


@given(st.data(), st.integers(1, 4), st.integers(0, 4), STRATEGIES)
def test_any_order_of_events_ends_with_what_is_wanted(
    data: st.DataObject, before: int, replicas: int, strategy: Strategy
) -> None:
    """From running instances of an old spec; one that serves goes only when its strategy allows it."""
    running = {index: Replica(index, READY, up_to_date=False) for index in range(before)}
    for _ in range(200):
        now = steps(list(running.values()), replicas, strategy)
        check(running, now, before, replicas, strategy)
        for index in now.stop:
            running[index] = Replica(index, UNLOADING, running[index].up_to_date)
        for index in now.start:
            running[index] = Replica(index, LOADING, up_to_date=True)
        moving = [one for one in running.values() if one.state in {LOADING, UNLOADING}]
        if not moving:
            break
        one = data.draw(st.sampled_from(moving))
        running[one.index] = Replica(one.index, READY if one.state is LOADING else STOPPED, one.up_to_date)
    left = [one for one in running.values() if one.state is not STOPPED]
    assert [(one.state, one.up_to_date) for one in left] == [(READY, True)] * replicas


def check(running: dict[int, Replica], now: Steps, before: int, replicas: int, strategy: Strategy) -> None:
    """What holds at each step."""
    assert all(running[index].active for index in now.stop), "nobody is asked to go twice"
    assert not any(index in running and running[index].state is not STOPPED for index in now.start)
    there = sum(one.state is not STOPPED for one in running.values()) + len(now.start)
    serving = sum(one.state is READY and index not in now.stop for index, one in running.items())
    assert there <= max(before, replicas + (strategy is Strategy.SURGE))
    if strategy is Strategy.SURGE:
        assert serving >= min(before, replicas)
    if strategy is Strategy.ONE_BY_ONE:
        assert serving >= min(before, replicas) - 1
    if strategy is Strategy.DRAIN and now.start:
        assert not any(one.active and not one.up_to_date for one in running.values()) or replicas > before


@given(st.lists(st.tuples(st.sampled_from(State), st.booleans()), max_size=6), st.integers(0, 5), STRATEGIES)
def test_whatever_is_found_no_step_is_absurd(rows: list[tuple[State, bool]], replicas: int, strategy: Strategy) -> None:
    """Nothing is both stopped and started, and never more are started than are missing."""
    found = present(*rows)
    now = steps(found, replicas, strategy)
    fitting = [one for one in found if one.active and one.up_to_date and one.index not in now.stop]
    assert not set(now.stop) & {*now.start, *now.wake}
    assert {*now.wake} == {one.index for one in fitting if one.state is SLEEPING}
    assert len(fitting) + len(now.start) <= max(replicas, len(fitting))
