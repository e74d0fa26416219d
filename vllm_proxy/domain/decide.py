"""Decides what the whole fleet does next, from a snapshot and the time.

The only place where it is decided which instance starts, stops, is retried or given up, and when an idle model is
unloaded. Pure and idempotent: `decide` is called after every event and considers only what is, so nothing that it
returned ever has to be undone. `fleet/loop.py` carries it out. Who gets room on the devices, and who gives way for it,
is in `room`; what concerns one model alone is in `rollout` (which instances make room for which) and `rollback` (which
spec they run).
"""

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum

from vllm_proxy.domain import lifecycle, rollout, room
from vllm_proxy.domain.config import EngineSpec, Policy, Restart
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.eviction import Rules
from vllm_proxy.domain.ledger import Ask, Depth, Device, Hold
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.domain.rollback import Attempt, Rollback
from vllm_proxy.domain.rollout import Replica, Strategy
from vllm_proxy.domain.room import Moves

_STRATEGIES = {"auto": Strategy.ONE_BY_ONE, "surge": Strategy.SURGE, "drain": Strategy.DRAIN}
_NEVER = math.inf
ASKS_AGAIN_SECONDS = 10.0  # in which a client that has given up may ask again
_NOW_SECONDS = 1e-3  # what is due so soon is due now: a timer may fire as much too early


class Wanted(Enum):
    """What a model is to do."""

    RUN = "run"
    AWAIT = "await"  # on-demand: the next request starts it
    STOP = "stop"  # stopped by hand: started by hand, or by a change of the file
    END = "end"  # the daemon stops, or the model is gone from the file


@dataclass(frozen=True, slots=True)
class InstanceNow:
    """One instance. `renew`: it is to be started anew, though it runs what is wanted. `yields`: so far it gives way.

    `awaits_room`: it would run, and nothing of it does yet. `serves_on`: it was to give way, and nobody waits any more.
    `may_sleep`: its engine can, and nothing speaks against it. `sleeps`: its engine does, though it may be loading.
    """

    index: int
    state: State
    engine: EngineSpec
    failure: Diagnosis | None = None  # why its last engine failed
    renew: bool = False
    yields: Depth | None = None
    awaits_room: bool = False
    serves_on: bool = False
    may_sleep: bool = False
    sleeps: bool = False

    @property
    def asleep(self) -> bool:
        """Whether its engine sleeps."""
        return self.sleeps or self.state is State.SLEEPING


@dataclass(frozen=True, slots=True)
class ModelNow:
    """One model, with the requests that wait for it and the time since one was served."""

    id: str
    policy: Policy
    wanted: Wanted
    rollback: Rollback
    instances: tuple[InstanceNow, ...] = ()
    requested: bool = False  # a request came that nobody served, or somebody has started it
    waits_since: float | None = None  # when the oldest request came that waits for it; None: nobody waits
    idle_seconds: float = 0.0  # since a request held it or waited for it
    fits_beside: bool = True  # there is room for a new instance beside the old one


@dataclass(frozen=True, slots=True)
class RoomNow:
    """The devices, who holds and who asks for memory of them. Times are of the loop's clock."""

    devices: Mapping[str, Device] = field(default_factory=dict)
    holds: Sequence[Hold] = ()
    asks: Sequence[Ask] = ()
    rules: Rules = field(default_factory=Rules)


@dataclass(frozen=True, slots=True)
class Retry:
    """An instance whose engine failed and that wants another one. `jitter`: 0..1, drawn once for each failure."""

    instance: str
    reason: Reason
    failures: int  # in a row
    since: float  # of the loop's clock
    jitter: float
    restart: Restart
    of_machine: bool = False  # the machine lacks something, for now: never given up


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The fleet at one moment: models that something happened to, all of the room, retries."""

    models: Sequence[ModelNow] = ()
    room: RoomNow | None = None
    retries: Sequence[Retry] = ()


@dataclass(frozen=True, slots=True)
class ModelDecision:
    """What one model does now: instances to stop and to start, by index. `check`: look at the wanted spec first."""

    wanted: Wanted
    rollback: Rollback
    stop: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    sleep: tuple[int, ...] = ()
    wake: tuple[int, ...] = ()
    check: bool = False
    recheck_in: float = _NEVER  # in so many seconds, though nothing happened


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done now, and what is not, with the reason."""

    models: Mapping[str, ModelDecision] = field(default_factory=dict)
    moves: Moves = field(default_factory=Moves)  # who may start, and who gives way
    retries: Mapping[str, float | None] = field(default_factory=dict)  # seconds until the next try; None: give up

    def and_of(self, other: "Decision") -> "Decision":
        """Of this part of the fleet and of another one."""
        return Decision(
            {**self.models, **other.models},
            other.moves if self.moves == Moves() else self.moves,
            {**self.retries, **other.retries},
        )


def decide(now: Snapshot, time: float) -> Decision:
    """What follows from what is. `time`: of the clock that the snapshot's times are of, in seconds."""
    here = now.room
    moves = room.decide(time, here.devices, here.holds, here.asks, here.rules) if here and here.asks else Moves()
    return Decision(
        models={model.id: decide_model(model) for model in now.models},
        moves=moves,
        retries={retry.instance: _next_try(retry, time) for retry in now.retries},
    )


def decide_model(model: ModelNow) -> ModelDecision:
    """What one model does now."""
    policy = model.policy
    wanted = _wanted(model)
    rollback = model.rollback.update([Attempt(one.engine, one.state, one.failure) for one in model.instances])
    target = rollback.target
    runs = wanted is Wanted.RUN and policy.enabled
    awaits = wanted is Wanted.AWAIT and policy.enabled
    current = {one.index for one in model.instances if one.engine == target and not one.renew}
    yielding = {one.index: one for one in model.instances if _yields(one)}
    idle = _idle_ones(model, current) if awaits else {}
    apart = yielding | idle  # these are decided about here
    replicas = [
        Replica(one.index, State.UNLOADING if one.index in yielding else one.state, one.index in current)
        for one in model.instances
        if one.index not in idle
    ]
    steps = rollout.steps(replicas, policy.replicas if runs else 0, _strategy(model, target))
    sleep = {index for index, one in apart.items() if _is_to_sleep(one, current)} | (_unwanted(model) - {*steps.stop})
    stop = {index for index, one in yielding.items() if index not in sleep}
    again = min(_idle_seconds_left(model), _seconds_until_given_up(model), _seconds_until_unwanted(model))
    recheck_in = max(0.0, again) if wanted is Wanted.RUN else _NEVER
    return ModelDecision(
        wanted, rollback, (*steps.stop, *sorted(stop)), steps.start, tuple(sorted(sleep)), steps.wake,
        rollback.needs_check, recheck_in,
    )  # fmt: skip


def _yields(one: InstanceNow) -> bool:
    """Whether it was told to give way, and has not begun to."""
    return one.yields is not None and (one.state in {State.READY, State.SLEEPING} or one.asleep)


def _idle_ones(model: ModelNow, current: AbstractSet[int]) -> dict[int, InstanceNow]:
    """Those that sleep, or are to, while the next request is awaited; as many as the file asks for."""
    able = [one for one in model.instances if one.index in current and not _yields(one)]
    asleep = [one for one in able if one.asleep]
    awake = [one for one in able if one.state is State.READY and one.may_sleep]
    return {one.index: one for one in (*asleep, *awake)[: model.policy.replicas]}


def _is_to_sleep(one: InstanceNow, current: AbstractSet[int]) -> bool:
    """Whether it is to fall asleep; one that sleeps is to wait for room no more."""
    if one.asleep:
        return one.awaits_room and not _yields(one)
    fits = one.index in current and one.may_sleep and one.state is State.READY
    return fits and one.yields is not Depth.STOP


def _unwanted(model: ModelNow) -> set[int]:
    """Those that were loading since somebody waited for them: they sleep, and may wake where there is room."""
    if _seconds_until_unwanted(model) >= _NOW_SECONDS:
        return set()
    return {one.index for one in model.instances if _may_be_unwanted(one)}


def _seconds_until_unwanted(model: ModelNow) -> float:
    """Until those that wait for room asleep are not awaited any more; at once where another one serves."""
    if model.requested or model.policy.start == "always" or not any(map(_may_be_unwanted, model.instances)):
        return _NEVER
    serves = model.waits_since is None and any(one.state is State.READY for one in model.instances)
    return 0.0 if serves else ASKS_AGAIN_SECONDS - model.idle_seconds


def _may_be_unwanted(one: InstanceNow) -> bool:
    return one.asleep and one.awaits_room and one.state is State.LOADING and one.yields is None


def _wanted(model: ModelNow) -> Wanted:
    asked = model.requested or model.waits_since is not None
    serves_on = any(one.state is State.READY and one.serves_on for one in model.instances)
    if model.wanted is Wanted.AWAIT and (asked or serves_on):
        return Wanted.RUN
    if model.wanted is Wanted.RUN and model.policy.start == "on-demand" and _gave_way(model.instances):
        return Wanted.AWAIT
    if model.wanted is Wanted.RUN and not asked and _seconds_until_given_up(model) < _NOW_SECONDS:
        return Wanted.AWAIT
    if model.wanted is Wanted.RUN and not asked and model.policy.start == "on-demand" and _all_sleep(model.instances):
        return Wanted.AWAIT
    idle = not asked and model.idle_seconds > 0
    if model.wanted is Wanted.RUN and idle and _idle_seconds_left(model) < _NOW_SECONDS:
        return Wanted.AWAIT
    return model.wanted


def _gave_way(instances: Sequence[InstanceNow]) -> bool:
    """Whether what served is told to give way, all of it."""
    served = [one for one in instances if one.state is State.READY]
    return bool(served) and all(map(_yields, served)) and not any(one.state is State.LOADING for one in instances)


def _all_sleep(instances: Sequence[InstanceNow]) -> bool:
    """Whether all there are sleep, as those of an earlier daemon do that were not wanted."""
    there = [one.state for one in instances if one.state is not State.STOPPED]
    return bool(there) and all(state is State.SLEEPING for state in there)


def _idle_seconds_left(model: ModelNow) -> float:
    policy = model.policy
    if policy.start != "on-demand" or not policy.idle_timeout:
        return _NEVER
    if lifecycle.best(one.state for one in model.instances) is not State.READY:
        return _NEVER  # the time counts from when it can be used; an error stays for people to see
    return policy.idle_timeout - model.idle_seconds


def _seconds_until_given_up(model: ModelNow) -> float:
    """Until an on-demand model that nobody waits for any more does not wait for room either."""
    active = [one for one in model.instances if one.state not in {State.STOPPED, State.UNLOADING}]
    if model.policy.start != "on-demand" or model.requested or not active:
        return _NEVER
    return ASKS_AGAIN_SECONDS - model.idle_seconds if all(one.awaits_room for one in active) else _NEVER


def _strategy(model: ModelNow, target: EngineSpec) -> Strategy:
    chosen = _STRATEGIES[model.policy.replace]
    if chosen is Strategy.SURGE and not model.fits_beside:
        chosen = Strategy.ONE_BY_ONE
    others = any(one.engine != target for one in model.instances if one.state is State.READY)
    # All run the same spec, so it is a manual restart: one by one keeps the others serving.
    return chosen if others or chosen is Strategy.SURGE else Strategy.ONE_BY_ONE


def _next_try(retry: Retry, time: float) -> float | None:
    is_last = retry.failures >= retry.restart.max_failures and not retry.of_machine
    if retry.reason in lifecycle.FINAL or is_last:
        return None
    restart = retry.restart
    pause = lifecycle.backoff_seconds(retry.failures, restart.backoff, restart.max_backoff, retry.jitter)
    left = retry.since + pause - time
    return left if left >= _NOW_SECONDS else 0.0
