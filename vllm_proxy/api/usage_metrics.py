"""The series of keys, a part of `/metrics`: what they use, what is refused, how much of their limits is used.

What is counted is asked of its owners when somebody scrapes. Labels are keys and models of the file alone; a daemon
whose callers are not metered has none of these series.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_proxy.api.by_model import Lines
from vllm_proxy.api.token_metrics import TOKENS
from vllm_proxy.domain.config import Config
from vllm_proxy.domain.exposition import Family
from vllm_proxy.domain.keys import ANONYMOUS
from vllm_proxy.traffic.usage import Usage

ESTIMATED = Family(
    "vllm_proxy_tokens_estimated_total",
    "counter",
    "Tokens that were charged to a key and that no engine reported, as of streams that ended early.",
    ("key", "model"),
)
REQUESTS = Family(
    "vllm_proxy_key_requests_total",
    "counter",
    "Metered requests, by what became of them.",
    ("key", "model", "outcome"),
)
REFUSED = Family(
    "vllm_proxy_rate_limited_total", "counter", "Requests that a limit of their key refused.", ("key", "limit")
)
IN_FLIGHT = Family("vllm_proxy_key_in_flight", "gauge", "Requests of a key in flight.", ("key",))
USED_RATIO = Family(
    "vllm_proxy_limit_used_ratio", "gauge", "How much of a limit is used, 1 is all of it.", ("key", "limit")
)
AUTH_FAILURES = Family(
    "vllm_proxy_auth_failures_total",
    "counter",
    "Requests that were not let in, by the code of the error.",
    ("reason",),
)
FAMILIES = (ESTIMATED, REQUESTS, REFUSED, IN_FLIGHT, USED_RATIO, AUTH_FAILURES)


def _none() -> Mapping[str, float]:
    return {}


def _no_limits() -> Mapping[tuple[str, str], float]:
    return {}


@dataclass(slots=True)
class UsageMetrics:
    """Where the numbers are. `auth_failures`: by the code of the error.

    Asked for each time: `in_flight` requests by key, and `used_ratio` from 0 to 1 by key and limit.
    """

    usage: Usage
    auth_failures: Mapping[str, int]
    in_flight: Callable[[], Mapping[str, float]] = _none
    used_ratio: Callable[[], Mapping[tuple[str, str], float]] = _no_limits

    def lines(self, config: Config) -> Lines:
        """All of them."""
        keys = {*config.keys, ANONYMOUS}
        yield from self._tokens(keys, {*config.ids})
        for (key, model, outcome), count in list(self.usage.outcomes.items()):
            yield REQUESTS, REQUESTS.line(count, key, model, outcome)
        yield from self._limits(keys)
        for reason, count in list(self.auth_failures.items()):
            yield AUTH_FAILURES, AUTH_FAILURES.line(count, reason)

    def _tokens(self, keys: set[str], models: set[str]) -> Lines:
        for (key, model), counts in self.usage.totals(keys, models).items():
            for kind, count in (
                ("prompt", counts.prompt),
                ("completion", counts.completion),
                ("cached", counts.cached),
            ):
                yield TOKENS, TOKENS.line(count, key, kind, model)
            yield ESTIMATED, ESTIMATED.line(counts.estimated, key, model)

    def _limits(self, keys: set[str]) -> Lines:
        for (key, limit), count in list(self.usage.refusals.items()):
            yield REFUSED, REFUSED.line(count, key, limit)
        for key, now in self.in_flight().items():
            if key in keys:
                yield IN_FLIGHT, IN_FLIGHT.line(now, key)
        for (key, limit), used in self.used_ratio().items():
            if key in keys:
                yield USED_RATIO, USED_RATIO.line(used, key, limit)
