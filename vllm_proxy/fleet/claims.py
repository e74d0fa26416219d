"""What one instance holds of the devices, or waits for: from when it wants to start until nothing of it is left.

A claim belongs to its supervisor, which notifies it, and is in the room as long as it lasts (`fleet/room.py`). Who is
admitted and who gives way is not decided here.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog

from vllm_proxy.domain import host_memory
from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.decide import ASKS_AGAIN_SECONDS
from vllm_proxy.domain.devices import Allocation
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.ledger import Depth, Hold, Short, Standing, Where
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.engine.interface import Engine
from vllm_proxy.engine.program import LaunchError
from vllm_proxy.runtime.background import notify

RESIDUE_BYTES = 2 * 2**30  # of each GPU: what an engine may keep that has never slept
HOST_MEMORY = "[devices] host_memory"  # whom a sleeper gives way to, where that is no instance: it is full
ELSEWHERE = "its own start on other devices"  # whom a sleeper gives way to that moves
_SEEN = 0.5  # of a guess: less was measured before it slept

log = structlog.get_logger()

_STAYS = frozenset({Standing.COMES, Standing.SERVES})


@dataclass(frozen=True, slots=True)
class Waits:
    """Why a start waits. `reason`: where nobody knows that it ends; `no_room`: what requests are told then."""

    because: str
    reason: Reason | None = None
    no_room: str | None = None
    ready_in: float | None = None  # seconds; a guess
    needs: int | None = None  # bytes of each device, the largest; None: they are not managed
    waits_for: tuple[str, ...] = ()  # instances that are in its way
    behind: tuple[str, ...] = ()  # instances whose turn is before its

    @property
    def diagnosis(self) -> Diagnosis | None:
        """As it is shown where it may never end."""
        return None if self.reason is None else Diagnosis(self.reason, self.because)


class Tenant(Protocol):
    """An instance, as the room sees it."""

    @property
    def name(self) -> str:
        """As "chat/0"."""

    @property
    def spec(self) -> ModelSpec:
        """What it runs, with its policy as it is now."""

    @property
    def engine(self) -> Engine | None:
        """What runs of it now."""

    def wanted_since(self) -> float | None:
        """Since when a request or a person has waited for its model, on the loop's clock; None: nobody does."""

    def idle_since(self) -> float | None:
        """Since when it has had no request in flight; None: it has some."""

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call it once, when that is so. It has some."""

    def start_seconds(self) -> float:
        """What a start takes; a guess."""

    def wake_seconds(self) -> float:
        """What a wake takes; a guess."""

    def in_flight(self) -> int:
        """Its requests."""

    def measured(self) -> int | None:
        """Bytes that its last engine had of each device; None: not known."""

    def on_wait(self, why: Waits | None) -> None:
        """Why its start waits; None: it does not any more."""

    def may_sleep(self) -> bool:
        """Whether its engine can, and nothing speaks against it."""

    def keeps(self) -> int | None:
        """Bytes of each device that an engine of its spec had asleep; None: not known."""

    def on_yield(self, depth: Depth, for_whom: str) -> None:
        """It is to give way, so far, to an instance, for HOST_MEMORY or to be started ELSEWHERE."""

    def on_resume(self) -> None:
        """It was to give way, and nobody waits for its room any more."""

    def on_room(self) -> None:
        """It was refused, and could come by now."""


class Claim:
    """A part of the devices. `changed` is called after each change."""

    def __init__(self, tenant: Tenant, asked_at: float, changed: Callable[["Claim"], None]) -> None:
        self.tenant = tenant
        self.name = tenant.name
        self.model = tenant.spec.id
        self.standing: Standing | None = None  # None: it waits
        self.allocation: Allocation | None = None  # since it was admitted
        self.unmanaged: Allocation | None = None  # what it uses where nobody manages devices, once that was asked
        self.since = asked_at  # it waits, or serves
        self.place: Where = ()  # as `room.decide` hands it back
        self.short: Short | None = None
        self.not_ended: str | None = None  # why its engine could not be ended
        self.start_seconds, self.wake_seconds = tenant.start_seconds(), tenant.wake_seconds()
        self.measured = tenant.measured()
        self.awaits_look = False  # it serves, and the devices were not looked at since
        self.found: int | None = None  # bytes that its engine has of each device, as measured then; 0: it cannot be
        self.watches_idle = False  # somebody waits for its last request
        self.is_done = False
        self._host: tuple[int, int] | None = None  # a guess, and what its processes had before; None: it never slept
        self.keeps: int | None = None  # bytes of each device that it has asleep, or would have; None: it may not sleep
        self.woke_seconds: float | None = None  # of its last wake; None: its engine was started, or it failed
        self.depth: Depth | None = None  # how far it goes, while it yields or goes
        self._asks = True
        self._slept_at = asked_at
        self._was_asleep = False
        self._wanted_since: float | None = None
        self._wanted_until = 0.0
        self._admitted: asyncio.Future[Allocation] = asyncio.get_running_loop().create_future()
        self._may_go: asyncio.Future[None] | None = None
        self._changed = changed
        self._told: Waits | None = None

    def wanted_since(self) -> float | None:
        """Since when somebody has waited for its model, though not always the same one; None: nobody does now.

        Clients that give up and ask again are as patient as one that does not.
        """
        since, time = self.tenant.wanted_since(), asyncio.get_running_loop().time()
        if since is not None:
            if self._wanted_since is None or since > self._wanted_until + ASKS_AGAIN_SECONDS:
                self._wanted_since = since
            self._wanted_until = time
        return None if since is None else self._wanted_since

    def forget_wait(self) -> None:
        """Who waited for its model is served: the next request waits its own time."""
        self._wanted_since = None

    @property
    def waits(self) -> bool:
        """Whether it was not admitted yet, and still wants to be: to start, or to wake where it sleeps."""
        return self._asks

    # For its supervisor

    async def admission(self) -> Allocation:
        """What it was admitted to, once it is.

        Raises:
            LaunchError: it is refused.

        """
        return await self._admitted

    def serves(self) -> None:
        """Its engine has allocated what it needs: others may measure the devices."""
        self.standing, self.since = Standing.SERVES, asyncio.get_running_loop().time()
        self.awaits_look, self.watches_idle = self.found is None, False
        self.forget_wait()
        self.start_seconds, self.wake_seconds = self.tenant.start_seconds(), self.tenant.wake_seconds()
        self._changed(self)

    def sleeps(self, keeps: int | None) -> None:
        """Its engine has given its memory back, but for this much of each device, where that is known."""
        self.standing, self.since, self.keeps = Standing.SLEEPS, asyncio.get_running_loop().time(), keeps
        self._slept_at = self.since
        self.depth, self._may_go, self.awaits_look = None, None, False  # nobody looks for what it had awake
        self._admitted = asyncio.get_running_loop().create_future()
        self._changed(self)

    def takes_host(self, takes: Mapping[str, int], before: int) -> None:
        """Its engine sleeps at level 1, or has: what it had of its devices goes to the machine's memory, or is there.

        `before`: bytes of its processes before it first did; 0: not known.
        """
        if self._host is None:
            self._host = self.host_estimate(takes), before

    def host_estimate(self, takes: Mapping[str, int]) -> int:
        """What it would have there, as far as that is known before it has slept."""
        engine = self.tenant.engine
        return host_memory.estimate(takes, 0 if engine is None else engine.output.weights_bytes)

    def host_bytes(self) -> int:
        """What it has of the machine's memory by sleeping, then or now: as measured, once it was."""
        if self._host is None:
            return 0
        engine, (guess, before) = self.tenant.engine, self._host
        grown = 0 if engine is None or not before else engine.memory_bytes - before
        return grown if grown > guess * _SEEN else guess

    def wakes(self) -> None:
        """Where it sleeps, it wants its room again."""
        if self.standing is Standing.SLEEPS and not self._asks:
            self._asks, self.since, self.woke_seconds = True, asyncio.get_running_loop().time(), None
            self.place, self.short, self.measured = (), None, self.tenant.measured()  # nothing of its last wait counts
            self._changed(self)

    def sleeps_on(self) -> None:
        """Where it sleeps, it does not want its room any more."""
        if self.standing is Standing.SLEEPS and self._asks:
            self._asks, self.since, self.place, self.short = False, self._slept_at, (), None
            self.tell(None)
            self._changed(self)

    def woke(self, seconds: float) -> None:
        """Its engine has woken, which took so long."""
        self.woke_seconds = seconds

    async def may_go(self) -> None:
        """One that gives way has no request in flight any more. Returns when nobody measures its devices."""
        if self.standing is Standing.YIELDS:
            self._may_go = asyncio.get_running_loop().create_future()
            self._changed(self)
            await self._may_go

    def goes(self) -> None:
        """Its engine is being ended: nobody may come where it sets memory free."""
        if self.standing is not None:
            self.standing, self._asks = Standing.GOES, False
            self._changed(self)

    def failed(self, why: str) -> None:
        """Its engine could not be ended, which is tried again."""
        self.standing, self.not_ended = Standing.GOES, why
        self._changed(self)

    def done(self) -> None:
        """Nothing of it is left, or it does not want to start any more."""
        self.is_done = True
        self._changed(self)

    # For the room

    def held(self, takes: Mapping[str, int]) -> Hold:
        """As the room decides about it. `takes`: what it has of each device."""
        policy, standing = self.tenant.spec.policy, self.standing
        assert standing is not None, "it was admitted"
        return Hold(
            self.name, self.model, takes, standing, self._keeps_of(takes),
            always=policy.start == "always" and policy.enabled,
            priority=policy.priority,
            since=self.since,
            idle_since=self._idle_since(),
            to=self.depth if standing in {Standing.YIELDS, Standing.GOES} else None,
            start_seconds=self.start_seconds,
            wake_seconds=self.wake_seconds,
            not_ended=self.not_ended,
        )  # fmt: skip

    def _idle_since(self) -> float | None:
        """Since when it has had no request in flight, or has slept; None: it has some, or moves."""
        if self.standing is Standing.SLEEPS:
            return self.since
        return self.tenant.idle_since() if self.standing is Standing.SERVES else None

    def _keeps_of(self, takes: Mapping[str, int]) -> int | None:
        """What it has of each device while it sleeps, or would; None: it may not."""
        if self.standing is Standing.SLEEPS:
            return max(takes.values(), default=0)
        if not self.tenant.may_sleep():
            return None
        assert self.allocation is not None, "it was admitted"
        if not self.allocation.gpus:  # on a processor nothing comes back
            return max(takes.values(), default=0)
        known = self.tenant.keeps()
        return RESIDUE_BYTES if known is None else known

    @property
    def return_seconds(self) -> float:
        """What it takes until it serves, once it is admitted; a guess."""
        return self.start_seconds if self.allocation is None else self.wake_seconds

    def admit(self, allocation: Allocation) -> None:
        """Its engine may start."""
        self.allocation, self.standing, self._asks = allocation, Standing.COMES, False
        self.place, self.short = (), None
        if not self._admitted.done():
            self._admitted.set_result(allocation)
        self.tell(None)

    def refuse(self, reason: Reason, why: str) -> None:
        """Its engine will not start, though the ledger may have room for it."""
        self._asks = False
        if not self._admitted.done():
            self._admitted.set_exception(LaunchError(reason, why))

    @property
    def is_unsized(self) -> bool:
        """Whether what it needs can only be said of a device whose size is known."""
        spec = self.tenant.spec.engine
        return bool(spec.memory) and spec.devices != ()

    def give_way(self, depth: Depth, for_whom: str) -> None:
        """It takes no new requests from now on."""
        self._was_asleep = self.standing is Standing.SLEEPS
        self.standing, self.depth, self._asks = Standing.YIELDS, depth, False
        notify([self.tenant.on_yield], depth, ELSEWHERE if for_whom == self.name else for_whom)

    @property
    def stays(self) -> bool:
        """Whether it loads or serves, and nobody has asked it to go."""
        return self.standing in _STAYS

    def meets(self, other: "Claim") -> bool:
        """Whether both have something of one device."""
        mine, theirs = (one.allocation for one in (self, other))
        return mine is not None and theirs is not None and not mine.devices.isdisjoint(theirs.devices)

    def resume(self) -> None:
        """Nobody waits for its room any more."""
        self.standing, self._may_go = Standing.SERVES, None
        notify([self.tenant.on_resume])

    def is_wanted(self, time: float) -> bool:
        """Whether somebody waits for its model, or may ask again soon."""
        return self._is_always or (self._wanted_since is not None and time <= self._wanted_until + ASKS_AGAIN_SECONDS)

    @property
    def ends(self) -> bool:
        """Whether its engine is being ended, or is about to be."""
        return self.standing in {Standing.YIELDS, Standing.GOES} and self.depth is not Depth.SLEEP

    @property
    def at_rest_since(self) -> float | None:
        """Since when it has slept, where nobody waits for it, though it may come where there is room; else None."""
        is_wanted = self._asks and (self._is_always or self.tenant.wanted_since() is not None)
        return self._slept_at if self.standing is Standing.SLEEPS and not is_wanted else None

    @property
    def _is_always(self) -> bool:
        return self.tenant.spec.policy.start == "always"

    @property
    def may_resume(self) -> bool:
        """Whether requests of it are in flight still."""
        return not self.is_drained and not self._was_asleep

    @property
    def is_drained(self) -> bool:
        """Whether it gives way, and only waits for others that measure its devices."""
        return self.standing is Standing.YIELDS and self._may_go is not None

    def let_go(self) -> None:
        """Nobody measures its devices."""
        self.standing = Standing.GOES
        if self._may_go is not None and not self._may_go.done():
            self._may_go.set_result(None)

    def tell(self, why: Waits | None) -> bool:
        """Report why it waits, once for each change; whether it was one."""
        if why == self._told:
            return False
        if self._told is None and why is not None and why.needs is not None:
            log.info("waits for room", instance=self.name, why=why.because)
        self._told = why
        notify([self.tenant.on_wait], why)
        return True


class Leftover:
    """What an engine of an earlier daemon holds, until it is ended. `changed` is called after each change."""

    def __init__(self, name: str, takes: Mapping[str, int], changed: Callable[["Leftover"], None]) -> None:
        self.name = name
        self.takes = takes
        self.untried = True  # nobody has tried to end it: its port and its memory may be in use
        self.not_ended: str | None = None
        self.is_done = False
        self._changed = changed

    def failed(self, why: str) -> None:
        """It could not be ended; that is tried again."""
        self.not_ended, self.untried = why, False
        self._changed(self)

    def done(self) -> None:
        """Nothing of it is left."""
        self.is_done = True
        self._changed(self)
