"""`/metrics`: counts what became of requests, and renders all series for Prometheus.

Labels are configured names only, so no client can create a series. Counting must cost next to nothing: plain numbers
are kept, and prometheus-client makes text of them when somebody scrapes, a model at a time, yielding to the event loop
in between. docs/metrics.md lists the series.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_proxy.api import room_metrics, sleep_metrics, token_metrics
from vllm_proxy.api.usage_metrics import UsageMetrics
from vllm_proxy.domain.histogram import Histogram
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.runtime.turns import LoopLag, in_turns
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.registry import Registry

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_SMALL_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0)


@dataclass(slots=True)
class Counts:
    """What was counted for one model."""

    requests: dict[tuple[str, int], int] = field(default_factory=dict)  # by route and status
    times: dict[str, tuple[Histogram, Histogram]] = field(default_factory=dict)  # by route: whole, to the first byte
    queue: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    retries: int = 0


class Metrics:
    """All series, as docs/metrics.md describes them."""

    def __init__(
        self,
        reconciler: Reconciler,
        registry: Registry,
        reloads: Mapping[str, int],
        lag: LoopLag,
        log: LogWriter,
        *,
        usage: UsageMetrics,
        front: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        """`reloads`: looks at the configuration file, by result. `front`: clients, and bytes of bodies, now."""
        self._front = front
        self._reconciler = reconciler
        self._registry = registry
        self._reloads = reloads
        self._models: dict[str, Counts] = {}
        self._overhead = Histogram(_SMALL_SECONDS)
        self._lag = lag
        self._log = log
        self._usage = usage

    def count(self, call: Call) -> None:
        """One request has ended."""
        now = call.ended_at
        numbers = self._models.get(call.model)
        if numbers is None:
            numbers = self._models[call.model] = Counts()
        key = (call.route, call.status)
        numbers.requests[key] = numbers.requests.get(key, 0) + 1
        times = numbers.times.get(call.route)
        if times is None:
            times = numbers.times[call.route] = (Histogram(_SECONDS), Histogram(_SECONDS))
        times[0].add(now - call.started_at)
        if call.first_byte_at:
            times[1].add(call.first_byte_at - call.started_at)
        if call.sent_at:
            self._overhead.add(max(call.sent_at - call.started_at - call.queue_seconds - call.check_seconds, 0.0))
            numbers.queue.add(call.queue_seconds)
        numbers.retries += call.retries

    def ended(self) -> dict[str, int]:
        """How many requests have ended, by model."""
        return {name: sum(counts.requests.values()) for name, counts in self._models.items() if name}

    async def text(self, tasks: int) -> tuple[str, bytes]:
        """(content type, exposition). `tasks` is the number of the event loop's tasks."""
        ids = self._reconciler.config.ids
        for model_id in [name for name in self._models if name and name not in ids]:
            del self._models[model_id]  # the series of a removed model disappear
        families: dict[bytes, list[bytes]] = {}  # samples by head
        async for metric in in_turns(self._collect(tasks, asyncio.get_running_loop().time())):
            head, samples = _rendered(metric)
            families.setdefault(head, []).append(samples)
        return CONTENT_TYPE_LATEST, b"".join(part for head, samples in families.items() for part in (head, *samples))

    def _collect(self, tasks: int, now: float) -> Iterator[Metric]:
        """Every family, and again for each model that has something in it. `now`: of the loop's clock."""
        yield from self._of_clients()
        yield from self._of_requests({})
        for model_id, numbers in list(self._models.items()):
            yield from self._of_requests({model_id: numbers})
        charged = self._usage.usage.charged()
        yield from self._of_some((), charged)
        for model in self._reconciler.models():
            if self._reconciler.knows(model.spec.id):  # still
                yield from self._of_some((model,), charged)
        yield from room_metrics.families(self._reconciler.room, self._reconciler.config.models.keys(), now)
        yield from self._usage.families(self._reconciler.config)
        yield from self._of_daemon(tasks)

    def _of_some(self, models: Sequence[Model], charged: Mapping[str, int]) -> Iterator[Metric]:
        yield from (*self._of_models(models), *self._of_engines(models), *sleep_metrics.families(models))
        yield from token_metrics.families(models, charged)

    def _of_clients(self) -> Iterable[Metric]:
        connections, buffered = self._front()
        yield GaugeMetricFamily("vllm_proxy_connections", "Connections of clients.", value=connections)
        yield GaugeMetricFamily(
            "vllm_proxy_buffered_bytes", "Bytes of request bodies that are held, in TMPDIR too.", value=buffered
        )

    def _of_requests(self, models: Mapping[str, Counts]) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "vllm_proxy_requests", "Inference requests.", labels=["model", "route", "status"]
        )
        durations = HistogramMetricFamily(
            "vllm_proxy_request_duration_seconds",
            "From the request's head to the last byte of its answer.",
            labels=["model", "route"],
        )
        first = HistogramMetricFamily(
            "vllm_proxy_time_to_first_byte_seconds",
            "From the request's head to the first byte of its answer.",
            labels=["model", "route"],
        )
        queue = HistogramMetricFamily("vllm_proxy_queue_seconds", "Waiting for an instance.", labels=["model"])
        retries = CounterMetricFamily(
            "vllm_proxy_retries",
            "Requests sent again, to another instance or to the same one on a fresh connection.",
            labels=["model"],
        )
        for model, numbers in models.items():
            for (route, status), count in numbers.requests.items():
                requests.add_metric([model, route, str(status)], count)
            for route, (whole, to_first) in numbers.times.items():
                durations.add_metric([model, route], whole.buckets(), whole.total)
                if sum(to_first.counts):
                    first.add_metric([model, route], to_first.buckets(), to_first.total)
            queue.add_metric([model], numbers.queue.buckets(), numbers.queue.total)
            retries.add_metric([model], numbers.retries)
        return requests, durations, first, queue, retries

    def _of_models(self, models: Sequence[Model]) -> Iterable[Metric]:
        in_flight = GaugeMetricFamily("vllm_proxy_in_flight", "Requests in flight.", labels=["model", "instance"])
        queued = GaugeMetricFamily("vllm_proxy_queued", "Requests that wait for an instance.", labels=["model"])
        states = GaugeMetricFamily(
            "vllm_proxy_instance_state",
            "1 for the state that the instance is in.",
            labels=["model", "instance", "state"],
        )
        for each in models:
            model = each.spec.id
            queued.add_metric([model], self._registry.counts(model)[1])
            for instance in each.instances:
                busy = instance.endpoint.in_flight if instance.endpoint else 0
                in_flight.add_metric([model, instance.name], busy)
                for state in State:
                    states.add_metric([model, instance.name, state], instance.state is state)
        return in_flight, queued, states

    def _of_engines(self, models: Sequence[Model]) -> Iterable[Metric]:
        restarts = CounterMetricFamily(
            "vllm_proxy_instance_restarts",
            "Ends of engines that nobody asked for, and starts that failed.",
            labels=["model", "instance", "reason"],
        )
        startup = HistogramMetricFamily(
            "vllm_proxy_instance_startup_seconds", "From an engine's start to its readiness.", labels=["model"]
        )
        memory = GaugeMetricFamily(
            "vllm_proxy_instance_memory_bytes",
            "Memory of the engine's processes that no file backs; without a cgroup what they share counts for each.",
            labels=["model", "instance"],
        )
        for model in models:
            name, history = model.spec.id, model.history
            for (instance, reason), count in history.failures.items():
                restarts.add_metric([name, instance, reason], count)
            startup.add_metric([name], history.startups.buckets(), history.startups.total)
            for one in model.instances:
                if one.engine is not None and one.engine.memory_bytes:
                    memory.add_metric([name, one.name], one.engine.memory_bytes)
        return restarts, startup, memory

    def _of_daemon(self, tasks: int) -> Iterable[Metric]:
        overhead = HistogramMetricFamily(
            "vllm_proxy_overhead_seconds", "Time in the daemon itself before the engine was sent the request."
        )
        overhead.add_metric([], self._overhead.buckets(), self._overhead.total)
        info = GaugeMetricFamily("vllm_proxy_config_info", "The configuration that is applied.", labels=["revision"])
        info.add_metric([self._reconciler.config.revision], 1)
        reloads = CounterMetricFamily("vllm_proxy_config_reloads", "Looks at the file, by result.", labels=["result"])
        for result in ("accepted", "rejected", "unchanged"):
            reloads.add_metric([result], self._reloads.get(result, 0))
        lag = HistogramMetricFamily(
            "vllm_proxy_loop_lag_seconds", "How late the event loop was, looked at ten times a second."
        )
        lag.add_metric([], self._lag.seconds.buckets(), self._lag.seconds.total)
        most = GaugeMetricFamily(
            "vllm_proxy_loop_lag_max_seconds", "The latest that the event loop was in the last one to two minutes."
        )
        most.add_metric([], self._lag.most())
        dropped = CounterMetricFamily(
            "vllm_proxy_log_lines_dropped", "Lines of the daemon's log that nobody read, or that could not be written."
        )
        dropped.add_metric([], self._log.dropped)
        left = GaugeMetricFamily("vllm_proxy_engines_not_ended", "Engines that live and could not be ended.")
        left.add_metric([], len(self._reconciler.not_ended()))
        count = GaugeMetricFamily("vllm_proxy_tasks", "Tasks of the event loop: about one for each open connection.")
        count.add_metric([], tasks)
        return overhead, info, reloads, left, lag, most, dropped, count


class _OneFamily(Collector):
    """One family."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        yield self._metric


def _rendered(metric: Metric) -> tuple[bytes, bytes]:
    """The lines that explain a family, and its samples."""
    explanation, kind, samples = generate_latest(_OneFamily(metric)).split(b"\n", 2)
    return b"%s\n%s\n" % (explanation, kind), samples
