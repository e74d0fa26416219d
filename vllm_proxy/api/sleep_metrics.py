"""The series of sleep, a part of `/metrics`: how long it took, what failed, and what it costs the machine's memory.

What is now is asked of the instances when somebody scrapes; what became of their sleep is counted in
`fleet/history.py`. A model whose engines never slept has no series.
"""

from vllm_proxy.api.by_model import ByModel, Lines
from vllm_proxy.domain.exposition import Family
from vllm_proxy.fleet.model import Model

SLEEPS = Family(
    "vllm_proxy_sleep_seconds",
    "histogram",
    "Falling asleep, from the last request until memory is seen to be back.",
    ("model",),
)
WAKES = Family(
    "vllm_proxy_wake_seconds",
    "histogram",
    "Waking, from the room that it got until it answers as before.",
    ("level", "model"),
)
FAILURES = Family(
    "vllm_proxy_sleep_failures_total",
    "counter",
    "Engines that were ended since they could not be put to sleep, or started anew since they could not be woken.",
    ("model", "operation"),
)
HELD = Family(
    "vllm_proxy_host_memory_bytes",
    "gauge",
    "Memory of the machine that engines have by sleeping, then or now; a guess until it was measured.",
    ("model",),
)
FAMILIES = (SLEEPS, WAKES, FAILURES, HELD)

type _Mark = tuple[int, int, int, int]


def by_model() -> ByModel[Model, _Mark]:
    """All of them."""
    return ByModel(_mark, _lines)


def _mark(model: Model) -> _Mark:
    history = model.history
    held = sum(one.claim.host_bytes() for one in model.instances if one.claim is not None)
    wakes = sum(sum(times.counts) for times in history.wakes.values())
    return sum(history.sleeps.counts), wakes, history.sleep_failures.total(), held


def _lines(model: str, subject: Model, mark: _Mark) -> Lines:
    history = subject.history
    if any(history.sleeps.counts):
        yield SLEEPS, SLEEPS.lines(history.sleeps, model)
    for level, times in history.wakes.items():
        yield WAKES, WAKES.lines(times, str(level), model)
    for operation, count in history.sleep_failures.items():
        yield FAILURES, FAILURES.line(count, model, operation)
    if held := mark[-1]:
        yield HELD, HELD.line(held, model)
