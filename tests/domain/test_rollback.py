"""Which spec the instances of a model run, as facts about values."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.causes import Change
from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.domain.rollback import Attempt, Rollback

OLD, NEW, THIRD = (EngineSpec(model=name) for name in ("old", "new", "third"))
CRASHED = Diagnosis(Reason.CRASHED, "it crashed")
REFUSED = Diagnosis(Reason.INVALID_ARGUMENTS, "no such option")


def one(engine: EngineSpec, state: State, failure: Diagnosis | None = None) -> Attempt:
    """What an instance says."""
    return Attempt(engine, state, failure)


def changed() -> Rollback:
    """A model that was ready with the old spec and is to run the new one."""
    return Rollback(OLD).update([one(OLD, State.READY)]).change(NEW)


def test_without_a_good_spec_the_wanted_one_is_run() -> None:
    """Whatever becomes of it: there is nothing to go back to, and nothing to check for."""
    for tried in ([], [one(NEW, State.LOADING, CRASHED)], [one(NEW, State.ERROR, CRASHED)]):
        found = Rollback(NEW).update(tried)
        assert (found.target, found.needs_check, found.refusal) == (NEW, False, None)


def test_a_spec_is_good_when_an_engine_was_ready_with_it() -> None:
    """One of several is enough; it stays good when they stop or load again."""
    found = Rollback(OLD).update([one(OLD, State.LOADING), one(OLD, State.READY)])
    assert found.good == OLD
    for state in (State.LOADING, State.STOPPED, State.UNLOADING):
        assert found.update([one(OLD, state)]).good == OLD


def test_a_change_is_checked_while_the_good_one_is_run() -> None:
    """Nothing is stopped for a spec that the check would refuse."""
    found = changed()
    assert (found.needs_check, found.target) == (True, OLD)
    assert found.update([one(OLD, State.READY)]) == found


def test_a_check_that_finds_nothing_lets_the_change_in() -> None:
    """Then it is run; nothing is checked twice."""
    found = changed().check_ended(None)
    assert (found.needs_check, found.target, found.refusal) == (False, NEW, None)


def test_a_check_that_finds_something_keeps_the_good_one() -> None:
    """The model says so, with what was found, and what to do."""
    found = changed().check_ended(REFUSED)
    assert (found.needs_check, found.target) == (False, OLD)
    assert found.refusal is not None
    assert found.refusal.reason is Reason.REPLACEMENT_FAILED
    assert found.refusal.message.endswith("the next edit tries again: no such option")


def test_what_would_have_done_for_the_refused_spec_is_told_with_the_refusal() -> None:
    """It is the file that is to be changed."""
    would = (Change("max_model_len", 4096),)
    found = changed().check_ended(replace(REFUSED, changes=would))
    assert found.refusal is not None
    assert found.refusal.changes == would


def test_a_failure_with_the_new_spec_goes_back_to_the_good_one() -> None:
    """The first instance that fails decides, while the others still load."""
    found = changed().check_ended(None)
    found = found.update([one(NEW, State.LOADING), one(NEW, State.LOADING, CRASHED)])
    assert (found.target, found.failed) == (OLD, CRASHED)


@pytest.mark.parametrize(
    "why",
    [
        Diagnosis(Reason.PORT_IN_USE, "by chance"), Diagnosis(Reason.NOT_ENDED, "by chance"),
        Diagnosis(Reason.CRASHED, "no process can be made", of_machine=True),
    ],
)  # fmt: skip
def test_what_says_nothing_about_a_spec_does_not_go_back(why: Diagnosis) -> None:
    """A port that is taken, an engine that lives on, a machine that lacks something: the next try may do."""
    found = changed().check_ended(None).update([one(NEW, State.LOADING, why)])
    assert (found.target, found.failed) == (NEW, None)


def test_a_failure_with_another_spec_is_nothing_to_the_wanted_one() -> None:
    """The good one crashes while the new one waits."""
    found = changed().check_ended(None).update([one(OLD, State.LOADING, CRASHED)])
    assert (found.target, found.failed) == (NEW, None)


def test_an_engine_that_is_ready_with_the_new_spec_makes_that_the_good_one() -> None:
    """What failed before is forgotten."""
    found = changed().check_ended(None).update([one(OLD, State.READY), one(NEW, State.READY)])
    assert (found.good, found.failed, found.target) == (NEW, None, NEW)
    failed = changed().check_ended(REFUSED).update([one(NEW, State.READY)])
    assert (failed.good, failed.failed) == (NEW, None)


def test_the_next_change_is_tried_again() -> None:
    """A failure holds for what failed, and the same spec once more is another try."""
    failed = changed().check_ended(REFUSED)
    for again in (THIRD, NEW):
        found = failed.change(again)
        assert (found.failed, found.needs_check, found.target) == (None, True, OLD)


def test_a_change_back_to_the_good_spec_needs_no_check() -> None:
    """It was ready with that."""
    found = changed().check_ended(REFUSED).change(OLD)
    assert (found.needs_check, found.target, found.refusal) == (False, OLD, None)


def test_a_good_spec_with_which_all_rest_in_error_is_good_no_more() -> None:
    """Then the file's spec is as good as any; a failure is forgotten with what it protected."""
    failed = changed().check_ended(REFUSED)
    found = failed.update([one(OLD, State.ERROR, CRASHED), one(OLD, State.STOPPED)])
    assert (found.good, found.failed, found.target) == (None, None, NEW)
    still = failed.update([one(OLD, State.ERROR, CRASHED), one(OLD, State.LOADING)])
    assert (still.good, still.target) == (OLD, OLD)


def test_stopped_instances_say_nothing() -> None:
    """Their spec is that of an engine which is gone."""
    found = changed()
    assert found.update([one(NEW, State.STOPPED), one(NEW, State.UNLOADING)]) == found


SPECS = st.sampled_from([OLD, NEW, THIRD])
FAILURES = st.sampled_from([None, CRASHED, REFUSED, Diagnosis(Reason.PORT_IN_USE, "by chance")])
TRIED = st.lists(st.builds(Attempt, SPECS, st.sampled_from(State), FAILURES), max_size=4)


@given(SPECS, st.lists(st.one_of(TRIED, SPECS, FAILURES), max_size=8), TRIED)
def test_whatever_happens_it_is_the_wanted_or_the_good_spec_and_the_same_news_twice_are_no_news(
    first: EngineSpec, news: list[list[Attempt] | EngineSpec | Diagnosis | None], last: list[Attempt]
) -> None:
    """The good one only where there is one, and a reason to run it instead."""
    found = Rollback(first)
    for what in news:
        match what:
            case EngineSpec():
                found = found.change(what)
            case list():
                found = found.update(what)
            case _:
                found = found.check_ended(what)
    found = found.update(last)
    assert found.update(last) == found
    assert found.target in (found.wanted, found.good)
    if found.target != found.wanted:
        assert found.failed is not None or found.needs_check
