"""The fleet loop, the one writer: takes events, has `domain/decide.py` decide, and carries the decisions out.

Owns the order of things: a mailbox of events, the models to decide about, and when to decide again though nothing
happened. Requests, commands, the file and engines notify it (`post`, `changed`, `wake`) and do not wait; nobody else
starts or stops an instance. Each turn applies the events, then carries out what was decided about each model concerned,
then decides which starts are admitted. Nothing is awaited between a snapshot and its decision's effects, so there is no
race between them. A bug in one event, model or start is contained (`faults`), and the others go on.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vllm_proxy.domain.config import Restart
from vllm_proxy.domain.decide import Decision, ModelDecision, ModelNow, Retry, Snapshot, decide
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.fleet.faults import Faults
from vllm_proxy.fleet.managed import Machines, Unmanaged
from vllm_proxy.fleet.room import Room
from vllm_proxy.runtime.background import keep_running, notify
from vllm_proxy.runtime.turns import in_batches

_AFTER_FAULT_SECONDS = 1.0  # until what could not be decided or done is tried again
_SHORTEST_WAIT_SECONDS = 0.01  # the loop does not spin, whatever `recheck_in` a decision has
_NEVER = math.inf


class Event(Protocol):
    """Something that changes what is wanted."""

    @property
    def name(self) -> str:
        """As the log has it: "start of chat"."""

    async def apply(self) -> None:
        """Change it. Called by the loop, one event after another; it awaits nothing but its turn."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command by hand: an event for the loop's mailbox."""

    name: str
    what: Callable[[], None]

    async def apply(self) -> None:
        """Change what is wanted."""
        self.what()


class Member(Protocol):
    """A model, as the loop sees it."""

    @property
    def name(self) -> str:
        """Its id; another model may have had it before."""

    def now(self) -> ModelNow:
        """What it is now."""

    def carry_out(self, decided: ModelDecision) -> None:
        """Begin what was decided."""

    def force_end(self) -> None:
        """A bug prevented a decision about it. If it is to end, begin that all the same."""


class _PendingRetry:
    """An instance that waits to learn whether its engine is started once more."""

    def __init__(self, retry: Retry, restart: Callable[[], Restart], on_retry: Callable[[float], None]) -> None:
        self.again: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._retry = retry
        self._restart = restart
        self._on_retry = on_retry
        self._notified = False

    def now(self) -> Retry:
        """With the policy as it is now."""
        return replace(self._retry, restart=self._restart())

    @property
    def instance(self) -> str:
        """Its name."""
        return self._retry.instance

    def follow(self, seconds: float | None) -> None:
        """Retry in so many seconds, which is reported once; None: give up."""
        if seconds is not None and not self._notified:
            self._notified = True
            notify([self._on_retry], seconds)
        if not seconds:
            self.again.set_result(seconds is not None)


class FleetLoop:
    """Decides for all models of one daemon, or of one test."""

    def __init__(self, machines: Machines | None = None) -> None:
        """`machines`: the devices of this machine, where they are managed."""
        self.room = Room(self.wake, machines or Unmanaged())
        self._faults = Faults()
        self._mailbox: list[tuple[Event, asyncio.Future[None]]] = []
        self._due_at: dict[Member, float] = {}  # every member, and when to decide about it though nothing happened
        self._changed: dict[Member, None] = {}  # in the order it happened
        self._retries: list[_PendingRetry] = []
        self._next_try = _NEVER  # when an engine that failed is started again, or another one may give way
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to decide."""
        if self._task is None:
            self._task = keep_running(self._run, "the fleet loop")

    async def close(self) -> None:
        """Decide nothing any more."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for _, decided in self._mailbox:
            decided.cancel()
        self._mailbox.clear()

    # Notifications

    def post(self, event: Event) -> asyncio.Future[None]:
        """Put an event into the mailbox. Done when what follows has begun; cancelled when the loop is closed.

        The caller may give up waiting: the event is applied all the same. An exception of the event is set on the
        future; it is in the log already.
        """
        decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closed:
            decided.cancel()
        else:
            self._mailbox.append((event, decided))
            self.wake()
        return decided

    def add(self, member: Member) -> None:
        """Decide about this one too."""
        self._due_at[member] = _NEVER
        self.changed(member)

    def changed(self, member: Member) -> None:
        """A member, or an instance of it, has changed."""
        if member in self._due_at:
            self._changed[member] = None
            self.wake()

    def forget(self, member: Member) -> None:
        """It is gone; later notifications about it are ignored."""
        self._changed.pop(member, None)
        self._due_at.pop(member, None)

    def wake(self) -> None:
        """Run another turn."""
        self._woken.set()

    async def await_retry(
        self,
        instance: str,
        why: Diagnosis,
        failures: int,
        restart: Callable[[], Restart],
        on_retry: Callable[[float], None],
    ) -> bool:
        """Wait until an engine that failed so many times in a row is started again; False when it is given up.

        `restart`: the policy, which may change meanwhile. `on_retry`: called once with the seconds that this takes.
        """
        since, jitter = asyncio.get_running_loop().time(), random.random()  # noqa: S311 - no secret
        retry = Retry(instance, why.reason, failures, since, jitter, restart(), why.of_machine)
        failure = _PendingRetry(retry, restart, on_retry)
        self._retries.append(failure)
        self.wake()
        try:
            return await failure.again
        finally:
            self._retries.remove(failure)

    # Decisions and effects

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            await self._turn()
            await asyncio.sleep(0)  # yield, even where every turn is followed by another
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._next_wake()):
                    await self._woken.wait()

    def _next_wake(self) -> float | None:
        at = min(self._next_try, min(self._due_at.values(), default=_NEVER))
        return None if at == _NEVER else max(at, asyncio.get_running_loop().time() + _SHORTEST_WAIT_SECONDS)

    async def _turn(self) -> None:
        mailbox, self._mailbox = self._mailbox, []
        try:
            for event, decided in mailbox:
                await self._apply(event, decided)
            await self._decide_about_models()
            self._decide_about_starts()
        finally:
            for _, decided in mailbox:
                if not decided.done():
                    decided.set_result(None)

    async def _apply(self, event: Event, decided: asyncio.Future[None]) -> None:
        with self._faults.contained("an event could not be applied", happened=event.name) as applied:
            await event.apply()
        if applied.error is not None and not decided.done():
            decided.set_exception(applied.error)
            decided.exception()  # it need not be retrieved

    async def _decide_about_models(self) -> None:
        time = asyncio.get_running_loop().time()
        due = (member for member, at in self._due_at.items() if at <= time)
        members = list(dict.fromkeys((*self._changed, *due)))
        self._changed = {}
        async for some in in_batches(members):
            self._decide_and_carry_out([member for member in some if member in self._due_at])

    def _decide_and_carry_out(self, members: Sequence[Member]) -> None:
        time = asyncio.get_running_loop().time()
        seen: list[ModelNow] = []
        for member in members:
            with self._faults.contained("a model could not be looked at", model=member.name):
                seen.append(member.now())
        decided = self._decide(Snapshot(models=seen), time)[0].models
        for member in members:
            self._due_at[member] = time + self._carry_out(member, decided.get(member.name))

    def _carry_out(self, member: Member, decided: ModelDecision | None) -> float:
        """Carry out what was decided about a member; in how many seconds to decide about it again."""
        if decided is not None:
            with self._faults.contained("a model could not follow a decision", model=member.name):
                member.carry_out(decided)
                return decided.recheck_in
        with self._faults.contained("a model could not be ended", model=member.name):
            member.force_end()
        return _AFTER_FAULT_SECONDS

    def _decide_about_starts(self) -> None:
        """Which instances may start now, or once more. Behind the stops of this turn, which have made their claims."""
        time = asyncio.get_running_loop().time()
        self._next_try = time + _AFTER_FAULT_SECONDS  # where a bug is in the way
        with self._faults.contained("starts could not be decided about"):
            failures = [failure for failure in self._retries if not failure.again.done()]
            here = self.room.now()
            decision, whole = self._decide(Snapshot(room=here, retries=[one.now() for one in failures]), time)
            self.room.follow(here, decision.moves, time)
            for failure in failures:
                if failure.instance in decision.retries:
                    failure.follow(decision.retries[failure.instance])
            pauses = [seconds for seconds in decision.retries.values() if seconds]
            again = min(*pauses, _NEVER, _NEVER if whole else _AFTER_FAULT_SECONDS)
            self._next_try = min(time + again, decision.moves.look_again)

    def _decide(self, snapshot: Snapshot, time: float) -> tuple[Decision, bool]:
        """The decision, and whether it is complete: parts that a bug prevented are left out."""
        with self._faults.contained("the fleet could not be decided about: each part is decided about alone"):
            return decide(snapshot, time), True
        found = Decision()
        for name, part in _parts(snapshot):
            with self._faults.contained("a part of the fleet could not be decided about", part=name):
                found = found.and_of(decide(part, time))
        return found, False


def _parts(snapshot: Snapshot) -> Iterator[tuple[str, Snapshot]]:
    """What can be decided about by itself, with a name for the log."""
    for model in snapshot.models:
        yield model.id, Snapshot(models=[model])
    yield "room", Snapshot(room=snapshot.room)
    for retry in snapshot.retries:
        yield retry.instance, Snapshot(retries=[retry])
