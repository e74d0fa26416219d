"""Decides what the whole fleet does next, from a snapshot and the time; and why a start has to wait.

The only place where it is decided which instance starts, stops, is retried or given up, which start goes first, and
when an idle model is unloaded (the only eviction there is: nothing is stopped to make room for another model). Pure and
idempotent: `decide` is called after every event and considers only what is, so nothing that it returned ever has to be
undone. `fleet/loop.py` carries it out. What concerns one model alone is in `rollout` (which instances make room for
which) and `rollback` (which spec they run).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum

from vllm_proxy.domain import lifecycle, rollout
from vllm_proxy.domain.config import EngineSpec, Policy, Restart
from vllm_proxy.domain.devices import Allocation, DeviceMap
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.domain.rollback import Attempt, Rollback
from vllm_proxy.domain.rollout import Replica, Strategy

_STRATEGIES = {"auto": Strategy.ONE_BY_ONE, "surge": Strategy.SURGE, "drain": Strategy.DRAIN}
_NEVER = math.inf
_NOW_SECONDS = 1e-3  # what is due so soon is due now: a timer may fire as much too early


class Wanted(Enum):
    """What a model is to do."""

    RUN = "run"
    AWAIT = "await"  # on-demand: the next request starts it
    STOP = "stop"  # stopped by hand: started by hand, or by a change of the file
    END = "end"  # the daemon stops, or the model is gone from the file


@dataclass(frozen=True, slots=True)
class InstanceNow:
    """One instance. `renew`: it is to be started anew, though it runs what is wanted."""

    index: int
    state: State
    engine: EngineSpec
    failure: Diagnosis | None = None  # why its last engine failed
    renew: bool = False


@dataclass(frozen=True, slots=True)
class ModelNow:
    """One model, with the requests that wait for it and the time since one was served."""

    id: str
    policy: Policy
    wanted: Wanted
    rollback: Rollback
    instances: tuple[InstanceNow, ...] = ()
    requested: bool = False  # a request came, and nobody served it
    waits_since: float | None = None  # when the oldest request came that waits for it; None: nobody waits
    idle_seconds: float = 0.0  # since a request held it or waited for it


class ClaimState(StrEnum):
    """What a claim is for."""

    WAITING = "waiting"  # wants to start
    LOADING = "loading"  # vLLM measures its devices: no other engine may start or leave there
    LEAVING = "leaving"  # sets memory free: as above


_DOING = {ClaimState.WAITING: "waits for", ClaimState.LOADING: "loads on", ClaimState.LEAVING: "is leaving"}


@dataclass(frozen=True, slots=True)
class Claim:
    """An instance's claim on devices, while its engine starts or is ended. One that serves has none."""

    key: int  # names the claim
    instance: str  # "chat/0"
    allocation: Allocation
    state: ClaimState
    not_ended: str | None = None  # why its engine could not be ended
    untried: bool = False  # an engine of an earlier daemon that nobody has tried to end yet


@dataclass(frozen=True, slots=True)
class Retry:
    """An instance whose engine failed and that wants another one. `jitter`: 0..1, drawn once for each failure."""

    instance: str
    reason: Reason
    failures: int  # in a row
    since: float  # of the loop's clock
    jitter: float
    restart: Restart


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The fleet at one moment: models that something happened to, every claim in the order they came, retries."""

    models: Sequence[ModelNow] = ()
    claims: Sequence[Claim] = ()
    retries: Sequence[Retry] = ()


@dataclass(frozen=True, slots=True)
class ModelDecision:
    """What one model does now: instances to stop and to start, by index. `check`: look at the wanted spec first."""

    wanted: Wanted
    rollback: Rollback
    stop: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    check: bool = False
    recheck_in: float = _NEVER  # in so many seconds, though nothing happened


@dataclass(frozen=True, slots=True)
class NotNow:
    """Why a start waits. `not_ended`: for an engine that could not be ended, which nobody knows to end soon."""

    because: str
    not_ended: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done now, and what is not, with the reason."""

    models: Mapping[str, ModelDecision] = field(default_factory=dict)
    admit: Mapping[int, Allocation] = field(default_factory=dict)  # claims that may start, with what they get
    wait: Mapping[int, NotNow] = field(default_factory=dict)  # claims that may not
    retries: Mapping[str, float | None] = field(default_factory=dict)  # seconds until the next try; None: give up

    def and_of(self, other: "Decision") -> "Decision":
        """Of this part of the fleet and of another one."""
        return Decision(
            {**self.models, **other.models},
            {**self.admit, **other.admit},
            {**self.wait, **other.wait},
            {**self.retries, **other.retries},
        )


def decide(now: Snapshot, time: float) -> Decision:
    """What follows from what is. `time`: of the clock that the snapshot's times are of, in seconds."""
    admit, wait = _admissions(now.claims)
    return Decision(
        models={model.id: decide_model(model) for model in now.models},
        admit=admit,
        wait=wait,
        retries={retry.instance: _next_try(retry, time) for retry in now.retries},
    )


def decide_model(model: ModelNow) -> ModelDecision:
    """What one model does now."""
    policy = model.policy
    wanted = _wanted(model)
    rollback = model.rollback.update([Attempt(one.engine, one.state, one.failure) for one in model.instances])
    target = rollback.target
    replicas = [Replica(one.index, one.state, one.engine == target and not one.renew) for one in model.instances]
    runs = wanted is Wanted.RUN and policy.enabled
    steps = rollout.steps(replicas, policy.replicas if runs else 0, _strategy(model, target))
    recheck_in = max(0.0, _idle_seconds_left(model)) if wanted is Wanted.RUN else _NEVER
    return ModelDecision(wanted, rollback, steps.stop, steps.start, rollback.needs_check, recheck_in)


def _wanted(model: ModelNow) -> Wanted:
    asked = model.requested or model.waits_since is not None
    if model.wanted is Wanted.AWAIT and asked:
        return Wanted.RUN
    idle = not asked and model.idle_seconds > 0
    if model.wanted is Wanted.RUN and idle and _idle_seconds_left(model) < _NOW_SECONDS:
        return Wanted.AWAIT
    return model.wanted


def _idle_seconds_left(model: ModelNow) -> float:
    policy = model.policy
    if policy.start != "on-demand" or not policy.idle_timeout:
        return _NEVER
    if lifecycle.best(one.state for one in model.instances) is not State.READY:
        return _NEVER  # the time counts from when it can be used; an error stays for people to see
    return policy.idle_timeout - model.idle_seconds


def _strategy(model: ModelNow, target: EngineSpec) -> Strategy:
    chosen = _STRATEGIES[model.policy.replace]
    others = any(one.engine != target for one in model.instances if one.state is State.READY)
    # All run the same spec, so it is a manual restart: one by one keeps the others serving.
    return chosen if others or chosen is Strategy.SURGE else Strategy.ONE_BY_ONE


def _next_try(retry: Retry, time: float) -> float | None:
    if retry.reason in lifecycle.FINAL or retry.failures >= retry.restart.max_failures:
        return None
    restart = retry.restart
    pause = lifecycle.backoff_seconds(retry.failures, restart.backoff, restart.max_backoff, retry.jitter)
    left = retry.since + pause - time
    return left if left >= _NOW_SECONDS else 0.0


class _ClaimQueue:
    """Claims in the order they came. Finds what conflicts with one without a scan of all."""

    def __init__(self, claims: Iterable[Claim] = ()) -> None:
        self._by_instance: dict[str, Claim] = {}
        self._by_device = DeviceMap[Claim]()
        for claim in claims:
            self.add(claim)

    def add(self, claim: Claim) -> None:
        """Behind all others."""
        self._by_instance.setdefault(claim.instance, claim)
        self._by_device.add(claim.allocation.devices, claim)

    def conflict(self, claim: Claim) -> Claim | None:
        """The claim that this one has to wait for: of the same instance, or on one of its devices."""
        return self._by_instance.get(claim.instance) or self._by_device.holder(claim.allocation.devices)


def _admissions(claims: Sequence[Claim]) -> tuple[dict[int, Allocation], dict[int, NotNow]]:
    """Which starts may go now.

    No engine starts while another loads on its devices, or has not left them; else first come, first served, so
    that a start which needs many devices is not starved by small ones. Starts on other devices are not held up (no
    head-of-line blocking). vLLM measures a device while it loads, so starts that share one go one after another, and
    behind what leaves it.
    """
    admit: dict[int, Allocation] = {}
    wait: dict[int, NotNow] = {}
    untried = next((claim for claim in claims if claim.untried), None)
    moving = [claim for claim in claims if claim.state is not ClaimState.WAITING]
    queue, stuck = _ClaimQueue(moving), _ClaimQueue(claim for claim in moving if claim.not_ended is not None)
    for claim in claims:
        if claim.state is not ClaimState.WAITING:
            continue
        other = stuck.conflict(claim) or queue.conflict(claim)
        if untried is not None:
            wait[claim.key] = NotNow(f"{untried.instance}, which an earlier daemon left, is being ended")
        elif other is not None:
            wait[claim.key] = _not_now(other)
        else:
            admit[claim.key] = claim.allocation
            claim = replace(claim, state=ClaimState.LOADING)  # noqa: PLW2901 - what it is for those behind it
        queue.add(claim)
    return admit, wait


def _not_now(other: Claim) -> NotNow:
    if other.not_ended is not None:
        return NotNow(f"{other.instance} could not be ended: {other.not_ended}", not_ended=True)
    return NotNow(f"{other.instance} {_DOING[other.state]} what it needs")
