"""What one key has used and holds of its limits, by its name: configurations come and go, what was used counts on.

The limits are those of `domain/limits.py`, each with a meter of `domain/window.py`. A key has one scope over all
models, and one for each model that an entry of its `limits` matches.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from vllm_proxy.domain.keys import Key
from vllm_proxy.domain.limits import Rate
from vllm_proxy.domain.window import Budget, LimitName, Quota, Window

_NO_RATE = Rate()


class Account:
    """Of one key."""

    def __init__(self, key: Key, spent: tuple[int, int], now: float, epoch: float) -> None:
        """`spent`: tokens of this day and of this month so far. `now`: monotonic seconds; `epoch`: since 1970."""
        self.in_flight = 0  # requests that hold an endpoint
        self.waiting: Counter[str] = Counter()  # requests that wait for one, by model
        self._day = Quota("day", 0, spent[0], epoch)
        self._month = Quota("month", 0, spent[1], epoch)
        self._unlimited: tuple[Quota, ...] = ()  # counted all the same: a limit may come
        self._own = Budget(None, None)
        self._of_model: dict[str, tuple[Budget, ...]] = {}  # all that count for it
        self.adopt(key, now)

    def adopt(self, key: Key, now: float) -> None:
        """Follow the file. A request in flight gives back where it held."""
        self.key, self.limits, self._now = key, key.limits, now
        self._day.limit, self._month.limit = key.limits.tokens_per_day, key.limits.tokens_per_month
        quotas = self._day, self._month
        self._unlimited = tuple(quota for quota in quotas if not quota.limit)
        self._own = _following(self._own, key.limits.rate, now, [quota for quota in quotas if quota.limit])
        before, self._of_model = self._of_model, {}
        for model, budgets in before.items():
            self._find(model, now, budgets[1] if len(budgets) > 1 else None)

    @property
    def is_full(self) -> bool:
        """Whether it has as much in flight as it may."""
        most = self.limits.max_in_flight
        return most > 0 and self.in_flight >= most

    def budgets(self, model: str, now: float) -> Sequence[Budget]:
        """All that count for a request to a model; none: nothing limits it."""
        found = self._of_model.get(model)
        return self._find(model, now, None) if found is None else found

    def charge_unlimited(self, tokens: int, epoch: float) -> None:
        """Count tokens for the day and the month where these have no limit."""
        for quota in self._unlimited:
            if not quota.begins <= epoch < quota.ends:
                quota.roll(epoch)
            quota.used += tokens

    def ratios(self, now: float, epoch: float) -> Iterator[tuple[LimitName, float]]:
        """How much of its limits over all models is used and held, from 0 to 1."""
        yield from self._own.ratios(now, epoch)

    def _find(self, model: str, now: float, before: Budget | None) -> tuple[Budget, ...]:
        rate = self.limits.of_model(model) or _NO_RATE
        scopes = [self._own, _following(before or Budget(None, None, scope=model), rate, now, ())]
        found = tuple(one for one in scopes if one.requests or one.tokens or one.quotas)
        if len(found) == 1 and found[0] is not self._own:
            found = self._own, found[0]  # the one of the model stands behind it, as it is looked for
        self._of_model[model] = found
        return found


def _following(before: Budget, rate: Rate, now: float, quotas: Sequence[Quota]) -> Budget:
    """A budget for other limits, with the windows that there were."""
    after = Budget(
        _window(before.requests, rate.requests_per_minute, now),
        _window(before.tokens, rate.tokens_per_minute, now),
        quotas,
        before.scope,
    )
    after.seconds = before.seconds
    return after


def _window(before: Window | None, limit: int, now: float) -> Window | None:
    if not limit:
        return None
    found = before or Window(limit, now)
    found.limit = limit
    return found
