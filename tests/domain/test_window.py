"""Windows and quotas: they are never exceeded, refusals cost nothing and tell the true wait; in virtual time."""

import heapq
import math
import random
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_proxy.domain.limits import Rate
from vllm_proxy.domain.usage import DAY
from vllm_proxy.domain.window import (
    SLOTS,
    Budgets,
    Granted,
    Period,
    Quota,
    Refused,
    Window,
    admit,
    anthropic_lines,
    openai_lines,
    settle,
)

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp()
MIDNIGHT = datetime(2026, 11, 25, tzinfo=UTC).timestamp()


def budgets(*rates: Rate, now: float = 0.0, quotas: tuple[Quota, ...] = ()) -> Budgets:
    """Of a key, and of a glob."""
    return Budgets([Window(rate, now, "" if at == 0 else "a*") for at, rate in enumerate(rates)], quotas)


class Spent:
    """What the ledger has of the period that it is."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self) -> int:
        """Asked for."""
        return self.tokens


def granted(found: Granted | Refused) -> Granted:
    """It was let in."""
    assert isinstance(found, Granted)
    return found


def refused(found: Granted | Refused) -> Refused:
    """It was not let in."""
    assert isinstance(found, Refused)
    return found


def state(of: Budgets) -> list[Any]:
    """Everything that is counted."""
    windows = [(one.left_requests, one.left_tokens, one.used_tokens, list(one.tokens)) for one in of.windows]
    return [*windows, *((one.left_tokens, one.used_tokens) for one in of.quotas)]


# Exactness


class Exact(RuleBasedStateMachine):
    """Requests of bounded outputs on two scopes and a quota, compared with a list of everything that was charged."""

    @initialize(limit=st.integers(20, 200), other=st.integers(20, 200), requests=st.integers(1, 8))
    def begin(self, limit: int, other: int, requests: int) -> None:
        """Limits."""
        self.now, self.limits, self.requests = 1000.25, (limit, other), requests
        self.budgets = budgets(Rate(requests, limit), Rate(0, other), now=self.now)
        self.flying: list[Granted] = []
        self.charged: list[tuple[float, int]] = []
        self.admitted: list[float] = []

    @rule(seconds=st.floats(0, 70))
    def wait(self, seconds: float) -> None:
        """Time goes by."""
        self.now += seconds

    @rule(prompt=st.integers(0, 120), output=st.integers(0, 120))
    def ask(self, prompt: int, output: int) -> None:
        """It is let in, or refused without a charge, and let in after the wait that it was told."""
        self.budgets.uses(self.now, NOON)  # what has expired is forgotten
        before = state(self.budgets)
        found = admit(self.budgets, prompt, output, self.now, NOON, bounded=True)
        if isinstance(found, Granted):
            self.flying.append(found)
            self.admitted.append(self.now)
            return
        assert state(self.budgets) == before
        if found.wait == math.inf:
            assert prompt + output > min(self.limits)
        elif not self.flying:
            self.now += found.wait
            self.flying.append(granted(admit(self.budgets, prompt, output, self.now, NOON, bounded=True)))
            self.admitted.append(self.now)

    @rule(part=st.floats(0, 1), first=st.booleans())
    def end(self, part: float, *, first: bool) -> None:
        """A request has used at most what it held."""
        if self.flying:
            one = self.flying.pop(0 if first else -1)
            used = int(one.tokens * part)
            settle(one, used, self.now, NOON)
            settle(one, used, self.now, NOON)  # once more: nothing
            self.charged.append((self.now, used))

    @invariant()
    def never_exceeded(self) -> None:
        """What was used in the last 60 seconds and what is held is within the limits, and nobody forgets any of it."""
        if not hasattr(self, "budgets"):
            return
        used = sum(tokens for at, tokens in self.charged if at > self.now - 60)
        held = sum(one.tokens for one in self.flying)
        assert used + held <= min(self.limits)
        assert sum(at > self.now - 60 for at in self.admitted) <= self.requests
        for use in self.budgets.uses(self.now, NOON):
            if use.name == "tokens_per_minute":
                assert use.held == held
                assert used <= use.used <= sum(tokens for at, tokens in self.charged if at > self.now - SLOTS)


Exact.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_exact = Exact.TestCase


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300), st.floats(0, 50), st.floats(0, 59))
def test_the_wait_is_true(limit: int, used: int, wanted: int, at: float, later: float) -> None:
    """One moment before it is refused, then it is let in."""
    start = 7_000_000.0
    one = budgets(Rate(0, limit), now=start)
    settle(granted(admit(one, min(used, limit), 0, start + at, NOON, bounded=True)), min(used, limit), start + at, NOON)
    now = start + at + later
    found = admit(one, wanted, 0, now, NOON, bounded=True)
    if isinstance(found, Granted):
        assert wanted + min(used, limit) <= limit or later > 60
    elif wanted > limit:
        assert found.wait == math.inf
    else:
        assert 0 < found.wait <= SLOTS
        refused(admit(one, wanted, 0, now + found.wait - 0.0011, NOON, bounded=True))
        granted(admit(one, wanted, 0, now + found.wait, NOON, bounded=True))


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=20))
def test_a_guess_holds_no_more_than_is_left(requests: list[tuple[int, int]]) -> None:
    """And is refused only where not even the prompt and one token of an answer fit."""
    one = budgets(Rate(0, 100), Rate(0, 300))
    left = 100
    for prompt, guess in requests:
        found = admit(one, prompt, guess, 5.0, NOON, bounded=False)
        if isinstance(found, Granted):
            assert found.tokens == min(prompt + guess, left)
            left -= found.tokens
        else:
            assert prompt + min(guess, 1) > left
    assert one.windows[0].left_tokens == left


@pytest.mark.parametrize("is_given", [True, False])
def test_ten_clients_in_ten_minutes_use_a_window_and_never_exceed_it(*, is_given: bool) -> None:
    """At least 90 %; where outputs are bounded no 60 seconds have more than the limit in them.

    They ask again after the wait that they are told; outputs are bounded from 0 to 300 tokens above what they become.
    """
    chance, limit, one = random.Random(7), 20_000, budgets(Rate(0, 20_000))
    events: list[tuple[float, int, Granted | None, int]] = [(chance.random(), client, None, 0) for client in range(10)]
    charged: list[tuple[float, int]] = []
    while (event := heapq.heappop(events))[0] <= 600:
        now, client, ends, tokens = event
        if ends is not None:
            settle(ends, tokens, now, NOON)
            charged.append((now, tokens))
            heapq.heappush(events, (now + chance.random() * 0.05, client, None, 0))
            continue
        prompt, output = chance.randint(20, 400), chance.randint(10, 900)
        most = output + chance.randint(0, 300) if is_given else 256
        found = admit(one, prompt, most, now, NOON, bounded=is_given)
        if isinstance(found, Granted):
            heapq.heappush(events, (now + output * 0.01, client, found, prompt + output))
        else:
            heapq.heappush(events, (now + found.wait, client, None, 0))
    worst = max(sum(tokens for at, tokens in charged if start <= at < start + 60) for start, _ in charged)
    assert sum(tokens for _, tokens in charged) >= 0.9 * limit * 10
    assert worst <= limit or not is_given


def test_all_or_nothing() -> None:
    """What one limit refuses is charged to none; requests that were refused do not count."""
    one = budgets(Rate(2, 100), Rate(0, 50), quotas=(Quota("day", 60, Spent(10), NOON),))
    before = state(one)
    for _ in range(5):
        assert refused(admit(one, 51, 0, 0.0, NOON, bounded=True)).scope == "a*"
    assert state(one) == before
    granted(admit(one, 50, 0, 0.0, NOON, bounded=True))
    after = state(one)
    refused(admit(one, 1, 0, 0.0, NOON, bounded=True))
    assert state(one) == after
    granted(admit(one, 0, 0, 0.0, NOON, bounded=True))
    assert refused(admit(one, 0, 0, 0.0, NOON, bounded=True)).limit == "requests_per_minute"


# Refusals


def used(limit: Rate, requests: int, tokens: int, *, quotas: tuple[Quota, ...] = ()) -> Budgets:
    """At second 10."""
    one = budgets(limit, quotas=quotas)
    for at in range(requests):
        settle(granted(admit(one, 0, 0, 10.0, NOON, bounded=True)), tokens if at == 0 else 0, 10.0, NOON)
    return one


def test_a_refusal_says_what_is_used_what_was_wanted_and_when_it_is_free() -> None:
    """As seconds, in the message and in the headers; milliseconds are rounded up."""
    found = refused(admit(used(Rate(0, 20_000), 1, 20_000), 400, 412, 63.6, NOON, bounded=True))
    assert found.message == "cannot take this: 20000 tokens a minute are used, 812 wanted, free in 7.4 s"
    assert (found.code, found.type, found.limit) == ("rate_limit_exceeded", "tokens", "tokens_per_minute")
    assert found.wait == 7.4
    found = refused(admit(used(Rate(3, 0), 3, 0), 400, 412, 10.5, NOON, bounded=True))
    assert found.message == "cannot take this: 3 requests a minute are used, 1 wanted, free in 60.5 s"
    assert (found.code, found.type) == ("rate_limit_exceeded", "requests")
    assert found.wait == 60.5


def test_what_is_larger_than_the_limit_is_not_to_be_sent_again() -> None:
    """No time is told, since there is none."""
    found = refused(admit(budgets(Rate(0, 500)), 812, 0, 1.0, NOON, bounded=False))
    assert found.message == "cannot take this: 812 tokens wanted, and 500 a minute are all there may be"
    assert found.wait == math.inf


def test_the_limit_with_the_longest_wait_is_told() -> None:
    """Whoever waits for it does not meet another one then."""
    one = used(Rate(3, 100), 3, 0)
    one.windows[0].advance(30)
    settle(granted(admit(budgets_of_tokens(one), 100, 0, 40.0, NOON, bounded=True)), 100, 40.0, NOON)
    found = refused(admit(one, 50, 0, 45.0, NOON, bounded=True))
    assert (found.limit, found.wait) == ("tokens_per_minute", 40 + SLOTS - 45)


def budgets_of_tokens(one: Budgets) -> Budgets:
    """The same window, as if requests were not limited."""
    one.windows[0].change(Rate(0, 100))
    try:
        return Budgets(one.windows)
    finally:
        one.windows[0].change(Rate(3 + 1, 100))


def test_a_wait_for_requests_in_flight_is_as_long_as_those_take() -> None:
    """Nobody knows when they end: it is the mean of those before, from 1 to 60 seconds."""
    one = budgets(Rate(0, 100))
    holder = granted(admit(one, 90, 0, 5.0, NOON, bounded=True))
    found = refused(admit(one, 20, 0, 5.0, NOON, bounded=True))
    assert found.message.endswith("90 tokens a minute are used, 20 wanted, free when requests in flight have ended")
    assert found.wait == 1.0
    settle(holder, 0, 45.0, NOON)
    granted(admit(one, 90, 0, 45.0, NOON, bounded=True))
    assert refused(admit(one, 20, 0, 45.0, NOON, bounded=True)).wait == 5.875


# Days and months


def test_a_day_ends_at_midnight_in_utc() -> None:
    """Until then `insufficient_quota` where it is used up, and not held; what is held goes on into the next day."""
    spent = Spent(900)
    one = Budgets([], [Quota("day", 1000, spent, NOON)])
    holder = granted(admit(one, 50, 0, 5.0, NOON, bounded=True))
    found = refused(admit(one, 60, 0, 5.0, NOON, bounded=True))
    assert (found.code, found.type, found.limit) == ("rate_limit_exceeded", "tokens", "tokens_per_day")
    assert found.message == (
        "cannot take this: 950 tokens a day are used, 60 wanted, free when requests in flight have ended"
    )
    found = refused(admit(one, 200, 0, 5.0, NOON, bounded=True))
    assert found.message == ("cannot take this: 950 tokens a day are used, 200 wanted, free at 2026-11-25T00:00:00Z")
    assert (found.code, found.type, found.wait) == ("insufficient_quota", "insufficient_quota", 43200)
    spent.tokens = 0
    settle(holder, 40, 6.0, MIDNIGHT)
    assert [(use.used, use.held) for use in one.uses(6.0, MIDNIGHT)] == [(40, 0)]
    granted(admit(one, 960, 0, 6.0, MIDNIGHT, bounded=True))


@pytest.mark.parametrize(("now", "until"), [((2026, 12, 31), (2027, 1, 1)), ((2028, 2, 29), (2028, 3, 1))])
def test_a_month_ends_with_its_last_day(now: tuple[int, int, int], until: tuple[int, int, int]) -> None:
    """In December, and in a leap year."""
    epoch, end = datetime(*now, 23, tzinfo=UTC).timestamp(), datetime(*until, tzinfo=UTC).timestamp()
    spent = Spent(100)
    one = Budgets([], [Quota("month", 100, spent, epoch)])
    assert refused(admit(one, 1, 0, 0.0, epoch, bounded=True)).wait == end - epoch
    spent.tokens = 0
    granted(admit(one, 1, 0, 0.0, end, bounded=True))


def test_a_clock_that_was_wrong_does_not_refuse_for_years() -> None:
    """A step back over midnight forgets nothing; after one of a day it is that day's quota."""
    spent = Spent(100)
    one = Budgets([], [Quota("day", 100, spent, MIDNIGHT + 5)])
    spent.tokens = 0
    refused(admit(one, 1, 0, 0.0, MIDNIGHT - 5, bounded=True))
    granted(admit(one, 1, 0, 0.0, NOON, bounded=True))


@pytest.mark.parametrize("jump", [-400 * DAY, -DAY, DAY, 400 * DAY])
@pytest.mark.parametrize("period", ["day", "month"])
def test_a_quota_that_is_used_up_is_not_granted_again_by_a_clock_that_goes_there_and_back(
    period: Period, jump: int
) -> None:
    """It begins with what the ledger has of the period that it is then; what is held goes on."""
    spent, now = Spent(0), datetime(2026, 11, 1, 12, tzinfo=UTC).timestamp()
    there = now + (jump if period == "day" else 31 * jump)
    one = Budgets([], [Quota(period, 100, spent, now)])
    settle(granted(admit(one, 80, 0, 0.0, now, bounded=True)), 80, 0.0, now)
    holder = granted(admit(one, 15, 0, 0.0, there, bounded=True))
    assert [(use.used, use.held) for use in one.uses(0.0, there)] == [(0, 15)]
    spent.tokens = 80
    assert [(use.used, use.held) for use in one.uses(0.0, now)] == [(80, 15)]
    refused(admit(one, 10, 0, 0.0, now, bounded=True))
    settle(holder, 15, 0.0, now)
    assert [(use.used, use.held) for use in one.uses(0.0, now)] == [(95, 0)]


# Headers


def fields(lines: bytes) -> dict[str, str]:
    """By their names."""
    assert lines.endswith(b"\r\n")
    return dict(line.split(": ") for line in lines.decode().removesuffix("\r\n").split("\r\n"))


def test_six_lines_of_openai_say_what_is_left() -> None:
    """What is held counts as used; `reset` is when all of it is free again."""
    one = used(Rate(60, 20_000), 1, 500)
    holder = granted(admit(one, 100, 200, 14.5, NOON, bounded=True))
    assert fields(openai_lines(one, 15.5, NOON)) == {
        "x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "58",
        "x-ratelimit-reset-requests": "60s", "x-ratelimit-limit-tokens": "20000",
        "x-ratelimit-remaining-tokens": "19200", "x-ratelimit-reset-tokens": "61s",
    }  # fmt: skip
    settle(holder, 150, 16.5, NOON)
    found = fields(openai_lines(one, 20.0, NOON))
    assert (found["x-ratelimit-remaining-tokens"], found["x-ratelimit-reset-tokens"]) == ("19350", "57s")
    found = fields(openai_lines(one, 77.0, NOON))
    assert (found["x-ratelimit-remaining-tokens"], found["x-ratelimit-reset-tokens"]) == ("20000", "0s")


def test_the_tightest_scope_is_told() -> None:
    """Of requests and of tokens, each where less is left; a quota among them."""
    one = budgets(Rate(10, 1000), Rate(5, 2000), quotas=(Quota("day", 5000, Spent(4500), NOON),))
    found = fields(openai_lines(one, 0.0, NOON))
    assert (found["x-ratelimit-limit-requests"], found["x-ratelimit-limit-tokens"]) == ("5", "5000")
    assert (found["x-ratelimit-remaining-tokens"], found["x-ratelimit-reset-tokens"]) == ("500", "43200s")
    found = fields(openai_lines(Budgets(one.windows), 0.0, NOON))
    assert (found["x-ratelimit-limit-requests"], found["x-ratelimit-limit-tokens"]) == ("5", "1000")


def test_what_is_not_limited_has_no_lines() -> None:
    """Requests alone, tokens alone, neither."""
    assert list(fields(openai_lines(budgets(Rate(5)), 0.0, NOON))) == [
        "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests",
    ]  # fmt: skip
    assert list(fields(openai_lines(budgets(Rate(0, 5)), 0.0, NOON))) == [
        "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens",
    ]  # fmt: skip
    assert (openai_lines(Budgets(), 0.0, NOON), anthropic_lines(Budgets(), 0.0, NOON)) == (b"", b"")
    assert not Budgets().is_any


def test_lines_of_anthropic_say_the_time() -> None:
    """RFC 3339."""
    one = used(Rate(60, 20_000), 1, 500)
    assert fields(anthropic_lines(one, 11.0, NOON)) == {
        "anthropic-ratelimit-requests-limit": "60", "anthropic-ratelimit-requests-remaining": "59",
        "anthropic-ratelimit-requests-reset": "2026-11-24T12:01:00Z", "anthropic-ratelimit-tokens-limit": "20000",
        "anthropic-ratelimit-tokens-remaining": "19500", "anthropic-ratelimit-tokens-reset": "2026-11-24T12:01:00Z",
    }  # fmt: skip


def test_an_answer_longer_than_guessed_leaves_nothing_and_not_less() -> None:
    """Then nobody is let in until that has expired, not even without tokens."""
    one = budgets(Rate(0, 100))
    settle(granted(admit(one, 10, 5, 5.0, NOON, bounded=False)), 500, 6.0, NOON)
    assert fields(openai_lines(one, 6.0, NOON))["x-ratelimit-remaining-tokens"] == "0"
    assert refused(admit(one, 0, 0, 6.0, NOON, bounded=True)).wait == SLOTS


@given(st.lists(st.floats(0, 400), min_size=2, max_size=30))
def test_nothing_is_forgotten_early_or_kept_for_good(moments: list[float]) -> None:
    """After any pauses a window holds what is at most 61 seconds old, and all that is younger than 60."""
    one, times = budgets(Rate(0, 10**6)), sorted(moments)
    for now in times:
        settle(granted(admit(one, 1, 0, now, NOON, bounded=True)), 1, now, NOON)
        (use,) = one.uses(now, NOON)
        assert sum(at > now - 60 for at in times if at <= now) <= use.used + times.count(now)
        assert use.used <= sum(now - at < SLOTS for at in times if at <= now)
    (use,) = one.uses(times[-1] + SLOTS, NOON)
    assert use.used == 0
