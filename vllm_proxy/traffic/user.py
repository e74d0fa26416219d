"""What the requests of one key have in common: what is used, in flight, and usually taken."""

from collections import Counter
from collections.abc import Set as AbstractSet

from vllm_proxy.domain.account import Account
from vllm_proxy.domain.keys import Key
from vllm_proxy.domain.limits import Limits
from vllm_proxy.domain.tokens import Estimate

_NO_LIMIT = 2**60


class User:
    """A key and what it uses, by its name: configurations come and go, what was used counts on."""

    __slots__ = ("account", "estimates", "in_flight", "is_limited", "limits", "most_in_flight", "name", "waiting")

    def __init__(self, key: Key, account: Account) -> None:
        self.name = key.name
        self.account = account
        self.estimates: dict[str, Estimate] = {}  # by model
        self.in_flight = 0  # requests that hold an endpoint
        self.waiting: Counter[str] = Counter()  # requests that wait for one, by model
        self.follow(key.limits)

    def follow(self, limits: Limits) -> None:
        """Other limits."""
        self.limits = limits
        self.is_limited = limits.is_limited
        self.most_in_flight = limits.max_in_flight or _NO_LIMIT

    def forget(self, models: AbstractSet[str], now: float) -> None:
        """There are these models; what is known of others goes."""
        for model in self.estimates.keys() - models:
            del self.estimates[model]
        self.account.forget(models, now)

    def is_unused(self, now: float) -> bool:
        """Whether it has no requests, and had none in the last minute that count for a limit."""
        return not self.in_flight and not self.waiting and self.account.is_unused(now)

    def estimate(self, model: str) -> Estimate:
        """What its requests to a model take."""
        found = self.estimates.get(model)
        if found is None:
            found = self.estimates[model] = Estimate()
        return found
