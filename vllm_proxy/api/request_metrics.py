"""The series of requests, a part of `/metrics`: what was counted of them, model by model.

Counting must cost next to nothing: plain numbers are kept, and text is made of them when somebody scrapes. Of requests
that are traced, the last one in each bucket is kept for an exemplar.
"""

import time
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial

from vllm_proxy.api.by_model import ByModel, Lines
from vllm_proxy.domain.exposition import Family
from vllm_proxy.domain.histogram import Histogram
from vllm_proxy.domain.openmetrics import Exemplar, with_exemplars

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

REQUESTS = Family("vllm_proxy_requests_total", "counter", "Inference requests.", ("model", "route", "status"))
DURATION = Family(
    "vllm_proxy_request_duration_seconds",
    "histogram",
    "From the request's head to the last byte of its answer.",
    ("model", "route"),
)
FIRST_BYTE = Family(
    "vllm_proxy_time_to_first_byte_seconds",
    "histogram",
    "From the request's head to the first byte of its answer.",
    ("model", "route"),
)
QUEUE = Family("vllm_proxy_queue_seconds", "histogram", "Waiting for an instance.", ("model",))
RETRIES = Family(
    "vllm_proxy_retries_total",
    "counter",
    "Requests sent again, to another instance or to the same one on a fresh connection.",
    ("model",),
)
FAMILIES = (REQUESTS, DURATION, FIRST_BYTE, QUEUE, RETRIES)


type Exemplars = dict[int, Exemplar]  # by the index of their bucket

_NONE: tuple[Exemplars, Exemplars] = ({}, {})


@dataclass(slots=True)
class Counts:
    """What was counted for one model."""

    requests: dict[tuple[str, int], int] = field(default_factory=dict)  # by route and status
    times: dict[str, tuple[Histogram, Histogram]] = field(default_factory=dict)  # by route: whole, to the first byte
    queue: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    retries: int = 0
    exemplars: dict[str, tuple[Exemplars, Exemplars]] = field(default_factory=dict)  # by route, as `times`

    def of_route(self, route: str) -> tuple[Histogram, Histogram]:
        """The times of a route that has none yet."""
        times = self.times[route] = (Histogram(_SECONDS), Histogram(_SECONDS))
        return times

    def traced(self, route: str, trace_id: str, whole: float, to_first: float | None) -> None:
        """A request of this trace has ended now. Its times in seconds, as they were added to those of the route."""
        at = time.time()
        kept = self.exemplars.get(route) or self.exemplars.setdefault(route, ({}, {}))
        kept[0][bisect_left(_SECONDS, whole)] = Exemplar(trace_id, whole, at)
        if to_first is not None:
            kept[1][bisect_left(_SECONDS, to_first)] = Exemplar(trace_id, to_first, at)


def by_model(*, exemplars: bool = False) -> ByModel[Counts, int]:
    """All of them, of what was counted for each model. `exemplars`: for OpenMetrics."""
    return ByModel(_ended, partial(_lines, exemplars=exemplars))


def _ended(counts: Counts) -> int:
    """How many have ended: whatever else is counted is counted with that."""
    return sum(counts.requests.values())


def _lines(model: str, counts: Counts, _ended: int, *, exemplars: bool) -> Lines:
    for (route, status), count in counts.requests.items():
        yield REQUESTS, REQUESTS.line(count, model, route, str(status))
    for route, (whole, to_first) in counts.times.items():
        of_whole, of_first = counts.exemplars.get(route, _NONE) if exemplars else _NONE
        yield DURATION, with_exemplars(DURATION.lines(whole, model, route), of_whole)
        if any(to_first.counts):
            yield FIRST_BYTE, with_exemplars(FIRST_BYTE.lines(to_first, model, route), of_first)
    yield QUEUE, QUEUE.lines(counts.queue, model)
    yield RETRIES, RETRIES.line(counts.retries, model)
