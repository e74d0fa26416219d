"""The series of sleep, a part of `/metrics`: how long it took, what failed, and what it costs the machine's memory.

What is now is asked of the instances when somebody scrapes; what became of their sleep is counted in
`fleet/history.py`.
"""

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from vllm_proxy.fleet.model import Model


def families(models: Sequence[Model]) -> Iterable[Metric]:
    """All of them; a model whose engines never slept has no series."""
    sleeps = HistogramMetricFamily(
        "vllm_proxy_sleep_seconds",
        "Falling asleep, from the last request until memory is seen to be back.",
        labels=["model"],
    )
    wakes = HistogramMetricFamily(
        "vllm_proxy_wake_seconds",
        "Waking, from the room that it got until it answers as before.",
        labels=["model", "level"],
    )
    failures = CounterMetricFamily(
        "vllm_proxy_sleep_failures",
        "Engines that were ended since they could not be put to sleep, or started anew since they could not be woken.",
        labels=["model", "operation"],
    )
    held = GaugeMetricFamily(
        "vllm_proxy_host_memory_bytes",
        "Memory of the machine that engines have by sleeping, then or now; a guess until it was measured.",
        labels=["model"],
    )
    for model in models:
        name, history = model.spec.id, model.history
        if sum(history.sleeps.counts):
            sleeps.add_metric([name], history.sleeps.buckets(), history.sleeps.total)
        for level, times in history.wakes.items():
            wakes.add_metric([name, str(level)], times.buckets(), times.total)
        for operation, count in history.sleep_failures.items():
            failures.add_metric([name, operation], count)
        if size := sum(one.claim.host_bytes() for one in model.instances if one.claim is not None):
            held.add_metric([name], size)
    return sleeps, wakes, failures, held
