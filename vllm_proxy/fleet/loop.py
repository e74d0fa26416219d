"""The one loop that decides for the whole fleet: events come in, `domain/decide.py` says what follows, that is done.

Owns the order of things: which events came, which models are to be looked at, and when to look again though nothing
happens. Requests, hands, the file and engines say what happened (`post`, `changed`, `wake`) and get on at once; nobody
else starts or stops an instance. Each turn applies the events, then has each model concerned do what was decided
about it, then decides which starts may go. Between a look and its deed nothing is awaited: what was true when it was
decided is true when it is done. A bug in one event, model or start is contained, and the others go on.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import batched
from typing import Protocol

from vllm_proxy.domain.config import Restart
from vllm_proxy.domain.decide import Decision, ModelNow, Moves, Retry, Snapshot, decide
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.fleet.faults import Faults
from vllm_proxy.fleet.room import Room
from vllm_proxy.runtime.background import keep_running, tell

_BATCH = 50  # models that are decided about at once
_AFTER_FAULT_SECONDS = 1.0  # until what could not be decided or done is tried again
_SHORTEST_WAIT_SECONDS = 0.01  # until the loop looks again though nothing happened, whatever it is told
_NEVER = math.inf


class Event(Protocol):
    """Something that changes what is wanted."""

    @property
    def name(self) -> str:
        """As the log has it: "start of chat"."""

    def apply(self) -> None:
        """Change it. Called by the loop, one event after another."""


class Member(Protocol):
    """A model, as the loop sees it."""

    @property
    def name(self) -> str:
        """Its id; another model may have had it before."""

    def now(self) -> ModelNow:
        """What it is now."""

    def carry_out(self, moves: Moves) -> None:
        """Begin what was decided."""

    def end_anyway(self) -> None:
        """A bug kept it from being decided about. If it is to end, begin that all the same."""


class _Failure:
    """An instance that asks whether its engine is started once more."""

    def __init__(self, asked: Retry, restart: Callable[[], Restart], told: Callable[[float], None]) -> None:
        self.again: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked = asked
        self._restart = restart
        self._told = told
        self._said = False

    def now(self) -> Retry:
        """With the policy as it is now."""
        return replace(self._asked, restart=self._restart())

    @property
    def instance(self) -> str:
        """Its name."""
        return self._asked.instance

    def follow(self, seconds: float | None) -> None:
        """Start again in so many seconds, which is told once; None: give up."""
        if seconds is not None and not self._said:
            self._said = True
            tell([self._told], seconds)
        if not seconds:
            self.again.set_result(seconds is not None)


class FleetLoop:
    """Decides for all models of one daemon, or of one test."""

    def __init__(self) -> None:
        self.room = Room(self.wake)
        self._faults = Faults()
        self._mailbox: list[tuple[Event, asyncio.Future[None]]] = []
        self._look_at: dict[Member, float] = {}  # every member, and when to look at it though nothing happened
        self._changed: dict[Member, None] = {}  # in the order it happened
        self._failures: list[_Failure] = []
        self._next_try = _NEVER  # when the next engine that failed is started again
        self._news = asyncio.Event()
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

    # What happens

    def post(self, event: Event) -> asyncio.Future[None]:
        """Something happened. Done when what follows has begun; cancelled when nobody decides any more.

        Who waits for it may give up: what was posted is done. An exception of the event is the future's; it is in
        the log already.
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
        self._look_at[member] = _NEVER
        self.changed(member)

    def changed(self, member: Member) -> None:
        """A member, or an instance of it, is not what it was."""
        if member in self._look_at:
            self._changed[member] = None
            self.wake()

    def forget(self, member: Member) -> None:
        """It is gone; what is still told of it changes nothing."""
        self._changed.pop(member, None)
        self._look_at.pop(member, None)

    def wake(self) -> None:
        """Look again."""
        self._news.set()

    async def may_start_again(
        self,
        instance: str,
        reason: Reason,
        failures: int,
        restart: Callable[[], Restart],
        told: Callable[[float], None],
    ) -> bool:
        """Wait until an engine that failed so many times in a row is started again; False when it is given up.

        `restart`: the policy, which may change meanwhile. `told`: called once with the seconds that this takes.
        """
        since, jitter = asyncio.get_running_loop().time(), random.random()  # noqa: S311 - no secret
        failure = _Failure(Retry(instance, reason, failures, since, jitter, restart()), restart, told)
        self._failures.append(failure)
        self.wake()
        try:
            return await failure.again
        finally:
            self._failures.remove(failure)

    # What is done about it

    async def _run(self) -> None:
        while True:
            self._news.clear()
            await self._turn()
            await asyncio.sleep(0)  # others get on, though there should be news in every turn
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._next_look()):
                    await self._news.wait()

    def _next_look(self) -> float | None:
        at = min(self._next_try, min(self._look_at.values(), default=_NEVER))
        return None if at == _NEVER else max(at, asyncio.get_running_loop().time() + _SHORTEST_WAIT_SECONDS)

    async def _turn(self) -> None:
        mailbox, self._mailbox = self._mailbox, []
        try:
            for event, decided in mailbox:
                self._apply(event, decided)
            await self._decide_about_models()
            self._decide_about_starts()
        finally:
            for _, decided in mailbox:
                if not decided.done():
                    decided.set_result(None)

    def _apply(self, event: Event, decided: asyncio.Future[None]) -> None:
        with self._faults.contained("an event could not be applied", happened=event.name) as applied:
            event.apply()
        if applied.error is not None and not decided.done():
            decided.set_exception(applied.error)
            decided.exception()  # nobody has to take it

    async def _decide_about_models(self) -> None:
        time = asyncio.get_running_loop().time()
        due = (member for member, at in self._look_at.items() if at <= time)
        members = list(dict.fromkeys((*self._changed, *due)))
        self._changed = {}
        for some in batched(members, _BATCH, strict=False):
            self._look_and_do([member for member in some if member in self._look_at])
            if len(members) > _BATCH:
                await asyncio.sleep(0)  # requests go on meanwhile

    def _look_and_do(self, members: Sequence[Member]) -> None:
        time = asyncio.get_running_loop().time()
        seen: list[ModelNow] = []
        for member in members:
            with self._faults.contained("a model could not be looked at", model=member.name):
                seen.append(member.now())
        moves = self._decide(Snapshot(models=seen), time)[0].models
        for member in members:
            self._look_at[member] = time + self._carry_out(member, moves.get(member.name))

    def _carry_out(self, member: Member, moves: Moves | None) -> float:
        """Have a member do what was decided, where anything was; in how many seconds to look at it again."""
        if moves is not None:
            with self._faults.contained("a model could not follow a decision", model=member.name):
                member.carry_out(moves)
                return moves.look_again
        with self._faults.contained("a model could not be ended", model=member.name):
            member.end_anyway()
        return _AFTER_FAULT_SECONDS

    def _decide_about_starts(self) -> None:
        """Which instances may start now, or once more. Behind the stops of this turn, which have made their claims."""
        time = asyncio.get_running_loop().time()
        self._next_try = time + _AFTER_FAULT_SECONDS  # where a bug is in the way
        with self._faults.contained("starts could not be decided about"):
            failures = [failure for failure in self._failures if not failure.again.done()]
            snapshot = Snapshot(claims=self.room.claims(), retries=[failure.now() for failure in failures])
            decision, whole = self._decide(snapshot, time)
            self.room.follow(decision.admit, decision.wait)
            for failure in failures:
                if failure.instance in decision.retries:
                    failure.follow(decision.retries[failure.instance])
            pauses = [seconds for seconds in decision.retries.values() if seconds]
            self._next_try = time + min(*pauses, _NEVER, _NEVER if whole else _AFTER_FAULT_SECONDS)

    def _decide(self, snapshot: Snapshot, time: float) -> tuple[Decision, bool]:
        """What follows, and whether that is all: what a bug keeps from being decided is left out."""
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
    yield "claims", Snapshot(claims=snapshot.claims)
    for retry in snapshot.retries:
        yield retry.instance, Snapshot(retries=[retry])
