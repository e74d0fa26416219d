"""One model: its instances follow what is wanted of it now, by the file, by hand, or by requests that wait.

Its one rule: it looks at what is and does what can be done at once, again after every change; so nothing that is
wanted in the middle of something else is lost, and nothing has to be taken back.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from enum import Enum

import structlog

from vllm_proxy.domain import lifecycle, rollout
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.domain.rollout import Seat, Strategy
from vllm_proxy.engine.state import EngineRecord
from vllm_proxy.fleet.history import History
from vllm_proxy.fleet.rollback import Trial
from vllm_proxy.fleet.supervisor import Supervisor, Surroundings
from vllm_proxy.runtime.background import keep_running

log = structlog.get_logger()

_STOPPED_BY_HAND = Diagnosis(Reason.STOPPED_BY_HAND, "stopped by hand; start it by hand, or change it")
_STRATEGIES = {"auto": Strategy.ONE_BY_ONE, "surge": Strategy.SURGE, "drain": Strategy.DRAIN}


class Wanted(Enum):
    """What a model is to do."""

    RUN = "run"
    SLEEP = "sleep"  # on-demand: the next request starts it
    REST = "rest"  # stopped by hand: only a hand or a change starts it
    END = "end"  # the daemon stops, or the model is gone from the file


class Model:
    """The instances of one model. `changed` is called with it after every change of what it shows."""

    def __init__(
        self, spec: ModelSpec, around: Surroundings, history: History, changed: Callable[["Model"], None]
    ) -> None:
        self.spec = spec
        self.history = history
        self.created_at = datetime.now(UTC)
        self._around = around
        self._changed = changed
        self._wanted = Wanted.REST
        self._keep = False  # engines live on where the model ends
        self._trial = Trial(spec, around.launcher, self._show)
        self._renew: set[Supervisor] = set()  # to be started anew, though they run what is wanted
        self._leaving: dict[Supervisor, asyncio.Task[None]] = {}
        self._news = asyncio.Event()  # anything changed
        self._task: asyncio.Task[None] | None = None
        self.instances: tuple[Supervisor, ...] = ()
        self._seat()

    @property
    def state(self) -> State:
        """As good as its best instance."""
        return lifecycle.best(instance.state for instance in self.instances)

    @property
    def updated_at(self) -> datetime:
        """When it last changed its state, UTC."""
        return max((instance.updated_at for instance in self.instances), default=self.created_at)

    @property
    def diagnosis(self) -> Diagnosis | None:
        """Why it is not what the file asks for, where there is a reason."""
        state = self.state
        if not_ended := next((one.diagnosis for one in self.instances if _is_not_ended(one)), None):
            return not_ended
        if state is State.STOPPED:
            return _STOPPED_BY_HAND if self.rests else None
        if state is not State.ERROR and self._trial.refusal is not None:
            return self._trial.refusal
        if state not in {State.LOADING, State.ERROR}:
            return None
        return next((one.diagnosis for one in self.instances if one.state is state and one.diagnosis), None)

    @property
    def rests(self) -> bool:
        """Whether somebody stopped it by hand."""
        return self._wanted is Wanted.REST and self._task is not None and self.spec.policy.enabled

    @property
    def sleeps(self) -> bool:
        """Whether the next request starts it."""
        return self._wanted is Wanted.SLEEP and self.spec.policy.enabled

    @property
    def ends(self) -> bool:
        """Whether it was told to stop for good."""
        return self._wanted is Wanted.END

    # What is wanted of it

    def begin(self, records: Mapping[int, EngineRecord]) -> None:
        """Start what the file asks for; `records` are engines of an earlier daemon, by instance. Returns at once."""
        asked = self.spec.policy.start == "always" or records
        self._wanted = Wanted.RUN if asked else Wanted.SLEEP
        if records:
            self.instances = _in_order([self._supervisor(index) for index in records])
            for instance in self.instances:
                instance.start(records[instance.index])
        self._task = keep_running(self._follow, f"model {self.spec.id}")
        self._look()

    def become(self, spec: ModelSpec) -> None:
        """The file asks for something else, or says the same in other words. Returns at once."""
        before, self.spec = self.spec, spec
        if (before.engine, before.policy) == (spec.engine, spec.policy):
            return
        for instance in self.instances:
            instance.spec = replace(spec, engine=instance.spec.engine)
        self._trial.change(spec)
        self._renew |= {one for one in self.instances if one.state is State.ERROR}
        if spec.policy.start == "always" or self._wanted is Wanted.RUN:
            self._want(Wanted.RUN)
        else:
            self._want(Wanted.SLEEP)

    def start(self) -> None:
        """Run, and let what rests in `error` try again."""
        self._renew |= {one for one in self.instances if one.state is State.ERROR}
        self._want(Wanted.RUN)

    def stop(self) -> None:
        """Stop until somebody starts or changes it."""
        self._want(Wanted.REST)

    def restart(self) -> None:
        """Start every engine anew, one after another where there are several; a change that failed is tried again."""
        self._trial.change(self.spec)
        self._renew |= set(self.instances)
        self._want(Wanted.RUN)

    def wake(self) -> None:
        """A request waits for it."""
        if self._wanted is Wanted.SLEEP:
            log.info("started by a request", model=self.spec.id)
            self._want(Wanted.RUN)

    def end(self, *, keep: bool) -> asyncio.Task[None]:
        """Stop for good; the task is done when nothing is left. `keep`: engines go on, for the next daemon."""
        assert self._task is not None, "only a begun model ends"
        self._keep = keep
        self._want(Wanted.END)
        return self._task

    def _want(self, wanted: Wanted) -> None:
        if self._wanted is not Wanted.END:
            self._wanted = wanted
        self._show()
        self._look()

    def _show(self) -> None:
        self._news.set()
        self._changed(self)

    # What it does about it

    async def _follow(self) -> None:
        """Look again after every change, until it has ended."""
        while True:
            self._news.clear()
            self._look()
            if self._wanted is Wanted.END and not self._leaving:
                return
            await self._until_news()

    def _look(self) -> None:
        """Do what can be done now."""
        try:
            self._act()
        except Exception:  # a bug in here must not leave the model without anybody who listens
            log.exception("a model could not follow what is wanted", model=self.spec.id)

    def _act(self) -> None:
        if self._task is None:
            return
        runs = self._wanted is Wanted.RUN and self.spec.policy.enabled
        target = self._trial.target(self.instances)
        seats = [self._seen(one, target) for one in self.instances]
        now = rollout.steps(seats, self.spec.policy.replicas if runs else 0, self._strategy(target))
        by_index = {one.index: one for one in self.instances}
        for index in now.stop:
            self._stop(by_index[index])
        for index in now.start:
            instance = by_index.get(index) or self._supervisor(index)
            instance.spec = replace(self.spec, engine=target)
            self._renew.discard(instance)
            if instance not in self.instances:
                self.instances = _in_order([*self.instances, instance])
            instance.start()
        self._seat()

    def _seen(self, one: Supervisor, target: EngineSpec) -> Seat:
        return Seat(one.index, one.state, one.spec.engine == target and one not in self._renew)

    def _strategy(self, target: EngineSpec) -> Strategy:
        chosen = _STRATEGIES[self.spec.policy.replace]
        others = any(one.spec.engine != target for one in self.instances if one.state is State.READY)
        return chosen if others or chosen is Strategy.SURGE else Strategy.ONE_BY_ONE  # a restart by hand

    def _stop(self, instance: Supervisor) -> None:
        self._renew.discard(instance)
        leaving = self._leaving[instance] = instance.stop(keep=self._keep)

        def left(_: asyncio.Task[None]) -> None:
            if self._leaving[instance] is leaving:
                del self._leaving[instance]
            self._news.set()

        leaving.add_done_callback(left)

    def _seat(self) -> None:
        """As many instances as the file asks for, and those that still leave."""
        wanted = self.spec.policy.replicas if self.spec.policy.enabled else 0
        there = [one for one in self.instances if one.state is not State.STOPPED]
        stopped = [one for one in self.instances if one.state is State.STOPPED]
        kept = [*there, *stopped[: max(0, wanted - len(there))]]
        free = (index for index in range(wanted + len(kept)) if index not in {one.index for one in kept})
        missing = [self._supervisor(next(free)) for _ in range(wanted - len(kept))]
        self.instances = _in_order([*kept, *missing])

    def _supervisor(self, index: int) -> Supervisor:
        return Supervisor(self.spec, index, self._around, self.history, self._show)

    async def _until_news(self) -> None:
        """Wait until anything changed; an on-demand model that nobody uses goes to sleep by itself."""
        left = self._idle_seconds_left()
        if left is not None and left <= 0:
            log.info("unloaded: no request for a while", model=self.spec.id)
            self._want(Wanted.SLEEP)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                await self._news.wait()

    def _idle_seconds_left(self) -> float | None:
        policy = self.spec.policy
        if self._wanted is not Wanted.RUN or policy.start != "on-demand" or not policy.idle_timeout:
            return None
        state = self.state
        if state is State.ERROR:  # that stays for people to see
            return None
        if state is not State.READY:  # the time counts from when it can be used
            return policy.idle_timeout
        return policy.idle_timeout - self._around.registry.idle_seconds(self.spec.id)


def _is_not_ended(one: Supervisor) -> bool:
    return one.diagnosis is not None and one.diagnosis.reason is Reason.NOT_ENDED


def _in_order(instances: list[Supervisor]) -> tuple[Supervisor, ...]:
    return tuple(sorted(instances, key=lambda one: one.index))
