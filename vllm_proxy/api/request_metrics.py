"""The series of requests, a part of `/metrics`: what was counted of them, model by model.

Counting must cost next to nothing: plain numbers are kept, and text is made of them when somebody scrapes.
"""

from dataclasses import dataclass, field

from vllm_proxy.api.by_model import ByModel, Lines
from vllm_proxy.domain.exposition import Family
from vllm_proxy.domain.histogram import Histogram

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


@dataclass(slots=True)
class Counts:
    """What was counted for one model."""

    requests: dict[tuple[str, int], int] = field(default_factory=dict)  # by route and status
    times: dict[str, tuple[Histogram, Histogram]] = field(default_factory=dict)  # by route: whole, to the first byte
    queue: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    retries: int = 0

    def of_route(self, route: str) -> tuple[Histogram, Histogram]:
        """The times of a route that has none yet."""
        times = self.times[route] = (Histogram(_SECONDS), Histogram(_SECONDS))
        return times


def by_model() -> ByModel[Counts, int]:
    """All of them, of what was counted for each model."""
    return ByModel(_ended, _lines)


def _ended(counts: Counts) -> int:
    """How many have ended: whatever else is counted is counted with that."""
    return sum(counts.requests.values())


def _lines(model: str, counts: Counts, _ended: int) -> Lines:
    for (route, status), count in counts.requests.items():
        yield REQUESTS, REQUESTS.line(count, model, route, str(status))
    for route, (whole, to_first) in counts.times.items():
        yield DURATION, DURATION.lines(whole, model, route)
        if any(to_first.counts):
            yield FIRST_BYTE, FIRST_BYTE.lines(to_first, model, route)
    yield QUEUE, QUEUE.lines(counts.queue, model)
    yield RETRIES, RETRIES.line(counts.retries, model)
