"""The life of an instance."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.lifecycle import FINAL, TRANSITIONS, Event, Reason, State, after, backoff_seconds, best

LISTED = {
    ("stopped", "start"): "loading",
    ("loading", "listening"): "ready",
    ("loading", "died"): "loading",
    ("loading", "gave up"): "error",
    ("loading", "stop"): "unloading",
    ("loading", "slept"): "sleeping",
    ("ready", "died"): "loading",
    ("ready", "stalled"): "loading",
    ("ready", "stop"): "unloading",
    ("error", "start"): "loading",
    ("error", "stop"): "unloading",
    ("unloading", "gone"): "stopped",
    ("unloading", "slept"): "sleeping",
    ("unloading", "stop"): "unloading",
    ("sleeping", "start"): "loading",
    ("sleeping", "stop"): "unloading",
    ("sleeping", "died"): "stopped",
    ("unloading", "resumed"): "ready",
}


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_only_listed_pairs_change_a_state(state: State, event: Event) -> None:
    """A listed pair leads where the table says; any other is a bug and raises."""
    if (expected := LISTED.get((state.value, event.value))) is not None:
        assert after(state, event).value == expected
    else:
        with pytest.raises(AssertionError, match=f"no transition from {state} on {event}"):
            after(state, event)


@pytest.mark.parametrize("state", [state for state in State if state is not State.STOPPED])
def test_every_state_leads_to_stopped(state: State) -> None:
    """An instance can be stopped from wherever it is."""
    if state is not State.UNLOADING:
        state = after(state, Event.STOP)
    assert after(state, Event.GONE) is State.STOPPED


def test_only_a_proven_engine_is_ready() -> None:
    """The engine proved that it listens, or has served before."""
    ways = [pair for pair, to in TRANSITIONS.items() if to is State.READY]
    assert ways == [(State.LOADING, Event.LISTENING), (State.UNLOADING, Event.RESUMED)]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], "stopped"),
        (["stopped", "error"], "error"),
        (["error", "unloading"], "unloading"),
        (["error", "unloading", "sleeping"], "sleeping"),
        (["unloading", "loading", "error", "sleeping"], "loading"),
        (["stopped", "error", "unloading", "loading", "ready"], "ready"),
    ],
)
def test_a_model_is_as_good_as_its_best_instance(states: list[str], expected: str) -> None:
    """Ready, else loading, sleeping, unloading, error, stopped; without instances it is stopped."""
    assert best(State(state) for state in states).value == expected
    assert best(State(state) for state in reversed(states)).value == expected


def test_no_retry_follows_what_no_retry_can_mend() -> None:
    """Wrong options, a missing command and memory that others hold rest in error at once."""
    assert {Reason.INVALID_ARGUMENTS, Reason.COMMAND_NOT_FOUND, Reason.DOES_NOT_FIT} == FINAL


def test_the_wait_doubles_up_to_the_longest() -> None:
    """One, two, four seconds, never above the limit."""
    assert [backoff_seconds(n, 1.0, 60.0, 0.0) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_jitter_takes_off_up_to_a_quarter() -> None:
    """Engines that died together do not start together."""
    assert [backoff_seconds(3, 1.0, 60.0, jitter) for jitter in (0.0, 0.5, 1.0)] == [4.0, 3.5, 3.0]


@given(st.integers(1, 10**9), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1))
def test_a_wait_is_never_negative_nor_too_long(failures: int, first: float, longest: float, jitter: float) -> None:
    """However often it failed, the wait stays between nothing and the limit."""
    assert 0 <= backoff_seconds(failures, first, longest, jitter) <= longest
