"""Counts what keys use of their limits: lets a request in or refuses it, charges what it used, says what is left.

A limit of a minute is exact, and no bucket, which would let two minutes' worth through in one: a ring of 61 one-second
slots, and what requests in flight hold. `used + held <= limit` is kept at all times where the outputs are bounded. A
request is let in by all of its limits or charged to none. Time is passed in: `now` is monotonic seconds, `epoch` is
seconds since 1970, for days and months of UTC.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from vllm_proxy.domain.units import show_time

type LimitName = Literal["requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_per_month"]
type Period = Literal["day", "month"]

SLOTS = 61  # 60 whole seconds and the one that has begun
NOT_AGAIN_SECONDS = 60.0  # clients are told not to wait longer than that
_DAY_SECONDS = 86_400
_STEP_SECONDS = 3600  # so far back the clock may be set without a new period
_NO_LIMIT = 2**62  # tokens
_LEARNED = 0.125  # what the duration of one more request counts for the mean
_SHORTEST_SECONDS, _LONGEST_SECONDS = 1.0, 60.0  # waits for requests in flight, whose ends nobody knows


class Window:
    """What was used in the last 60 seconds, by the second, and what is held by requests in flight."""

    __slots__ = ("held", "last", "limit", "ring", "slot", "used")

    def __init__(self, limit: int, now: float) -> None:
        """`limit`: of 60 seconds; it may be changed at any time."""
        self.limit = limit
        self.used = 0
        self.held = 0
        self.ring = [0] * SLOTS
        self.slot = int(now)
        self.last = self.slot  # when something was used

    def advance(self, slot: int) -> None:
        """Forget what is older than 60 seconds. `slot`: the second that it is, later than `self.slot`."""
        ring = self.ring
        if self.used:
            for second in range(self.slot + 1, min(slot, self.slot + SLOTS) + 1):
                at = second % SLOTS
                self.used -= ring[at]
                ring[at] = 0
        self.slot = slot

    def charge(self, amount: int) -> None:
        """Used now, in the second that `advance` was told last."""
        self.used += amount
        self.ring[self.slot % SLOTS] += amount
        self.last = self.slot

    def wait(self, amount: int, now: float) -> float:
        """Seconds until so much more fits, if nothing else happens; inf: not before requests in flight have ended."""
        excess = self.used + self.held + amount - self.limit
        if excess <= 0:
            return 0.0
        for second in range(self.slot - SLOTS + 1, self.slot + 1):
            excess -= self.ring[second % SLOTS]
            if excess <= 0:
                return second + SLOTS - now
        return math.inf

    @property
    def left(self) -> int:
        """What is neither used nor held."""
        return self.limit - self.used - self.held

    def reset(self, _epoch: float) -> int:
        """Whole seconds until nothing is used, if nothing else happens and what is in flight ends now."""
        return SLOTS if self.held else self.last + SLOTS - self.slot if self.used else 0


class Quota:
    """What was used on this day or in this month of UTC, and what is held by requests in flight."""

    __slots__ = ("begins", "ends", "held", "limit", "period", "used")

    def __init__(self, period: Period, limit: int, used: int, epoch: float) -> None:
        """`used`: of the period so far, from the ledger."""
        self.period = period
        self.limit = limit
        self.used = used
        self.held = 0
        self.begins, self.ends = _period(period, epoch)

    def roll(self, epoch: float) -> None:
        """Another period has begun."""
        self.used = 0
        self.begins, self.ends = _period(self.period, epoch)

    def wait(self, amount: int, epoch: float) -> float:
        """Seconds until so much more fits, if nothing else happens; inf: not before requests in flight have ended."""
        if self.used + self.held + amount <= self.limit:
            return 0.0
        return self.ends - epoch if self.held + amount <= self.limit < self.used + amount else math.inf

    @property
    def left(self) -> int:
        """What is neither used nor held."""
        return self.limit - self.used - self.held

    def reset(self, epoch: float) -> int:
        """Whole seconds until the next period."""
        return math.ceil(self.ends - epoch)


class Budget:
    """The limits of one scope: of a key over all models, or over those of one glob. None: no such limit.

    Other limits are another Budget, with the same windows where they go on: a request in flight gives back where it
    held.
    """

    __slots__ = ("quotas", "requests", "scope", "seconds", "tokens")

    def __init__(
        self, requests: Window | None, tokens: Window | None, quotas: Sequence[Quota] = (), scope: str = ""
    ) -> None:
        """`scope`: the glob, "" over all models."""
        self.requests = requests
        self.tokens = tokens
        self.quotas = tuple(quotas)
        self.scope = scope
        self.seconds = _SHORTEST_SECONDS  # mean duration of its requests

    def ratios(self, now: float, epoch: float) -> list[tuple[LimitName, float]]:
        """How much of each limit is used and held: 1 is all, more where an output was longer than guessed."""
        _advance((self,), now, epoch)
        return [(name, (one.used + one.held) / one.limit) for name, one in _meters(self)]


class Granted:
    """A request that was let in, until it is settled."""

    __slots__ = ("at", "budgets", "tokens")

    def __init__(self, budgets: Sequence[Budget], tokens: int, at: float) -> None:
        """`tokens`: what it holds in each of the budgets; `at`: monotonic seconds."""
        self.budgets = budgets
        self.tokens = tokens
        self.at = at


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that was not let in, by the limit for which it would wait longest."""

    limit: LimitName
    scope: str  # the glob whose limit it is; "": the key's over all models
    wait: float  # seconds, whole milliseconds; inf: it never fits
    message: str

    @property
    def code(self) -> Literal["rate_limit_exceeded", "insufficient_quota"]:
        """As clients know it."""
        return "rate_limit_exceeded" if self.limit.endswith("_minute") else "insufficient_quota"

    @property
    def type(self) -> Literal["requests", "tokens", "insufficient_quota"]:
        """As OpenAI's errors have it."""
        if self.limit == "requests_per_minute":
            return "requests"
        return "tokens" if self.limit == "tokens_per_minute" else "insufficient_quota"

    @property
    def lines(self) -> bytes:
        """Header lines: when to come again, and whether that is worth it."""
        again = b"" if self.wait <= NOT_AGAIN_SECONDS else b"x-should-retry: false\r\n"
        if self.wait == math.inf:
            return again
        return b"Retry-After: %d\r\nretry-after-ms: %d\r\n" % (math.ceil(self.wait), round(self.wait * 1000)) + again


def admit(
    budgets: Sequence[Budget], prompt: int, output: int, now: float, epoch: float, *, bounded: bool
) -> Granted | Refused:
    """Let a request in, by all budgets or by none, in one step.

    `prompt`: its tokens, as estimated; `output`: the most that it may be answered (`bounded`), else a guess, of which
    no more is held than is left. Both 0: a request without tokens.
    """
    tokens = prompt + output
    left = _left(budgets, int(now), epoch)
    if left < tokens:
        least = tokens if bounded else prompt + min(output, 1)
        if left < least:
            return _refused(budgets, least, now, epoch)
        tokens = left
    for budget in budgets:
        if (window := budget.requests) is not None:
            window.charge(1)
        if (window := budget.tokens) is not None:
            window.held += tokens
        for quota in budget.quotas:
            quota.held += tokens
    return Granted(budgets, tokens, now)


def _left(budgets: Sequence[Budget], slot: int, epoch: float) -> int:
    """Tokens that one more request may hold; below 0: there may be none."""
    least = _NO_LIMIT
    for budget in budgets:
        if (window := budget.requests) is not None:
            if window.slot < slot:
                window.advance(slot)
            if window.used >= window.limit:
                least = -1
        if (window := budget.tokens) is not None:
            if window.slot < slot:
                window.advance(slot)
            least = min(least, window.limit - window.used - window.held)
        for quota in budget.quotas:
            if not quota.begins <= epoch < quota.ends:
                quota.roll(epoch)
            least = min(least, quota.limit - quota.used - quota.held)
    return least


def settle(granted: Granted, used: int, now: float, epoch: float) -> None:
    """Give back what a request held, and charge the tokens that it used. Once more: nothing."""
    budgets, granted.budgets = granted.budgets, ()
    held, slot, seconds = granted.tokens, int(now), now - granted.at
    for budget in budgets:
        budget.seconds += _LEARNED * (seconds - budget.seconds)
        if (window := budget.tokens) is not None:
            if window.slot < slot:
                window.advance(slot)
            window.held -= held
            if used:
                window.charge(used)
        for quota in budget.quotas:
            if not quota.begins <= epoch < quota.ends:
                quota.roll(epoch)
            quota.held -= held
            quota.used += used


def openai_lines(budgets: Sequence[Budget], now: float, epoch: float) -> bytes:
    """Header lines `x-ratelimit-*`: of requests and of tokens, where those are limited, what is tightest."""
    requests, tokens = _tightest(budgets, now, epoch)
    if requests is None:
        return b"" if tokens is None else _OPENAI_TOKENS % _shown(tokens, epoch)
    if tokens is None:
        return _OPENAI_REQUESTS % _shown(requests, epoch)
    return _OPENAI % (*_shown(requests, epoch), *_shown(tokens, epoch))


def anthropic_lines(budgets: Sequence[Budget], now: float, epoch: float) -> bytes:
    """Header lines `anthropic-ratelimit-*`: as `openai_lines`."""
    lines = b""
    for kind, meter in zip((b"requests", b"tokens"), _tightest(budgets, now, epoch), strict=True):
        if meter is not None:
            limit, left, seconds = _shown(meter, epoch)
            at = show_time(int(epoch) + seconds).encode()
            lines += _ANTHROPIC % (kind, limit, kind, left, kind, at)
    return lines


_OPENAI_REQUESTS = (
    b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\nx-ratelimit-reset-requests: %ds\r\n"
)
_OPENAI_TOKENS = _OPENAI_REQUESTS.replace(b"-requests", b"-tokens")
_OPENAI = _OPENAI_REQUESTS + _OPENAI_TOKENS
_ANTHROPIC = (
    b"anthropic-ratelimit-%s-limit: %d\r\nanthropic-ratelimit-%s-remaining: %d\r\nanthropic-ratelimit-%s-reset: %s\r\n"
)

type _Meter = Window | Quota


def _tightest(budgets: Sequence[Budget], now: float, epoch: float) -> tuple[Window | None, _Meter | None]:
    """Of requests, and of tokens: where the least is left."""
    _advance(budgets, now, epoch)
    requests: Window | None = None
    tokens: _Meter | None = None
    for budget in budgets:
        if (window := budget.requests) is not None and (requests is None or window.left < requests.left):
            requests = window
        if (window := budget.tokens) is not None and (tokens is None or window.left < tokens.left):
            tokens = window
        for quota in budget.quotas:
            if tokens is None or quota.left < tokens.left:
                tokens = quota
    return requests, tokens


def _shown(meter: _Meter, epoch: float) -> tuple[int, int, int]:
    """The limit, what is left of it, and seconds until all of it is."""
    return meter.limit, max(meter.left, 0), meter.reset(epoch)


def _advance(budgets: Sequence[Budget], now: float, epoch: float) -> None:
    slot = int(now)
    for budget in budgets:
        for window in (budget.requests, budget.tokens):
            if window is not None and window.slot < slot:
                window.advance(slot)
        for quota in budget.quotas:
            if not quota.begins <= epoch < quota.ends:
                quota.roll(epoch)


def _meters(budget: Budget) -> list[tuple[LimitName, _Meter]]:
    """All limits of a scope, by their names."""
    found: list[tuple[LimitName, _Meter]] = []
    if budget.requests is not None:
        found.append(("requests_per_minute", budget.requests))
    if budget.tokens is not None:
        found.append(("tokens_per_minute", budget.tokens))
    return found + [("tokens_per_day" if one.period == "day" else "tokens_per_month", one) for one in budget.quotas]


def _refused(budgets: Sequence[Budget], tokens: int, now: float, epoch: float) -> Refused:
    """By the limit for which it would wait longest. `tokens`: what has to fit."""
    found = []
    for budget in budgets:
        for name, meter in _meters(budget):
            wanted = 1 if name == "requests_per_minute" else tokens
            wait = meter.wait(wanted, now if isinstance(meter, Window) else epoch)
            found.append(_of_limit(budget, name, meter, wanted, wait))
    return max(found, key=lambda refused: refused.wait)


def _of_limit(budget: Budget, name: LimitName, meter: _Meter, wanted: int, wait: float) -> Refused:
    """What one limit says: how long it would wait for that one, and why."""
    what, _, period = name.partition("_per_")
    words = f"{meter.used + meter.held} {what} a {period} are used, {wanted} wanted"
    if wanted > meter.limit:
        wait, words = math.inf, f"{wanted} {what} wanted, and {meter.limit} a {period} are all there may be"
    elif wait == math.inf:
        wait = min(max(budget.seconds, _SHORTEST_SECONDS), _LONGEST_SECONDS)
        words += ", free when requests in flight have ended"
    elif isinstance(meter, Window):
        words += f", free in {wait:.1f} s"
    else:
        words += f", free at {show_time(meter.ends)}"
    of = f" of {budget.scope}" if budget.scope else ""
    in_millis = wait if wait == math.inf else math.ceil(wait * 1000) / 1000
    return Refused(name, budget.scope, in_millis, f"cannot take this{of}: {words}")


def _period(period: Period, epoch: float) -> tuple[float, float]:
    """From when to when it counts as the same period, in UTC."""
    if period == "day":
        start = epoch // _DAY_SECONDS * _DAY_SECONDS
        return start - _STEP_SECONDS, start + _DAY_SECONDS
    moment = datetime.fromtimestamp(epoch, UTC)
    months = moment.year * 12 + moment.month  # the next one's, from 0
    start, end = (datetime(at // 12, at % 12 + 1, 1, tzinfo=UTC).timestamp() for at in (months - 1, months))
    return start - _STEP_SECONDS, end
