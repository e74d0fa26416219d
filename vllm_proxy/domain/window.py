"""Counts what keys use of their limits: lets a request in or refuses it, charges what it used, says what is left.

A limit of a minute is exact, and no bucket, which would let two minutes' worth through in one: a ring of 61 one-second
slots, and what requests in flight hold. `used + held <= limit` is kept at all times where the outputs are bounded. A
request is let in by all of its limits or charged to none. Time is passed in: `now` is monotonic seconds, `epoch` is
seconds since 1970, for days and months of UTC.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

from vllm_proxy.domain.limits import Rate
from vllm_proxy.domain.units import show_time
from vllm_proxy.domain.usage import DAY, month_end, month_start

type LimitName = Literal["requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_per_month"]
type Period = Literal["day", "month"]

SLOTS = 61  # 60 whole seconds and the one that has begun
_NO_LIMIT = 2**60  # in its place; more than any limit of a file
_OF_REQUESTS = (
    b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %%d\r\nx-ratelimit-reset-requests: %%ds\r\n"
)
_OF_TOKENS = _OF_REQUESTS.replace(b"-requests", b"-tokens")
_STEP_SECONDS = 3600  # so far back the clock may be set without a new period
_LEARNED = 0.125  # what the duration of one more request counts for the mean
_SHORTEST_SECONDS, _LONGEST_SECONDS = 1.0, 60.0  # waits for requests in flight, whose ends nobody knows


class Use(NamedTuple):
    """What is used of one limit."""

    name: LimitName
    scope: str  # the model; "": over all of them
    limit: int
    used: int
    held: int  # by requests in flight


class Window:
    """Requests and tokens of one scope in the last 60 seconds, by the second, and tokens that are held."""

    __slots__ = (
        *("last_request", "last_token", "left_requests", "left_tokens", "limit_requests", "limit_tokens"),
        *("request_lines", "requests", "scope", "slot", "token_lines", "tokens", "used_tokens"),
    )

    def __init__(self, rate: Rate, now: float, scope: str = "") -> None:
        """`scope`: the model, "" over all of them."""
        self.scope = scope
        self.slot = int(now)
        self.requests = [0] * SLOTS
        self.tokens = [0] * SLOTS
        self.limit_requests = self.left_requests = rate.requests_per_minute or _NO_LIMIT
        self.limit_tokens = self.left_tokens = rate.tokens_per_minute or _NO_LIMIT  # left: neither used nor held
        self.request_lines, self.token_lines = _OF_REQUESTS % self.limit_requests, _OF_TOKENS % self.limit_tokens
        self.used_tokens = 0
        self.last_request = self.last_token = self.slot  # when something was charged

    def change(self, rate: Rate) -> None:
        """Other limits: what is used and held stays so."""
        requests, tokens = rate.requests_per_minute or _NO_LIMIT, rate.tokens_per_minute or _NO_LIMIT
        self.left_requests += requests - self.limit_requests
        self.left_tokens += tokens - self.limit_tokens
        self.limit_requests, self.limit_tokens = requests, tokens
        self.request_lines, self.token_lines = _OF_REQUESTS % requests, _OF_TOKENS % tokens

    def advance(self, slot: int) -> None:
        """Forget what is older than 60 seconds. `slot`: the second that it is, later than `self.slot`."""
        requests, tokens = self.requests, self.tokens
        for second in range(self.slot + 1, min(slot, self.slot + SLOTS) + 1):
            at = second % SLOTS
            if requests[at]:
                self.left_requests += requests[at]
                requests[at] = 0
            if tokens[at]:
                self.left_tokens += tokens[at]
                self.used_tokens -= tokens[at]
                tokens[at] = 0
        self.slot = slot

    def is_empty(self, now: float) -> bool:
        """Whether nothing is held, and nothing was used in the last minute."""
        if self.slot < int(now):
            self.advance(int(now))
        return self.left_requests == self.limit_requests and self.left_tokens == self.limit_tokens

    def uses(self) -> list[Use]:
        """Of each of its limits. `advance` first."""
        found = []
        if (limit := self.limit_requests) < _NO_LIMIT:
            found.append(Use("requests_per_minute", self.scope, limit, limit - self.left_requests, 0))
        if (limit := self.limit_tokens) < _NO_LIMIT:
            held = limit - self.used_tokens - self.left_tokens
            found.append(Use("tokens_per_minute", self.scope, limit, self.used_tokens, held))
        return found

    def wait(self, use: Use, wanted: int, now: float) -> float:
        """Seconds until so much more fits, if nothing else happens; inf: not before requests in flight have ended."""
        excess = use.used + use.held + wanted - use.limit
        ring = self.requests if use.name == "requests_per_minute" else self.tokens
        if excess <= 0:
            return 0.0
        for second in range(self.slot - SLOTS + 1, self.slot + 1):
            excess -= ring[second % SLOTS]
            if excess <= 0:
                return second + SLOTS - now
        return math.inf


class Quota:
    """Tokens of a key on this day or in this month of UTC, and those that are held."""

    __slots__ = ("_spent", "begins", "ends", "left_tokens", "limit_tokens", "period", "token_lines", "used_tokens")

    def __init__(self, period: Period, limit: int, spent: Callable[[], int], epoch: float) -> None:
        """`spent`: tokens of the period that it is, so far, from the ledger."""
        self.period = period
        self.limit_tokens = limit
        self.token_lines = _OF_TOKENS % limit
        self._spent = spent
        self.used_tokens = spent()
        self.left_tokens = limit - self.used_tokens  # neither used nor held
        self.begins, self.ends = _period(period, epoch)

    def change(self, limit: int) -> None:
        """Another limit: what is used and held stays so."""
        self.left_tokens += limit - self.limit_tokens
        self.limit_tokens = limit
        self.token_lines = _OF_TOKENS % limit

    def roll(self, epoch: float) -> None:
        """Another period has begun; or an earlier one goes on, as the clock was wrong, with what was used in it."""
        used = self._spent()
        self.left_tokens += self.used_tokens - used
        self.used_tokens = used
        self.begins, self.ends = _period(self.period, epoch)

    def use(self) -> Use:
        """Of its limit. `roll` first, where that is due."""
        name: LimitName = "tokens_per_day" if self.period == "day" else "tokens_per_month"
        return Use(
            name, "", self.limit_tokens, self.used_tokens, self.limit_tokens - self.used_tokens - self.left_tokens
        )

    def wait(self, wanted: int, epoch: float) -> float:
        """Seconds until so much more fits, if nothing else happens; inf: not before requests in flight have ended."""
        if wanted <= self.left_tokens:
            return 0.0
        is_used_up = self.limit_tokens - self.used_tokens < wanted <= self.left_tokens + self.used_tokens
        return self.ends - epoch if is_used_up else math.inf


class Budgets:
    """The limits that one request has to meet: made once for each key and model.

    Where limits come or go others are made, of the same windows and quotas where those go on: a request in flight gives
    back where it held.
    """

    __slots__ = ("is_any", "quotas", "seconds", "windows")

    def __init__(self, windows: Sequence[Window] = (), quotas: Sequence[Quota] = ()) -> None:
        self.windows = tuple(windows)
        self.quotas = tuple(quotas)
        self.is_any = bool(windows or quotas)  # else nothing is refused, and no header says what is left
        self.seconds = _SHORTEST_SECONDS  # mean duration of the requests

    def uses(self, now: float, epoch: float) -> list[Use]:
        """Of all the limits."""
        _advance(self, int(now), epoch)
        return [use for window in self.windows for use in window.uses()] + [quota.use() for quota in self.quotas]


class Granted(msgspec.Struct, gc=False):  # made in half of the time that a class of Python takes
    """A request that was let in, until it is settled."""

    budgets: Budgets | None  # None: it is settled
    tokens: int  # what it holds of each limit
    at: float  # monotonic seconds


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that was not let in, by the limit for which it would wait longest."""

    limit: LimitName
    scope: str  # the model whose limit it is; "": the key's over all models
    wait: float  # seconds, whole milliseconds; inf: it never fits
    message: str
    passes: bool = False  # with requests in flight alone

    @property
    def code(self) -> Literal["rate_limit_exceeded", "insufficient_quota"]:
        """As clients know it: a quota that is not used up, but held, is none to despair of."""
        is_rate = self.passes or self.limit.endswith("_minute")
        return "rate_limit_exceeded" if is_rate else "insufficient_quota"

    @property
    def type(self) -> Literal["requests", "tokens", "insufficient_quota"]:
        """As OpenAI's errors have it."""
        if self.limit == "requests_per_minute":
            return "requests"
        return "tokens" if self.code == "rate_limit_exceeded" else "insufficient_quota"


def admit(budgets: Budgets, prompt: int, output: int, now: float, epoch: float, *, bounded: bool) -> Granted | Refused:
    """Let a request in, by all limits or by none, in one step.

    `prompt`: its tokens, as estimated; `output`: the most that it may be answered (`bounded`), else a guess, of which
    no more is held than is left. Both 0: a request without tokens.
    """
    tokens = left = prompt + output
    slot, at = int(now), int(now) % SLOTS
    for window in budgets.windows:
        if window.slot < slot:
            window.advance(slot)
        if window.left_tokens < left or window.left_requests <= 0:
            left = min(window.left_tokens, left) if window.left_requests > 0 else _NONE
    if budgets.quotas:
        left = _left_of_quotas(budgets, left, epoch)
    if left < tokens:
        least = tokens if bounded else prompt + min(output, 1)
        if left < least:
            return _refused(budgets, least, now, epoch)
        tokens = left
    for window in budgets.windows:
        window.left_requests -= 1
        window.requests[at] += 1
        window.last_request = slot
        window.left_tokens -= tokens
    for quota in budgets.quotas:
        quota.left_tokens -= tokens
    return Granted(budgets, tokens, now)


_NONE = -_NO_LIMIT


def _left_of_quotas(budgets: Budgets, tokens: int, epoch: float) -> int:
    for quota in budgets.quotas:
        if not quota.begins <= epoch < quota.ends:
            quota.roll(epoch)
        tokens = min(tokens, quota.left_tokens)
    return tokens


def settle(granted: Granted, used: int, now: float, epoch: float) -> None:
    """Give back what a request held, and charge the tokens that it used. Once more: nothing.

    To be called before the ledger has them: a quota whose period begins here asks it for all the others.
    """
    budgets = granted.budgets
    if budgets is None:
        return
    granted.budgets = None
    slot, at, freed = int(now), int(now) % SLOTS, granted.tokens - used
    budgets.seconds += _LEARNED * (now - granted.at - budgets.seconds)
    for window in budgets.windows:
        if window.slot < slot:
            window.advance(slot)
        window.left_tokens += freed
        window.used_tokens += used
        window.tokens[at] += used
        window.last_token = slot
    for quota in budgets.quotas:
        if not quota.begins <= epoch < quota.ends:
            quota.roll(epoch)
        quota.left_tokens += freed
        quota.used_tokens += used


def charge(budgets: Budgets, settled: Budgets | None, used: int, now: float, epoch: float) -> None:
    """Charge the tokens of a request to limits that came while it ran: to all but those that it was `settled` with."""
    before = Budgets() if settled is None else settled
    windows = [window for window in budgets.windows if window not in before.windows]
    quotas = [quota for quota in budgets.quotas if quota not in before.quotas]
    settle(Granted(Budgets(windows, quotas), 0, now), used, now, epoch)


def openai_lines(budgets: Budgets, now: float, epoch: float) -> bytes:
    """Header lines `x-ratelimit-*`: of requests and of tokens, where those are limited, what is tightest."""
    requests, tokens = _tightest(budgets, int(now), epoch)
    lines = b"" if requests is None else requests.request_lines % _of_requests(requests)
    return lines if tokens is None else lines + tokens.token_lines % _of_tokens(tokens, epoch)


def anthropic_lines(budgets: Budgets, now: float, epoch: float) -> bytes:
    """Header lines `anthropic-ratelimit-*`: as `openai_lines`."""
    requests, tokens = _tightest(budgets, int(now), epoch)
    lines = b""
    if requests is not None:
        left, seconds = _of_requests(requests)
        lines = _ANTHROPIC_REQUESTS % (requests.limit_requests, left, _time(int(epoch) + seconds))
    if tokens is not None:
        left, seconds = _of_tokens(tokens, epoch)
        lines += _ANTHROPIC_TOKENS % (tokens.limit_tokens, left, _time(int(epoch) + seconds))
    return lines


_ANTHROPIC_REQUESTS = (
    b"anthropic-ratelimit-requests-limit: %d\r\nanthropic-ratelimit-requests-remaining: %d\r\n"
    b"anthropic-ratelimit-requests-reset: %s\r\n"
)
_ANTHROPIC_TOKENS = _ANTHROPIC_REQUESTS.replace(b"-requests", b"-tokens")


@lru_cache(maxsize=256)
def _time(second: int) -> bytes:
    return show_time(second).encode()


def _tightest(budgets: Budgets, slot: int, epoch: float) -> tuple[Window | None, Window | Quota | None]:
    """Of requests, and of tokens: where the least is left."""
    requests: Window | None = None
    tokens: Window | Quota | None = None
    fewest = least = _HARDLY
    for window in budgets.windows:
        if window.slot < slot:
            window.advance(slot)
        if window.left_requests < fewest:
            requests, fewest = window, window.left_requests
        if window.left_tokens < least:
            tokens, least = window, window.left_tokens
    if budgets.quotas:
        _advance(budgets, slot, epoch)
        quota = min(budgets.quotas, key=lambda one: one.left_tokens)
        if quota.left_tokens < least:
            tokens = quota
    return requests, tokens


def _of_requests(window: Window) -> tuple[int, int]:
    """What is left, and whole seconds until all of it is."""
    left = window.left_requests
    return left, 0 if left == window.limit_requests else window.last_request + SLOTS - window.slot


def _of_tokens(meter: Window | Quota, epoch: float) -> tuple[int, int]:
    """As above; what is held counts as if it were used now."""
    left = meter.left_tokens
    shown = left if left > 0 else 0  # noqa: FURB136 - max() takes 0.1 us
    if type(meter) is Quota:
        return shown, math.ceil(meter.ends - epoch)
    assert type(meter) is Window
    if left + meter.used_tokens < meter.limit_tokens:
        return shown, SLOTS
    return shown, 0 if left == meter.limit_tokens else meter.last_token + SLOTS - meter.slot


_HARDLY = _NO_LIMIT // 2  # less is left only where there is a limit


def _advance(budgets: Budgets, slot: int, epoch: float) -> None:
    for window in budgets.windows:
        if window.slot < slot:
            window.advance(slot)
    _left_of_quotas(budgets, 0, epoch)


def _refused(budgets: Budgets, tokens: int, now: float, epoch: float) -> Refused:
    """By the limit for which it would wait longest. `tokens`: what has to fit."""
    waits: list[tuple[float, Use, int, str]] = []
    for window in budgets.windows:
        for use in window.uses():
            wanted = 1 if use.name == "requests_per_minute" else tokens
            waits.append((window.wait(use, wanted, now), use, wanted, ""))
    waits += [(one.wait(tokens, epoch), one.use(), tokens, show_time(one.ends)) for one in budgets.quotas]
    in_flight = min(max(budgets.seconds, _SHORTEST_SECONDS), _LONGEST_SECONDS)
    return _of_limit(
        *max(waits, key=lambda one: one[0] if one[0] < math.inf or one[2] > one[1].limit else in_flight), in_flight
    )


def _of_limit(wait: float, use: Use, wanted: int, ends: str, in_flight: float) -> Refused:
    """What a limit says. `ends`: when its period does; `in_flight`: seconds that requests in flight may take."""
    what, _, period = use.name.partition("_per_")
    of = f" of {use.scope}" if use.scope else ""
    if wanted > use.limit:
        why = f"{wanted} {what} wanted, and {use.limit} a {period} are all there may be"
        return Refused(use.name, use.scope, math.inf, f"cannot take this{of}: {why}")
    passes = wait == math.inf
    if passes:
        wait, free = in_flight, "when requests in flight have ended"
    else:
        free = f"at {ends}" if ends else f"in {wait:.1f} s"
    why = f"{use.used + use.held} {what} a {period} are used, {wanted} wanted, free {free}"
    return Refused(use.name, use.scope, math.ceil(wait * 1000) / 1000, f"cannot take this{of}: {why}", passes)


def _period(period: Period, epoch: float) -> tuple[float, float]:
    """From when to when it counts as the same period, in UTC."""
    start = int(epoch) // DAY * DAY if period == "day" else month_start(epoch)
    return start - _STEP_SECONDS, start + DAY if period == "day" else month_end(start)
