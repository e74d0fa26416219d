"""The series of models and their instances, a part of `/metrics`: what is now, and what became of their engines.

What is now is asked of the instances when somebody scrapes; what became of engines is counted in `fleet/history.py`.
An instance is a label `replica`, its number: `instance` is Prometheus' own.
"""

from typing import NamedTuple

from vllm_proxy.api.by_model import ByModel, Lines
from vllm_proxy.domain.exposition import Family
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.fleet.model import Model
from vllm_proxy.traffic.registry import Registry

IN_FLIGHT = Family("vllm_proxy_in_flight", "gauge", "Requests in flight.", ("model", "replica"))
QUEUED = Family("vllm_proxy_queued", "gauge", "Requests that wait for an instance.", ("model",))
READY = Family("vllm_proxy_model_ready", "gauge", "1 where an instance of the model is ready.", ("model",))
WANTED = Family(
    "vllm_proxy_model_wanted",
    "gauge",
    "1 where `/ready` waits for the model: it is always to run, and nobody stopped it or put it to sleep by hand.",
    ("model",),
)
CHANGE_FAILED = Family(
    "vllm_proxy_model_change_failed",
    "gauge",
    "1 where the model runs what it ran before: what the file asks for could not be loaded.",
    ("model",),
)
STATE = Family(
    "vllm_proxy_instance_state",
    "gauge",
    "1 for the state that the instance is in.",
    ("model", "replica", "state"),
)
UP = Family(
    "vllm_proxy_engine_up",
    "gauge",
    "1 where a ready engine answers: requests and health checks here, this scrape in /metrics/engines.",
    ("model", "replica"),
)
MEMORY = Family(
    "vllm_proxy_instance_memory_bytes",
    "gauge",
    "Memory of the engine's processes that no file backs; without a cgroup what they share counts for each.",
    ("model", "replica"),
)
RESTARTS = Family(
    "vllm_proxy_instance_restarts_total",
    "counter",
    "Ends of engines that nobody asked for, and starts that failed.",
    ("model", "reason", "replica"),
)
STARTUP = Family(
    "vllm_proxy_instance_startup_seconds", "histogram", "From an engine's start to its readiness.", ("model",)
)
FAMILIES = (IN_FLIGHT, QUEUED, READY, WANTED, CHANGE_FAILED, STATE, UP, MEMORY, RESTARTS, STARTUP)


class _Instance(NamedTuple):
    replica: str
    state: State
    in_flight: int
    up: bool | None  # None: its engine is not ready
    memory: int


class _Now(NamedTuple):
    queued: int
    ready: bool
    wanted: bool
    change_failed: bool
    instances: tuple[_Instance, ...]


def now_by_model(registry: Registry) -> ByModel[Model, _Now]:
    """What is now."""

    def mark(model: Model) -> _Now:
        instances = tuple([
            _Instance(
                str(one.index),
                one.state,
                one.endpoint.in_flight if one.endpoint else 0,
                not one.endpoint.ejected if one.endpoint and one.state is State.READY else None,
                one.engine.memory_bytes if one.engine else 0,
            )
            for one in model.instances
        ])  # fmt: skip
        ready = any(one.state is State.READY for one in instances)
        why = model.diagnosis
        failed = why is not None and why.reason is Reason.REPLACEMENT_FAILED
        return _Now(registry.counts(model.spec.id)[1], ready, model.is_wanted, failed, instances)

    return ByModel(mark, _now)


def _now(model: str, _: Model, now: _Now) -> Lines:
    yield QUEUED, QUEUED.line(now.queued, model)
    yield READY, READY.line(now.ready, model)
    yield WANTED, WANTED.line(now.wanted, model)
    yield CHANGE_FAILED, CHANGE_FAILED.line(now.change_failed, model)
    for one in now.instances:
        yield IN_FLIGHT, IN_FLIGHT.line(one.in_flight, model, one.replica)
        states = [STATE.line(one.state is state, model, one.replica, state) for state in State]
        yield STATE, "".join(states)
        if one.up is not None:
            yield UP, UP.line(one.up, model, one.replica)
        if one.memory:
            yield MEMORY, MEMORY.line(one.memory, model, one.replica)


def engines_by_model() -> ByModel[Model, tuple[int, int]]:
    """What became of engines."""

    def mark(model: Model) -> tuple[int, int]:
        return model.history.failures.total(), sum(model.history.startups.counts)

    return ByModel(mark, _engines)


def _engines(model: str, subject: Model, mark: tuple[int, int]) -> Lines:
    for (instance, reason), count in subject.history.failures.items():
        yield RESTARTS, RESTARTS.line(count, model, reason, instance.rpartition("/")[2])
    if mark[1]:
        yield STARTUP, STARTUP.lines(subject.history.startups, model)
