"""The series of keys, a part of `/metrics`: what they use, what is refused, how much of their limits is used.

What is counted is asked of its owners when somebody scrapes. Labels are keys and models of the file alone; a daemon
whose callers are not metered has none of these series.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vllm_proxy.api.token_metrics import tokens_family
from vllm_proxy.domain.config import Config
from vllm_proxy.domain.keys import ANONYMOUS
from vllm_proxy.traffic.usage import Usage


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

    def families(self, config: Config) -> Iterator[Metric]:
        """All of them."""
        keys = {*config.keys, ANONYMOUS}
        yield from self._tokens(keys, {*config.ids})
        yield self._requests()
        yield from self._limits(keys)
        failures = CounterMetricFamily(
            "vllm_proxy_auth_failures", "Requests that were not let in, by the code of the error.", labels=["reason"]
        )
        for reason, count in self.auth_failures.items():
            failures.add_metric([reason], count)
        yield failures

    def _tokens(self, keys: set[str], models: set[str]) -> Iterator[Metric]:
        tokens = tokens_family("model", "key", "kind")
        estimated = CounterMetricFamily(
            "vllm_proxy_tokens_estimated",
            "Tokens that were charged to a key and that no engine reported, as of streams that ended early.",
            labels=["model", "key"],
        )
        for (key, model), counts in self.usage.totals(keys, models).items():
            for kind, count in (
                ("prompt", counts.prompt),
                ("completion", counts.completion),
                ("cached", counts.cached),
            ):
                tokens.add_metric([model, key, kind], count)
            estimated.add_metric([model, key], counts.estimated)
        yield from (tokens, estimated)

    def _requests(self) -> Metric:
        requests = CounterMetricFamily(
            "vllm_proxy_key_requests", "Metered requests, by what became of them.", labels=["key", "model", "outcome"]
        )
        for (key, model, outcome), count in self.usage.outcomes.items():
            requests.add_metric([key, model, outcome], count)
        return requests

    def _limits(self, keys: set[str]) -> Iterator[Metric]:
        refused = CounterMetricFamily(
            "vllm_proxy_rate_limited", "Requests that a limit of their key refused.", labels=["key", "limit"]
        )
        for (key, limit), count in self.usage.refusals.items():
            refused.add_metric([key, limit], count)
        busy = GaugeMetricFamily("vllm_proxy_key_in_flight", "Requests of a key in flight.", labels=["key"])
        for key, now in self.in_flight().items():
            if key in keys:
                busy.add_metric([key], now)
        ratio = GaugeMetricFamily(
            "vllm_proxy_limit_used_ratio", "How much of a limit is used, 1 is all of it.", labels=["key", "limit"]
        )
        for (key, limit), used in self.used_ratio().items():
            if key in keys:
                ratio.add_metric([key, limit], used)
        yield from (refused, busy, ratio)
