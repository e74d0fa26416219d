"""One model: what is wanted of it, and its instances. What it does next is decided by the fleet loop.

Owns its instances and what the file, a person or a request asked for last. Everybody else notifies (`start`, `stop`,
`restart`, `request`, which return at once). The loop applies that, takes a snapshot (`now`) and has the decision
carried out (`carry_out`). Nothing may be started or stopped outside of that, adopted engines aside, which run already.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import structlog

from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.decide import ModelDecision, ModelNow, Wanted
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.engine.state import EngineRecord
from vllm_proxy.fleet.adapters import ModelAdapters
from vllm_proxy.fleet.dependencies import Dependencies
from vllm_proxy.fleet.history import History
from vllm_proxy.fleet.loop import Command
from vllm_proxy.fleet.model_status import ModelStatus
from vllm_proxy.fleet.supervisor import Supervisor
from vllm_proxy.fleet.tenancy import gave_way
from vllm_proxy.runtime.background import run_once

log = structlog.get_logger()

_RUNS = frozenset({"always", "warm"})  # without a request


class Model(ModelStatus):
    """The instances of one model. `changed` is called with it after every change of what it shows."""

    def __init__(
        self, spec: ModelSpec, shared: Dependencies, history: History, changed: Callable[["Model"], None]
    ) -> None:
        super().__init__(spec, history)
        self._shared = shared
        self._changed = changed
        self.adapters = ModelAdapters(
            spec, shared.adapters, shared.registry, lambda: self._changed(self), self._no_room
        )
        self._keep = False  # engines live on where the model ends
        self._requested = False  # a request came, and nobody served it
        self._started_by_hand: float | None = None  # since then somebody waits for it, on the loop's clock
        self._checking: asyncio.Task[None] | None = None
        self._renew: set[Supervisor] = set()  # to be started anew, though they run what is wanted
        self._leaving: dict[Supervisor, asyncio.Task[None]] = {}
        self._ended: asyncio.Future[None] | None = None
        self._adjust_instances()

    # Notifications: for everybody

    def start(self) -> asyncio.Future[None]:
        """Run, and retry instances in `error`. Done when that has begun."""
        return self._post("start", self._start)

    def stop(self) -> asyncio.Future[None]:
        """Stop until somebody starts or changes it. Done when that has begun."""
        return self._post("stop", partial(self._want, Wanted.STOP))

    def sleep(self) -> asyncio.Future[None]:
        """Sleep until a request comes, or somebody starts it. Done when that has begun."""
        return self._post("sleep", self._sleep)

    def restart(self) -> asyncio.Future[None]:
        """Start every engine anew, one after another where there are several; a change that failed is tried again."""
        return self._post("restart", self._restart)

    def request(self) -> None:
        """A request came that no instance serves. Idempotent, so a thundering herd makes one start."""
        if self._wanted is Wanted.AWAIT and not self._requested:
            self._requested = True
            self._shared.loop.changed(self)
        elif self.state is State.SLEEPING:  # it waits for room that nobody has pressed for
            self._shared.loop.changed(self)
        elif self.state is State.LOADING and self._shared.registry.waits_since(self.name) is None:
            self._shared.loop.wake()  # it may have waited for room that nobody pressed for

    # What is wanted: for the loop's events

    def begin(self, records: Mapping[int, EngineRecord]) -> None:
        """Start what the file asks for; `records` are engines of an earlier daemon, by instance. Returns at once."""
        asked = self.spec.policy.start in _RUNS or records
        self._wanted = Wanted.RUN if asked else Wanted.AWAIT
        self._begun = True
        if records:
            self.instances = _in_order([self._supervisor(index) for index in records])
            for instance in self.instances:
                instance.start(records[instance.index])
        self._shared.loop.add(self)

    def adopt_spec(self, spec: ModelSpec) -> None:
        """The file asks for something else, or for the same in other words. Returns at once."""
        before, self.spec = self.spec, spec
        if (before.engine, before.policy) == (spec.engine, spec.policy):
            self.adapters.follow(spec)
            return
        for instance in self.instances:
            instance.spec = replace(spec, engine=instance.spec.engine)
        self._reset_rollback(spec)
        self.adapters.follow(spec)
        self._renew |= {one for one in self.instances if one.state is State.ERROR}
        # What a hand has put to sleep is not woken by a change of what no engine notices.
        sleeps_on = self._wanted is Wanted.AWAIT and _runs_as(before) == _runs_as(spec)
        runs = not sleeps_on and (spec.policy.start in _RUNS or self._wanted is Wanted.RUN)
        self._want(Wanted.RUN if runs else Wanted.AWAIT)

    def end(self, *, keep: bool) -> asyncio.Future[None]:
        """Stop for good; done when nothing is left. `keep`: engines go on, for the next daemon."""
        assert self._begun, "only a begun model ends"
        self._keep = keep
        self._cancel_check()
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
        self._want(Wanted.END)
        return self._ended

    def _post(self, word: str, what: Callable[[], None]) -> asyncio.Future[None]:
        return self._shared.loop.post(Command(f"{word} of {self.name}", what))

    def _start(self) -> None:
        self._renew |= {one for one in self.instances if one.state is State.ERROR}
        self._started_by_hand = asyncio.get_running_loop().time()
        self.adapters.follow(self.spec, again=True)
        self._want(Wanted.RUN)

    def _sleep(self) -> None:
        for instance in self.instances:
            instance.forget_return()
        self._want(Wanted.AWAIT)

    def _restart(self) -> None:
        self._reset_rollback(self.spec)
        self._renew |= set(self.instances)
        self._started_by_hand = asyncio.get_running_loop().time()
        self._want(Wanted.RUN)

    def _reset_rollback(self, spec: ModelSpec) -> None:
        self._rollback = self._rollback.change(spec.engine)
        self._cancel_check()

    def _cancel_check(self) -> None:
        if self._checking is not None:
            self._checking.cancel()
            self._checking = None

    def _want(self, wanted: Wanted) -> None:
        if self._wanted is not Wanted.END:
            self._wanted = wanted
        self._gave_way = None
        if wanted is not Wanted.RUN:
            self._started_by_hand = None
        if wanted in {Wanted.STOP, Wanted.END}:
            for instance in self.instances:
                instance.stop_yielding()
        self._notify()

    def _notify(self) -> None:
        self._changed(self)
        self._shared.loop.changed(self)

    def is_renewed(self, instance: Supervisor) -> bool:
        """Whether it is about to be started anew."""
        return instance in self._renew

    # Snapshots and effects: for the loop

    def now(self) -> ModelNow:
        """As the loop decides about it."""
        if self.state is State.READY:
            self._started_by_hand = None
        instances = tuple(one.now(renew=one in self._renew) for one in self.instances)
        policy, registry = self.spec.policy, self._shared.registry
        return ModelNow(
            self.name, policy, self._wanted, self._rollback, instances,
            requested=self._requested or self._started_by_hand is not None,
            waits_since=registry.waits_since(self.name),
            idle_seconds=registry.idle_seconds(self.name),
            fits_beside=policy.replace != "surge" or self._fits_beside(),
        )  # fmt: skip

    def carry_out(self, decided: ModelDecision) -> None:
        """Begin what was decided."""
        self._follow(decided)
        self._requested = False
        by_index = {one.index: one for one in self.instances}
        for index in decided.stop:
            self._stop_instance(by_index[index])
        for index in decided.sleep:
            self._lay_to_sleep(by_index[index])
        for index in decided.wake:
            self._wake_instance(by_index[index])
        for index in decided.start:
            self._start_instance(by_index.get(index) or self._supervisor(index))
        self._adjust_instances()
        self._note_end()

    def force_end(self) -> None:
        """A bug prevented a decision about it. If it is to end, that is begun all the same."""
        if self.ends:
            for one in self.instances:
                if one.state not in {State.STOPPED, State.UNLOADING}:
                    self._stop_instance(one)
            self._note_end()

    def _note_end(self) -> None:
        if self.ends and not self._leaving and self._ended is not None and not self._ended.done():
            self.adapters.close()
            self._ended.set_result(None)

    def _follow(self, decided: ModelDecision) -> None:
        refused, wanted = decided.rollback.failed, decided.wanted
        if refused is not None and refused is not self._rollback.failed:
            self._log_failed_replacement(refused)
        is_visible = (refused, wanted) != (self._rollback.failed, self._wanted)
        if (self._wanted, wanted) == (Wanted.AWAIT, Wanted.RUN):
            log.info("started by a request", model=self.name)
        if (self._wanted, wanted) == (Wanted.RUN, Wanted.AWAIT) and not any(one.yields for one in self.instances):
            log.info("unloaded: no request for a while", model=self.name)
        self._rollback, self._wanted = decided.rollback, wanted
        if decided.check and self._checking is None and not self.ends:
            self._begin_check(self.spec)
        if is_visible:
            self._changed(self)

    def _start_instance(self, instance: Supervisor) -> None:
        instance.spec = replace(self.spec, engine=self._rollback.target)
        self._renew.discard(instance)
        self._gave_way = None
        if instance not in self.instances:
            self.instances = _in_order([*self.instances, instance])
        instance.start()

    def _stop_instance(self, instance: Supervisor) -> None:
        self._renew.discard(instance)
        if instance.gives_way_to is not None:
            self._note_gave_way(instance.gives_way_to)
        self._follow_end(instance, instance.stop(keep=self._keep))

    def _lay_to_sleep(self, instance: Supervisor) -> None:
        if instance.gives_way_to is not None:
            self._note_gave_way(instance.gives_way_to)
        if instance.sleeps:
            instance.sleep_on(asks=self._wanted is Wanted.RUN)
        else:
            self._follow_end(instance, instance.sleep())

    def _wake_instance(self, instance: Supervisor) -> None:
        instance.wake()
        if instance.state is State.LOADING:
            self._gave_way = None

    def _follow_end(self, instance: Supervisor, leaving: asyncio.Task[None]) -> None:
        self._leaving[instance] = leaving

        def left(_: asyncio.Task[None]) -> None:
            if self._leaving[instance] is leaving:
                del self._leaving[instance]
            if instance.state is State.READY:
                self._gave_way = None
                log.info("serves on: nobody waits for its room any more", model=self.name)
            self._shared.loop.changed(self)

        leaving.add_done_callback(left)

    def _note_gave_way(self, for_whom: str) -> None:
        on_demand = self.spec.policy.start == "on-demand"  # else a hand may have put it to sleep
        self._gave_way = gave_way(for_whom, awaits_request=on_demand or self._wanted is Wanted.AWAIT)
        log.info("gives way", model=self.name, to=for_whom)

    def _fits_beside(self) -> bool:
        """Whether a new instance has, or would have, its room beside an old one that serves."""
        target = self._rollback.target
        ready = [one for one in self.instances if one.state is State.READY]
        new = [one for one in self.instances if one.state is State.LOADING]
        if all(one.spec.engine == target and one not in self._renew for one in ready):
            return True
        waiting = next((one.claim for one in new if one.claim is not None), None)
        fits = self._shared.loop.room.fits_beside(replace(self.spec, engine=target), waiting)
        if not fits and all(one.spec.engine != target for one in self.instances):
            log.info("no room for a new engine beside the old one, which goes first", model=self.name)
        return fits

    def _wanted_since(self) -> float | None:
        """Since when a request or a person has waited for it, on the loop's clock."""
        since = [self._shared.registry.waits_since(self.name), self._started_by_hand]
        return min((one for one in since if one is not None), default=None)

    def _adjust_instances(self) -> None:
        """As many instances as the file asks for, and those that still leave."""
        wanted = self.spec.policy.replicas if self.spec.policy.enabled else 0
        there = [one for one in self.instances if one.state is not State.STOPPED]
        stopped = [one for one in self.instances if one.state is State.STOPPED]
        kept = [*there, *stopped[: max(0, wanted - len(there))]]
        free = (index for index in range(wanted + len(kept)) if index not in {one.index for one in kept})
        missing = [self._supervisor(next(free)) for _ in range(wanted - len(kept))]
        self.instances = _in_order([*kept, *missing])

    def _supervisor(self, index: int) -> Supervisor:
        shown = self._shared, self.history, self._notify
        return Supervisor(self.spec, index, *shown, adapters=self.adapters, wanted_since=self._wanted_since)

    def _begin_check(self, wanted: ModelSpec) -> None:
        # A check that failed has found nothing; the start of the engine will find it.
        failed = partial(self._end_check, wanted, None)
        self._checking = run_once(partial(self._check, wanted), f"check of {wanted.id}", failed)

    async def _check(self, wanted: ModelSpec) -> None:
        found = await self._shared.launcher.objection(wanted)
        self._end_check(wanted, found and found.masked(self._shared.mask))

    def _end_check(self, wanted: ModelSpec, found: Diagnosis | None) -> None:
        if wanted.engine is not self._rollback.wanted:
            return
        self._checking = None
        self._rollback = self._rollback.check_ended(found)
        if found is not None:
            self._log_failed_replacement(found)
        self._notify()

    def _log_failed_replacement(self, why: Diagnosis) -> None:
        log.error("a replacement failed", model=self.name, reason=why.reason, message=why.message)


def _runs_as(spec: ModelSpec) -> tuple[object, ...]:
    return spec.engine, spec.policy.start, spec.policy.enabled


def _in_order(instances: list[Supervisor]) -> tuple[Supervisor, ...]:
    return tuple(sorted(instances, key=lambda one: one.index))
