"""The series of tokens that the engines count themselves, for whoever asked, a part of `/metrics`.

They have no label `key`: with one, `vllm_proxy_tokens_total` is what the answers to that caller said. Who adds up a
family takes one of both kinds.
"""

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vllm_proxy.fleet.model import Model


def tokens_family(*labels: str) -> CounterMetricFamily:
    """The one family of tokens, for its samples with these labels: whoever has some says the same of it."""
    return CounterMetricFamily(
        "vllm_proxy_tokens",
        "Tokens: with `key`, as answers to that caller said; without, as the engines count by themselves.",
        labels=labels,
    )


def families(models: Sequence[Model], charged: Mapping[str, int]) -> Iterable[Metric]:
    """All of them; a model whose engines keep no counters, or were not asked yet, has no series.

    `charged`: tokens that callers are charged for, by model, where any are metered.
    """
    tokens = tokens_family("model", "kind")
    rest = GaugeMetricFamily(
        "vllm_proxy_tokens_unattributed",
        "Tokens that the engines have counted and no caller is charged for, since the daemon started.",
        labels=["model"],
    )
    for model in models:
        name, counted = model.spec.id, model.history.tokens
        for kind, count in counted.items():
            tokens.add_metric([name, kind], count)
        mine = [charged[each] for each in (name, *model.spec.adapters) if each in charged]
        if counted and mine:  # its engines count its adapters' as well
            rest.add_metric([name], counted["prompt"] + counted["generation"] - sum(mine))
    return tokens, rest
