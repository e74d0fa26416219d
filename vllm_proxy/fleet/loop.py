"""The one loop that decides for the whole fleet: events come in, `domain/decide.py` says what follows, that is done.

What happens elsewhere (a request that nobody serves, a word by hand, another file, a death, time that passes) is put
into the mailbox or marks a model as changed, and returns at once; nothing is started or stopped there. In each turn the
loop applies the events, looks at what is, and does what was decided, without a pause between look and deed.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import batched
from typing import Protocol

import structlog

from vllm_proxy.domain.config import Restart
from vllm_proxy.domain.decide import Decision, ModelNow, Moves, Retry, Snapshot, decide
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.fleet.room import Room
from vllm_proxy.runtime.background import keep_running

log = structlog.get_logger()

_BATCH = 50  # models that are decided about at once
_AFTER_FAULT_SECONDS = 1.0
_NEVER = math.inf


class Event(Protocol):
    """Something that changes what is wanted."""

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


class _Failure:
    """An instance that asks whether its engine is started once more."""

    def __init__(self, asked: Retry, restart: Callable[[], Restart], told: Callable[[float], None]) -> None:
        self.asked = asked
        self.restart = restart
        self.told = told
        self.again: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._said = False

    def say(self, seconds: float) -> None:
        """Tell, once, how long it takes."""
        if not self._said:
            self._said = True
            self.told(seconds)


class FleetLoop:
    """Decides for all models of one daemon, or of one test."""

    def __init__(self) -> None:
        self.room = Room(self.wake)
        self._mailbox: list[tuple[Event, asyncio.Future[None]]] = []
        self._changed: dict[Member, None] = {}  # in the order it happened
        self._failures: list[_Failure] = []
        self._again: dict[Member, float] = {}  # when to look at one, though nothing happened
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

    # What happens

    def post(self, event: Event) -> asyncio.Future[None]:
        """Something happened. Done when what follows has begun; cancelled when nobody decides any more."""
        decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closed:
            decided.cancel()
        else:
            self._mailbox.append((event, decided))
            self.wake()
        return decided

    def changed(self, member: Member) -> None:
        """A model, or an instance of it, is not what it was."""
        self._changed[member] = None
        self.wake()

    def forget(self, member: Member) -> None:
        """A model is gone."""
        self._changed.pop(member, None)
        self._again.pop(member, None)

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

        `told`: called once with the seconds that this takes.
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
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._next_look()):
                    await self._news.wait()

    def _next_look(self) -> float | None:
        at = min(self._next_try, min(self._again.values(), default=_NEVER))
        return None if at == _NEVER else at

    async def _turn(self) -> None:
        mailbox, self._mailbox = self._mailbox, []
        for event, _ in mailbox:
            _guarded(event.apply, "an event could not be applied", happened=type(event).__name__)
        time = asyncio.get_running_loop().time()
        due = (member for member, at in self._again.items() if at <= time)
        members = list(dict.fromkeys((*self._changed, *due)))
        self._changed = {}
        for some in batched(members, _BATCH, strict=False) if members else [()]:
            self._look_and_do(some)
            if len(members) > _BATCH:
                await asyncio.sleep(0)  # requests go on meanwhile
        for _, decided in mailbox:
            if not decided.done():
                decided.set_result(None)

    def _look_and_do(self, members: tuple[Member, ...]) -> None:
        """No pause between look and deed: what was true when it was decided is true when it is done."""
        time = asyncio.get_running_loop().time()
        models = []
        for member in members:
            self._again[member] = time + _AFTER_FAULT_SECONDS  # unless it is decided about
            now = _guarded(member.now, "a model could not be looked at", model=member.name)
            models += [now] if now is not None else []
        failures = [replace(one.asked, restart=one.restart()) for one in self._failures if not one.again.done()]
        snapshot = Snapshot(models, self.room.claims(), failures)
        for decision in _decisions(snapshot, time):
            self._carry_out(decision, members, time)

    def _carry_out(self, decision: Decision, members: tuple[Member, ...], time: float) -> None:
        for member in members:
            if moves := decision.models.get(member.name):
                self._again[member] = time + moves.look_again
                _guarded(partial(member.carry_out, moves), "a model could not follow a decision", model=member.name)
        self.room.follow(decision.admit, decision.wait)
        self._try_again(decision.retries, time)

    def _try_again(self, retries: Mapping[str, float | None], time: float) -> None:
        self._next_try = _NEVER
        for failure in self._failures:
            if failure.again.done() or failure.asked.instance not in retries:
                continue
            seconds = retries[failure.asked.instance]
            if seconds is None or seconds <= 0:
                failure.again.set_result(seconds is not None)
                continue
            self._next_try = min(self._next_try, time + seconds)
            failure.say(seconds)


def _decisions(snapshot: Snapshot, time: float) -> Iterator[Decision]:
    """What follows. A fault in what concerns one model is logged, and holds nothing up for the others."""
    try:
        yield decide(snapshot, time)
    except Exception:
        log.exception("a fault in the decision for the fleet: each part is decided about alone")
        parts = [Snapshot(models=[model]) for model in snapshot.models]
        parts += [Snapshot(claims=snapshot.claims), Snapshot(retries=snapshot.retries)]
        for part in parts:
            one = _guarded(partial(decide, part, time), "a part of the fleet cannot be decided about")
            if one is not None:
                yield one


def _guarded[T](work: Callable[[], T], what: str, **fields: str) -> T | None:
    """A bug in here must not leave the fleet without anybody who decides."""
    try:
        return work()
    except Exception:
        log.exception(what, **fields)
        return None
