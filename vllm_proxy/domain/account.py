"""What one key uses of its limits: its windows and quotas, and which of them a request for a model has to meet.

A key has one window over all models, and one for each model that an entry of its `limits` matches. They go on under the
key's name when its limits change: what was used stays used, and what is held is given back.
"""

from collections.abc import Callable, Container

from vllm_proxy.domain.limits import Limits, Rate
from vllm_proxy.domain.usage import Spent
from vllm_proxy.domain.window import Budgets, Period, Quota, Window

_NO_RATE = Rate()


class Account:
    """Of one key."""

    def __init__(self, limits: Limits, spent: Callable[[], Spent], epoch: float) -> None:
        self._windows: dict[str, Window] = {}  # by model; "": over all of them; those without a limit now, too
        self._quotas: dict[Period, Quota] = {}
        self._limits = limits
        self._by_model: dict[str, Budgets] = {}
        self.change(limits, spent, epoch)

    def change(self, limits: Limits, spent: Callable[[], Spent], epoch: float) -> None:
        """Other limits. `spent`: where a quota begins that was none before, and with each period."""
        self._limits = limits
        self._by_model.clear()
        for model, window in self._windows.items():
            window.change(self._rate(model))
        quotas: dict[Period, int] = {"day": limits.tokens_per_day, "month": limits.tokens_per_month}
        self._quotas = {period: self._quota(period, limit, spent, epoch) for period, limit in quotas.items() if limit}

    def forget(self, models: Container[str], now: float) -> None:
        """There are these models: windows of others go once there is nothing in them."""
        for model in [model for model in self._windows if model and model not in models]:
            if self._windows[model].is_empty(now):
                del self._windows[model]
        self._by_model.clear()

    def is_unused(self, now: float) -> bool:
        """Whether nothing is held, and nothing was used in the last minute."""
        return all(window.is_empty(now) for window in self._windows.values())

    def _rate(self, model: str) -> Rate:
        return self._limits.of_model(model) or _NO_RATE if model else self._limits.rate

    def _quota(self, period: Period, limit: int, spent: Callable[[], Spent], epoch: float) -> Quota:
        quota = self._quotas.get(period)
        if quota is None:
            return Quota(period, limit, lambda: getattr(spent(), period), epoch)
        quota.change(limit)
        return quota

    def of(self, model: str, now: float) -> Budgets:
        """What a request for a model has to meet: the limits of the key, and those for the model."""
        found = self._by_model.get(model)
        if found is None:  # of models that there are, so there are not many
            scopes = dict.fromkeys(("", model))  # of a request without a model it is one
            windows = [window for scope in scopes if (window := self._window(scope, now)) is not None]
            found = self._by_model[model] = Budgets(windows, list(self._quotas.values()))
        return found

    def _window(self, model: str, now: float) -> Window | None:
        rate = self._rate(model)
        if not rate.is_limited:
            return None
        found = self._windows.get(model)
        if found is None:
            found = self._windows[model] = Window(rate, now, model)
        return found

    def all(self) -> Budgets:
        """All of its limits that a request has met so far, for what is shown of them."""
        return Budgets(list(self._windows.values()), list(self._quotas.values()))
