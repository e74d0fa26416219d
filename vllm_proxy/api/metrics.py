"""`/metrics`: counts what became of requests, and renders all series for Prometheus.

Labels are configured names only, so no client can create a series. Each part has its families and its lines; those of
models are kept and remade only for what changed, in turns with everybody else on the event loop. docs/metrics.md lists
the series.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping

from vllm_proxy.api import (
    daemon_metrics,
    model_metrics,
    request_metrics,
    room_metrics,
    routing_metrics,
    sleep_metrics,
    token_metrics,
    usage_metrics,
)
from vllm_proxy.api.by_model import ByModel
from vllm_proxy.api.daemon_metrics import Daemon, File
from vllm_proxy.api.request_metrics import Counts
from vllm_proxy.api.usage_metrics import UsageMetrics
from vllm_proxy.domain.exposition import Exposition
from vllm_proxy.domain.histogram import Histogram
from vllm_proxy.domain.openmetrics import OpenMetrics
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.runtime.own_process import own_process
from vllm_proxy.runtime.threads import Offload
from vllm_proxy.runtime.turns import LoopLag, in_turns
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.registry import Registry

FAMILIES = (
    *(*daemon_metrics.FAMILIES, *model_metrics.FAMILIES, *request_metrics.FAMILIES, *room_metrics.FAMILIES),
    *(*routing_metrics.FAMILIES, *sleep_metrics.FAMILIES, *token_metrics.FAMILIES, *usage_metrics.FAMILIES),
)

_AT_ONCE_SECONDS = 0.001  # what was refused so soon did not wait
_SMALL_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0)


class Metrics:
    """All series, as docs/metrics.md describes them."""

    def __init__(
        self,
        reconciler: Reconciler,
        registry: Registry,
        file: File,
        lag: LoopLag,
        log: LogWriter,
        *,
        usage: UsageMetrics,
        front: Callable[[], tuple[int, int]] = lambda: (0, 0),
        offload: Offload = asyncio.to_thread,
    ) -> None:
        """`front`: clients, and bytes of bodies, now. `offload`: runs what reads of this process in a thread."""
        self._front = front
        self._offload = offload
        self._reconciler = reconciler
        self._models: dict[str, Counts] = {}
        self._overhead = Histogram(_SMALL_SECONDS)
        self._daemon = Daemon(file, lag, log, self._overhead)
        self._usage = usage
        self._charged = token_metrics.Charged()
        self._requests = request_metrics.by_model()
        self._requests_with_exemplars = request_metrics.by_model(exemplars=True)
        self._of_models = (
            model_metrics.now_by_model(registry),
            model_metrics.engines_by_model(),
            sleep_metrics.by_model(),
            routing_metrics.by_model(registry),
            token_metrics.by_model(self._charged),
        )

    def count(self, call: Call) -> None:
        """One request has ended."""
        now = call.ended_at
        numbers = self._models.get(call.model)
        if numbers is None:
            numbers = self._models[call.model] = Counts()
        key = (call.route, call.status)
        numbers.requests[key] = numbers.requests.get(key, 0) + 1
        times = numbers.times.get(call.route) or numbers.of_route(call.route)
        whole, to_first = now - call.started_at, None
        times[0].add(whole)
        if call.first_byte_at:
            to_first = call.first_byte_at - call.started_at
            times[1].add(to_first)
        if call.trace is not None:
            numbers.traced(call.route, call.trace.trace_id, whole, to_first)
        if call.sent_at:
            self._overhead.add(max(call.sent_at - call.started_at - call.queue_seconds - call.check_seconds, 0.0))
        if call.sent_at or call.queue_seconds > _AT_ONCE_SECONDS:  # or until it was refused, or its client left
            numbers.queue.add(call.queue_seconds)
        numbers.retries += call.retries

    def ended(self) -> dict[str, int]:
        """How many requests have ended, by model."""
        return {name: sum(counts.requests.values()) for name, counts in self._models.items() if name}

    async def text(self, *, openmetrics: bool = False) -> bytes:
        """The exposition, in Prometheus' own format or in OpenMetrics, with exemplars of requests that were traced."""
        exposition = OpenMetrics(FAMILIES) if openmetrics else Exposition(FAMILIES)
        requests = self._requests_with_exemplars if openmetrics else self._requests
        tasks, process = len(asyncio.all_tasks()), await self._offload(own_process)
        for lines in (daemon_metrics.of_clients(*self._front(), tasks), daemon_metrics.of_process(process)):
            for family, line in lines:
                exposition.add(family, line)
        async for _ in in_turns(self._add_all(exposition, requests, asyncio.get_running_loop().time())):
            pass
        return exposition.text()

    def _add_all(self, exposition: Exposition, requests: ByModel[Counts, int], now: float) -> Iterator[None]:
        """In pieces. `now`: of the loop's clock."""
        config = self._reconciler.config
        self._forget(config.ids)
        for model_id, numbers in list(self._models.items()):
            requests.add_to(exposition, model_id, numbers)
            yield
        self._charged.by_model = self._usage.usage.charged()
        for model in self._reconciler.models():
            if self._reconciler.knows(model.spec.id):  # still
                for part in self._of_models:
                    part.add_to(exposition, model.spec.id, model)
            yield
        for lines in (
            room_metrics.lines(self._reconciler.room, config.models.keys(), now),
            self._usage.lines(config),
            daemon_metrics.lines(
                self._daemon, config.revision, not_ended=len(self._reconciler.not_ended())
            ),
        ):  # fmt: skip
            for family, line in lines:
                exposition.add(family, line)
                yield

    def _forget(self, models: Mapping[str, object]) -> None:
        """The series of removed models disappear."""
        for name in [name for name in self._models if name and name not in models]:
            del self._models[name]
        for requests in (self._requests, self._requests_with_exemplars):
            requests.forget(self._models)
        names = {model.spec.id for model in self._reconciler.models()}
        for part in self._of_models:
            part.forget(names)
