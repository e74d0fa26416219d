"""What one engine holds of its model's adapters, brought to what is wanted while it serves.

For `adapters`. Each is loaded, changed and unloaded by a task of its own, so that one that hangs holds up no other.
Requests are sent to an engine for those alone that it is known to hold. What has failed is tried again with other
files, when somebody starts the model by hand, and by the next engine.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import structlog

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.engine.adapters import Failed
from vllm_proxy.engine.interface import Engine
from vllm_proxy.fleet.adapter_use import AdapterUse
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import run_once, spawn
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.registry import Registry

log = structlog.get_logger()

_AT_ONCE = 4  # that one engine loads at the same time
_OPENING_SECONDS = 10.0  # in which it takes no requests because adapters are being loaded
_UNDERWAY_SECONDS = 0.05  # until a request that was just sent has found its adapter
_DEATH_SECONDS = 2.0  # in which an engine that gives no answer turns out to have ended
_CLOSING_SECONDS = 5.0  # for what is under way when it is to sleep
_ASK_PAUSES = (0.2, 1.0, 5.0)  # seconds between questions what it holds
_WITHOUT_WEIGHTS = 2  # the level of a sleep
_ALL = ""  # what such a question is about


@dataclass(frozen=True, slots=True)
class Wish:
    """What an engine is to hold of one adapter."""

    folder: Path | None  # None: there is none yet
    rank: int | None  # None: not known


class Owner(Protocol):
    """The adapters of its model."""

    model_id: str
    use: AdapterUse
    registry: Registry

    def wishes(self) -> Mapping[str, Wish]:
        """What is wanted, by id."""

    @property
    def is_copying(self) -> bool:
        """Whether files are about to be there."""

    def join(self, engine: "EngineAdapters") -> None:
        """An engine lives."""

    def leave(self, engine: "EngineAdapters") -> None:
        """It does not any more."""

    def moved(self) -> None:
        """An engine holds others than before, or one has failed there."""


class EngineAdapters:
    """Of one engine, while it lives: a context manager."""

    def __init__(self, owner: Owner, engine: Engine, index: int, spec: EngineSpec, *, adopted: bool) -> None:
        """`spec`: what it was started for. `adopted`: by an earlier daemon."""
        self.index = index
        self.spec = spec
        self.serves: set[str] = set()  # those that requests are sent for
        self._owner = owner
        self._engine = engine
        self._held: dict[str, Path] = {}
        self._is_known = not adopted or spec.lora is None  # whether that is so
        # After a sleep of level 2 it has their names, and of their weights what lies there: whoever ended before it
        # gave them again is not known.
        self._renews = adopted and spec.sleep == _WITHOUT_WEIGHTS
        self._stale: set[str] = set()
        self._failed: dict[str, tuple[Path | None, str]] = {}  # by id: what was to be held, and why it is not
        self._mute: str | None = None  # why it cannot be asked what it holds
        self._endpoint: Endpoint | None = None
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._rests = asyncio.Event()  # nothing is under way

    def __enter__(self) -> Self:
        if self._is_known:
            self._owner.use.note(self._engine.place.own_name, ())
        self._owner.join(self)
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._busy.values():
            task.cancel()
        self.serves.clear()
        self._endpoint = None
        self._owner.leave(self)
        self._owner.use.forget(self._engine.place.own_name)

    @property
    def is_open(self) -> bool:
        """Whether it serves, or is about to."""
        return self._endpoint is not None

    def problem(self, name: str) -> str | None:
        """Why it does not hold one that it is to hold."""
        failed = self._failed.get(name)
        return self._mute if failed is None else failed[1]

    def lacks_room(self, name: str) -> str | None:
        """Why it cannot hold one, as it was started."""
        lora, wish = self.spec.lora, self._owner.wishes().get(name)
        if lora is None:
            return "its engine was started without room for adapters"
        if wish is not None and (wish.rank or 0) > lora.rank:
            return f"its rank {wish.rank} is more than the {lora.rank} that its engine was started for"
        return None

    async def open(self, endpoint: Endpoint) -> None:
        """Requests are about to be sent there: load first what can be loaded at once, each alone."""
        self._endpoint = endpoint
        self._rests.clear()
        self.look()
        endpoint.adapters = frozenset(self.serves)
        if self._rests.is_set():
            return
        rests = spawn(self._rests.wait(), f"adapters of {endpoint.instance}")
        try:
            ends: set[asyncio.Future[Any]] = {rests, self._engine.exited}
            await clock.wait(ends, _OPENING_SECONDS)
        finally:
            rests.cancel()

    async def close(self) -> None:
        """It is to sleep: begin nothing more, and let what is under way end."""
        self._endpoint = None
        began = asyncio.get_running_loop().time()
        while self._busy and (left := _CLOSING_SECONDS - clock.elapsed(began)) > 0:
            await clock.wait({*self._busy.values()}, left)
        for task in self._busy.values():
            task.cancel()
            self._is_known = False

    def wakes(self, level: int) -> None:
        """It wakes from a sleep of this level: of level 2 without their weights, so they are given again."""
        if level != _WITHOUT_WEIGHTS:
            return
        self._stale = {*self._held}
        self._renews = not self._is_known
        self.serves.clear()

    def look(self, *, again: bool = False) -> None:
        """Begin what is to be done. `again`: what has failed, too."""
        if again:
            self._failed.clear()
            self._mute = None
        if self._endpoint is not None and self._mute is None and self.spec.lora is not None:
            if self._is_known:
                self._look_at_each()
            elif not self._busy:
                self._begin(_ALL, self._ask)
        if not self._busy and not self._owner.is_copying:
            self._rests.set()

    def _look_at_each(self) -> None:
        served = {*self.serves}
        for name in {*self._held, *self._owner.wishes()} - self._busy.keys():
            if self._has_to(name):
                self._begin(name, partial(self._bring, name))
            elif name in self._held and self._held[name] == self._target(name) and name not in self._stale:
                self.serves.add(name)
                self._failed.pop(name, None)
        if served != self.serves:
            self._show()

    def _target(self, name: str) -> Path | None:
        wish = self._owner.wishes().get(name)
        return None if wish is None else wish.folder

    def _has_to(self, name: str) -> bool:
        """Whether it does not hold of one what it is to hold, and there is something to do about that."""
        held, target = self._held.get(name), self._target(name)
        if name in self._failed and self._failed[name][0] == target:
            return False
        if name not in self._owner.wishes():
            return held is not None
        return target is not None and self.lacks_room(name) is None and (held != target or name in self._stale)

    def _begin(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._rests.clear()
        what = f"adapter {name}" if name else "adapters"
        fault = partial(self._fault, name)
        self._busy[name] = run_once(partial(self._run, name, work), f"{what} on {self._engine.place.instance}", fault)

    async def _run(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        finally:
            self._busy.pop(name, None)
        self.look()
        self._owner.moved()

    def _fault(self, name: str) -> None:
        why = "a fault of the daemon itself: see its log"
        if name == _ALL:
            self._mute = why
        else:
            self._failed[name] = self._target(name), why
        self.look()
        self._owner.moved()

    def _show(self) -> None:
        """Requests are sent there for others than before."""
        if self._endpoint is not None:
            self._endpoint.adapters = frozenset(self.serves)
            self._owner.registry.hold_adapters(self._owner.model_id)
        self._owner.moved()

    async def _ask(self) -> None:
        """Learn what it holds."""
        place, why = self._engine.place, ""
        for pause in (0.0, *_ASK_PAUSES):
            await clock.sleep(pause)
            found = await self._owner.use.engines.loaded(place)
            if not isinstance(found, Failed):
                self._owner.use.note(place.own_name, found.values())
                self._held, self._is_known = dict(found), True
                self._stale = {*found} if self._renews else self._stale & found.keys()
                self._renews = False
                self.serves &= found.keys()
                return
            why = found.why
        self._mute = f"cannot ask its engine which adapters it holds: {why}"
        log.warning("an engine does not say which adapters it holds", instance=place.instance, why=why)

    async def _bring(self, name: str) -> None:
        """Have it hold of one what it is to hold."""
        async with self._slots:
            if not self._has_to(name) or (name in self._held and not await self._unload(name)):
                return
            if (folder := self._target(name)) is not None:
                await self._load(name, folder)

    async def _unload(self, name: str) -> bool:
        self.serves.discard(name)
        self._show()
        if self._endpoint is not None and self._endpoint.in_flight:
            await clock.sleep(_UNDERWAY_SECONDS)
        place = self._engine.place
        failed = await self._owner.use.engines.unload(place, name)
        if failed is not None:
            await self._note_failure(name, self._target(name), failed)
            return False
        self._held.pop(name, None)
        self._stale.discard(name)
        log.info("adapter unloaded", adapter=name, instance=place.instance)
        return True

    async def _load(self, name: str, folder: Path) -> None:
        place = self._engine.place
        self._owner.use.note(place.own_name, (folder,))
        failed = await self._owner.use.engines.load(place, name, folder)
        if failed is not None:
            await self._note_failure(name, folder, failed)
            return
        self._held[name] = folder
        self._failed.pop(name, None)
        log.info("adapter loaded", adapter=name, instance=place.instance)

    async def _note_failure(self, name: str, target: Path | None, failed: Failed) -> None:
        if not failed.answered:
            if await clock.wait({self._engine.exited}, _DEATH_SECONDS):
                return  # it gives no answer because it has ended: the next one is given them
            self._is_known = False
        self._failed[name] = target, failed.why
        log.warning("an adapter failed", adapter=name, instance=self._engine.place.instance, why=failed.why)
