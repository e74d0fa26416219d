"""What the room asks of one instance, and tells it: the part of a supervisor that is a `Tenant`.

Owns the claim of the instance on devices, from the wish to start until nothing of its engine is left.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime

from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.ledger import Depth
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.engine.interface import Engine
from vllm_proxy.fleet.claims import ELSEWHERE, HOST_MEMORY, Claim, Waits
from vllm_proxy.fleet.history import History
from vllm_proxy.traffic.endpoint import Endpoint


def gave_way(for_whom: str, *, awaits_request: bool) -> Diagnosis:
    """Why a model does not run that made room for an instance, of the machine's memory, or for itself elsewhere."""
    whom, when = for_whom.removesuffix("/0"), datetime.now(UTC).strftime("%H:%M:%S")
    again = "its next request starts it" if awaits_request else "it waits for room"
    if for_whom == HOST_MEMORY:
        why = f"ended while asleep at {when} UTC: {HOST_MEMORY} is full, and it slept longest"
    elif for_whom == ELSEWHERE:
        why = f"ended where it slept at {when} UTC, to start elsewhere: others have its devices"
    else:
        why = f"gave way to {whom} at {when} UTC"
    return Diagnosis(Reason.GAVE_WAY, f"{why}; {again}")


class Tenancy(ABC):
    """Of one instance. `changed` is called after every change of what it shows."""

    engine: Engine | None  # what runs of it now

    def __init__(
        self, spec: ModelSpec, history: History, changed: Callable[[], None], wanted_since: Callable[[], float | None]
    ) -> None:
        self.spec = spec  # its policy may change at any time, its engine while it is stopped
        self.endpoint: Endpoint | None = None
        self.claim: Claim | None = None
        self.waits: Waits | None = None  # for room, and why
        self.has_room = False  # it rests in error since there was none, and there is by now
        self.gives_way_to: str | None = None  # the instance that waits for its room, HOST_MEMORY, ELSEWHERE
        self.yields: Depth | None = None  # how far
        self.wanted_since = wanted_since
        self._stop_yielding = asyncio.Event()
        self._resumed = asyncio.Event()
        self._serves_on = asyncio.Event()  # it was to give way, and did not; or sleeps
        self._history = history
        self._changed = changed

    @property
    @abstractmethod
    def state(self) -> State:
        """What it is now."""

    @abstractmethod
    def _can_sleep(self) -> bool:
        """Whether an engine of it runs that was started so that it may sleep."""

    @abstractmethod
    def _show_wait(self, why: Diagnosis | None) -> None:
        """A start waits for something that may not come; None: not any more."""

    @property
    def waiting_because(self) -> str | None:
        """Why its start waits for room, in a sentence; None: it does not."""
        return self.waits.because if self.waits is not None and self.state is State.LOADING else None

    @property
    def gives_way_because(self) -> str | None:
        """Why it is to sleep or to end for others, in a sentence; None: it is not."""
        if self.gives_way_to == HOST_MEMORY:
            return f"ends while it sleeps: {HOST_MEMORY} is full"
        if self.gives_way_to == ELSEWHERE:
            return "ends where it sleeps, to start elsewhere: others have its devices"
        return None if self.gives_way_to is None else f"gives way to {self.gives_way_to}"

    @property
    def awaits_room(self) -> bool:
        """Whether it would run, and nothing of it does yet, or it sleeps."""
        would = self.state in {State.LOADING, State.SLEEPING}
        return self.has_room or (would and self.claim is not None and self.claim.waits)

    def stop_yielding(self) -> None:
        """One that gives way is stopped by hand, or for good: no longer than any other."""
        self._stop_yielding.set()

    # For the room

    def idle_since(self) -> float | None:
        """Since when it has had no request in flight; None: it has some, or does not serve."""
        return self.endpoint.idle_since if self.endpoint and not self.endpoint.in_flight else None

    def in_flight(self) -> int:
        """Its requests."""
        return self.endpoint.in_flight if self.endpoint else 0

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call it once when no request is in flight any more."""
        if self.endpoint:
            self.endpoint.on_idle(callback)

    def start_seconds(self) -> float:
        """What a start takes: as the last ones of its spec went."""
        return self._history.start_seconds(self.spec.engine)

    def wake_seconds(self) -> float:
        """What a wake takes: as the last one of its spec went."""
        return self._history.wake_seconds(self.spec.engine)

    def measured(self) -> int | None:
        """Bytes that the last engine of its spec had of each device; None: not known."""
        return self._history.memory(self.spec.engine)

    def may_sleep(self) -> bool:
        """Whether its engine can, and nothing speaks against it."""
        return self._can_sleep() and self._history.why_awake(self.spec.engine) is None

    @property
    def why_awake(self) -> str | None:
        """Why its engine is not put to sleep, where that is known; None: it is."""
        if self.spec.engine.sleep is None:
            return "what runs of it was started without `sleep`"
        if self.engine is not None and not self.engine.place.may_sleep:
            return "its GPU has the machine's own memory, where level 1 would give nothing back"
        if self.engine is not None and not self._can_sleep():
            return "`devices.host_memory` is less than what level 1 would move there"
        return self._history.why_awake(self.spec.engine)

    def keeps(self) -> int | None:
        """Bytes of each device that an engine of its spec had asleep; None: not known."""
        return self._history.residue(self.spec.engine)

    def on_room(self) -> None:
        """It was refused, and could come by now: for the fleet loop to decide."""
        self.has_room = self.state is State.ERROR
        self._changed()

    def on_yield(self, depth: Depth, for_whom: str) -> None:
        """It is to give way: to sleep or to stop, once the fleet loop says so."""
        self.gives_way_to, self.yields = for_whom, depth
        self._changed()

    def on_resume(self) -> None:
        """Nobody waits for its room any more: it serves on."""
        self._resumed.set()

    def on_wait(self, why: Waits | None) -> None:
        """Why its start waits for room; None: it does not any more."""
        self.waits = why
        self._show_wait(None if why is None else why.diagnosis)

    # For its supervisor

    def forget_return(self) -> None:
        """That it was to give way and did not, or slept, is over: it wakes, or somebody wants something else of it."""
        self._serves_on.clear()

    @property
    def serves_on(self) -> bool:
        """Whether it was to give way, and nobody waits for its room any more."""
        return self._serves_on.is_set()

    def _leave(self) -> None:
        """Nobody is to come to its devices until nothing of its engine is left; one that only waited is not heeded."""
        if self.claim is not None and self.claim.allocation is None:
            self._release_claim()
        elif self.claim is not None:
            self.claim.goes()

    def _release_claim(self) -> None:
        self.waits = None
        self._end_yielding()
        if self.claim is not None:
            self.claim.done()
            self.claim = None

    def _end_yielding(self) -> None:
        self.gives_way_to = self.yields = None
        self._stop_yielding.clear()
        self._resumed.clear()
