"""One model: its instances follow what is wanted of it now, by the file, by hand, or by requests that wait.

Its one rule: only its own task starts and stops its instances, one thing after another; everybody else says what is
wanted and goes on.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import Enum

import structlog

from vllm_proxy.domain import lifecycle
from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.engine.history import History
from vllm_proxy.engine.state import EngineRecord
from vllm_proxy.engine.supervisor import Supervisor, Surroundings

log = structlog.get_logger()

_STOPPED_BY_HAND = Diagnosis(Reason.STOPPED_BY_HAND, "stopped by hand; start it by hand, or change it")


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
        self._restarting: list[Supervisor] = []
        self._again = False  # instances that rest in `error` are to try again
        self._turn = asyncio.Event()  # something else is wanted
        self._news = asyncio.Event()  # anything changed
        self._task: asyncio.Task[None] | None = None
        replicas = spec.policy.replicas if spec.policy.enabled else 0
        self.instances = tuple(Supervisor(spec, index, around, history, self._show) for index in range(replicas))

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
        """Why it is not ready, where there is a reason."""
        state = self.state
        if state is State.STOPPED:
            return _STOPPED_BY_HAND if self.rests else None
        if state not in {State.LOADING, State.ERROR}:
            return None
        return next((one.diagnosis for one in self.instances if one.state is state and one.diagnosis), None)

    @property
    def rests(self) -> bool:
        """Whether somebody stopped it by hand."""
        return self._wanted is Wanted.REST and self._task is not None and self.spec.policy.enabled

    # What is wanted of it

    def begin(self, records: Mapping[int, EngineRecord]) -> None:
        """Start what the file asks for; `records` are engines of an earlier daemon, by instance. Returns at once."""
        asked = self.spec.policy.start == "always" or records
        self._wanted = Wanted.RUN if asked else Wanted.SLEEP
        if asked:
            for instance in self.instances:
                instance.start(records.get(instance.index))
        self._show()
        self._task = asyncio.create_task(self._follow(), name=f"model {self.spec.id}")

    def start(self) -> None:
        """Run, and let what rests in `error` try again."""
        self._again = True
        self._want(Wanted.RUN)

    def stop(self) -> None:
        """Stop until somebody starts or changes it."""
        self._restarting = []
        self._want(Wanted.REST)

    def restart(self) -> None:
        """Start every engine anew, one after another where there are several."""
        self._restarting = list(self.instances)
        self._want(Wanted.RUN)

    def wake(self) -> None:
        """A request waits for it."""
        if self._wanted is Wanted.SLEEP:
            log.info("started by a request", model=self.spec.id)
            self._want(Wanted.RUN)

    async def end(self, *, keep: bool) -> None:
        """Stop for good; returns when nothing is left. `keep`: engines go on, for the next daemon."""
        self._keep = keep
        self._want(Wanted.END)
        if self._task is not None:
            await asyncio.wait({self._task})

    def _want(self, wanted: Wanted) -> None:
        if self._wanted is not Wanted.END:
            self._wanted = wanted
        self._turn.set()
        self._show()

    def _show(self) -> None:
        self._news.set()
        self._changed(self)

    # Its own task

    async def _follow(self) -> None:
        while True:
            self._turn.clear()
            try:
                await self._converge()
            except Exception:  # a bug in here must not leave the model without anybody who listens
                log.exception("a model could not follow what is wanted", model=self.spec.id)
            if self._wanted is Wanted.END and not self._turn.is_set():
                return
            await self._until_turn()

    async def _converge(self) -> None:
        """Make the instances what is wanted; what is wanted meanwhile is for the next turn."""
        if self._wanted is not Wanted.RUN:
            await self._stop(*self.instances)
            if self._wanted is Wanted.SLEEP and self._around.registry.is_awaited(self.spec.id):
                self.wake()  # a request came while it went to sleep
            return
        again, self._again = self._again, False
        while self._restarting and self._wanted is Wanted.RUN:
            await self._restart(self._restarting.pop(0))
        for instance in self.instances:
            if instance.state is State.ERROR and again:
                await self._stop(instance)
            if instance.state is State.STOPPED and self._wanted is Wanted.RUN:
                instance.start()

    async def _restart(self, instance: Supervisor) -> None:
        await self._stop(instance)
        if self._wanted is Wanted.RUN:
            instance.start()
            while self._restarting and self._wanted is Wanted.RUN and instance.state is State.LOADING:
                self._news.clear()
                await self._news.wait()

    async def _stop(self, *instances: Supervisor) -> None:
        keep = self._keep
        results = await asyncio.gather(*(one.stop(keep=keep) for one in instances), return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                log.error("an instance did not stop cleanly", model=self.spec.id, error=repr(result))

    async def _until_turn(self) -> None:
        """Wait until something else is wanted; an on-demand model that nobody uses goes to sleep by itself."""
        while not self._turn.is_set():
            left = self._idle_seconds_left()
            if left is not None and left <= 0:
                log.info("unloaded: no request for a while", model=self.spec.id)
                self._want(Wanted.SLEEP)
                return
            try:
                async with asyncio.timeout(left):
                    await self._turn.wait()
            except TimeoutError:
                continue

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
