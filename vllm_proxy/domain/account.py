"""What one key uses of its limits: its windows and quotas, and which of them a request for a model has to meet.

They go on under the key's name when its limits change: what was used stays used, and what is held is given back.
"""

from dataclasses import dataclass

from vllm_proxy.domain.limits import Limits, Rate
from vllm_proxy.domain.window import Budgets, Period, Quota, Window


@dataclass(frozen=True, slots=True)
class Spent:
    """Tokens of a key in this period of UTC so far, by the ledger."""

    day: int = 0
    month: int = 0


class Account:
    """Of one key."""

    def __init__(self, limits: Limits, spent: Spent, now: float, epoch: float) -> None:
        self._windows: dict[str, Window] = {}  # by glob; "": over all models
        self._quotas: dict[Period, Quota] = {}
        self._limits = limits
        self._by_model: dict[str, Budgets] = {}
        self.change(limits, spent, now, epoch)

    def change(self, limits: Limits, spent: Spent, now: float, epoch: float) -> None:
        """Other limits. `spent`: where a quota begins that was none before."""
        self._limits = limits
        self._by_model.clear()
        rates = {"": limits.rate, **dict(limits.models)}
        self._windows = {scope: self._window(scope, rate, now) for scope, rate in rates.items() if rate.is_limited}
        quotas: dict[Period, tuple[int, int]] = {
            "day": (limits.tokens_per_day, spent.day),
            "month": (limits.tokens_per_month, spent.month),
        }
        self._quotas = {
            period: self._quota(period, limit, used, epoch) for period, (limit, used) in quotas.items() if limit
        }

    def _window(self, scope: str, rate: Rate, now: float) -> Window:
        window = self._windows.get(scope)
        if window is None:
            return Window(rate, now, scope)
        window.change(rate)
        return window

    def _quota(self, period: Period, limit: int, used: int, epoch: float) -> Quota:
        quota = self._quotas.get(period)
        if quota is None:
            return Quota(period, limit, used, epoch)
        quota.change(limit)
        return quota

    def of(self, model_id: str) -> Budgets:
        """What a request for a model has to meet: the key's own limits, and those of its glob."""
        found = self._by_model.get(model_id)
        if found is None:  # of models that there are, so there are not many
            glob = self._limits.glob_of(model_id)
            windows = [self._windows[scope] for scope in ("", glob) if scope in self._windows]
            found = self._by_model[model_id] = Budgets(windows, list(self._quotas.values()))
        return found

    def all(self) -> Budgets:
        """All of its limits, for what is shown of them."""
        return Budgets(list(self._windows.values()), list(self._quotas.values()))
