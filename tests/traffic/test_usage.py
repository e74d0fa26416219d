"""What keys use, as it is counted in memory."""

from typing import get_args

import pytest

from vllm_proxy.domain.tokens import NO_TOKENS, Tokens
from vllm_proxy.domain.usage import HOUR, Bucket, Counts
from vllm_proxy.traffic.usage import Outcome, Usage

NOW = 1_795_548_735.0
THIS_HOUR = int(NOW) // HOUR * HOUR


class Clock:
    """Seconds since the epoch."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """One that stands still."""
    return Clock()


def test_what_is_counted_is_summed_up_by_hour_key_and_model(clock: Clock) -> None:
    """An hour ends while others are counted; what was counted in it stays in it."""
    usage = Usage(clock)
    usage.counts("ci", "chat").add(Counts(requests=1, prompt=10, completion=20, cached=5))
    usage.counts("ci", "chat").add(Counts(requests=1, prompt=1, estimated=3, failed=1))
    usage.counts("ci", "embed").add(Counts(limited=1))
    clock.now += HOUR
    usage.counts("ci", "chat").add(Counts(requests=1, completion=7))
    assert usage.take() == {
        Bucket(THIS_HOUR, "ci", "chat"): Counts(2, 11, 20, 5, 3, 1, 0),
        Bucket(THIS_HOUR, "ci", "embed"): Counts(limited=1),
        Bucket(THIS_HOUR + HOUR, "ci", "chat"): Counts(1, 0, 7),
    }


def test_what_was_taken_is_not_taken_again_and_goes_on_in_the_totals(clock: Clock) -> None:
    """The ledger gets each count once; the metrics never go back."""
    usage = Usage(clock)
    usage.counts("ci", "chat").add(Counts(prompt=10))
    first = usage.take()
    usage.counts("ci", "chat").add(Counts(prompt=1))
    assert first == {Bucket(THIS_HOUR, "ci", "chat"): Counts(prompt=10)}
    assert usage.totals({"ci"}, {"chat"}) == {("ci", "chat"): Counts(prompt=11)}
    assert usage.take() == {Bucket(THIS_HOUR, "ci", "chat"): Counts(prompt=1)}
    assert usage.take() == {}
    assert usage.totals({"ci"}, {"chat"}) == {("ci", "chat"): Counts(prompt=11)}


def test_the_first_count_of_a_bucket_is_told_and_no_other(clock: Clock) -> None:
    """Whoever writes sleeps until there is something, and is not called for each request."""
    usage, told = Usage(clock), list[int]()
    usage.counted = lambda: told.append(1)
    for _ in range(3):
        usage.counts("ci", "chat").add(Counts(requests=1))
    assert len(told) == 1
    usage.take()
    usage.counts("ci", "chat").add(Counts(requests=1))
    assert len(told) == 2


def test_the_totals_of_a_key_and_of_a_model_that_are_gone_are_forgotten(clock: Clock) -> None:
    """So that names of the past make no series for ever; what the ledger has not taken yet, it still gets."""
    usage = Usage(clock)
    usage.counts("ci", "chat").add(Counts(prompt=1))
    usage.take()
    usage.counts("ci", "chat").add(Counts(prompt=2))
    for key, model in (("ci", "chat"), ("ci", "gone"), ("gone", "chat")):
        usage.limited(key, model, "tokens_per_day")
    assert usage.totals({"other"}, {"chat"}) == {}
    assert usage.totals({"ci"}, {"chat"}) == {("ci", "chat"): Counts(prompt=2, limited=1)}
    assert not usage.outcomes
    assert not usage.refusals
    assert usage.take()[Bucket(THIS_HOUR, "ci", "chat")] == Counts(prompt=2, limited=1)


def test_what_becomes_of_requests_is_counted_for_the_metrics(clock: Clock) -> None:
    """By key and model, and refusals by key and limit."""
    usage = Usage(clock)
    for outcome in get_args(Outcome.__value__):
        if outcome != "limited":
            usage.settled("ci", "chat", outcome, Tokens(3, 2, 1), 4)
    usage.settled("ci", "chat", "ok", NO_TOKENS, 0)
    usage.limited("ci", "chat", "tokens_per_minute")
    usage.refused("ci", "max_in_flight")
    once = {("ci", "chat", name): 1 for name in ("client_error", "limited", "engine_error", "aborted")}
    assert usage.outcomes == {**once, ("ci", "chat", "ok"): 2}
    assert usage.refusals == {("ci", "tokens_per_minute"): 1, ("ci", "max_in_flight"): 1}
    assert usage.take() == {Bucket(THIS_HOUR, "ci", "chat"): Counts(5, 12, 8, 4, 16, failed=1, limited=1)}
