"""The claims of instances on devices: while an engine wants to start, loads, or is ended.

Owns the claims and their order, for supervisors, which make and withdraw them. Who may start is not decided here: each
change wakes the fleet loop, and `domain/decide.py` says who is admitted and why others are not.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from vllm_proxy.domain.decide import Claim, ClaimState, NotNow
from vllm_proxy.domain.devices import Allocation
from vllm_proxy.runtime.background import notify

_MOST_NOTIFIED = 100  # waiting starts in one turn of the loop: each notification has listeners


def _ignore(_why: NotNow | None) -> None:
    """No listener."""


class _Entry:
    """A claim, and the start that waits for its admission."""

    def __init__(self, claim: Claim, on_change: Callable[[NotNow | None], None] = _ignore) -> None:
        self.claim = claim
        self.admitted: asyncio.Future[Allocation] = asyncio.get_running_loop().create_future()
        self._on_change = on_change
        self._last: NotNow | None = None

    def admit(self, allocation: Allocation) -> None:
        """Admit its start, unless that is wanted no more."""
        if not self.admitted.done():
            self.claim = replace(self.claim, state=ClaimState.LOADING, allocation=allocation)
            self.admitted.set_result(allocation)
            self.notify_waiting(None)

    def notify_waiting(self, why: NotNow | None) -> bool:
        """Report why it waits, once for each change; whether it was one."""
        if why == self._last or (why is not None and self.admitted.done()):
            return False
        self._last = why
        notify([self._on_change], why)
        return True


class Departure:
    """The claim of an engine that is being ended: nothing that needs its devices may start meanwhile."""

    def __init__(self, room: "Room", entry: _Entry) -> None:
        self._room = room
        self._entry = entry

    def failed(self, why: str) -> None:
        """It could not be ended; that is tried again."""
        self._room.change(self._entry, not_ended=why)

    def done(self) -> None:
        """Nothing of it is left."""
        self._room.remove(self._entry)


class Room:
    """Every claim. `wake` is called after each change."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._leaving: dict[int, _Entry] = {}  # by key; in the order they came
        self._starting: dict[int, _Entry] = {}
        self._keys = itertools.count()

    @asynccontextmanager
    async def hold(
        self,
        instance: str,
        allocation: Allocation,
        *,
        at_once: bool = False,
        on_change: Callable[[NotNow | None], None] = _ignore,
    ) -> AsyncIterator[Allocation]:
        """Wait for admission, then keep others off its devices. Gives what it was allocated.

        `at_once`: do not wait, since the engine runs already. `on_change`: called with why it waits, and with None when
        nothing is in its way any more.
        """
        state = ClaimState.LOADING if at_once else ClaimState.WAITING
        entry = _Entry(Claim(next(self._keys), instance, allocation, state), on_change)
        self._starting[entry.claim.key] = entry
        self._wake()
        try:
            yield allocation if at_once else await entry.admitted
        finally:
            self.remove(entry)

    def leave(self, instance: str, allocation: Allocation, *, untried: bool = False) -> Departure:
        """Keep starts waiting that need this engine's devices and are not admitted yet, until it is gone.

        `untried`: an earlier daemon left it. Until an attempt to end it was made, nothing starts at all: its port
        and its memory may be in use.
        """
        entry = _Entry(Claim(next(self._keys), instance, allocation, ClaimState.LEAVING, untried=untried))
        self._leaving[entry.claim.key] = entry
        self._wake()
        return Departure(self, entry)

    def claims(self) -> tuple[Claim, ...]:
        """In the order they came; those of leaving engines first."""
        return tuple(entry.claim for entry in (*self._leaving.values(), *self._starting.values()))

    def follow(self, admit: Mapping[int, Allocation], wait: Mapping[int, NotNow]) -> None:
        """Admit the starts that may go, and report to the others why not. Called by the fleet loop."""
        for key, allocation in admit.items():
            if entry := self._starting.get(key):
                entry.admit(allocation)
        notified = 0
        for key, why in wait.items():
            if notified == _MOST_NOTIFIED:
                self._wake()
                return
            if entry := self._starting.get(key):
                notified += entry.notify_waiting(why)

    def not_ended(self) -> dict[str, str]:
        """The instances whose engines could not be ended, and why."""
        claims = (entry.claim for entry in self._leaving.values())
        return dict(sorted((claim.instance, claim.not_ended) for claim in claims if claim.not_ended is not None))

    def change(self, entry: _Entry, *, not_ended: str) -> None:
        """Its engine could not be ended."""
        entry.claim = replace(entry.claim, not_ended=not_ended, untried=False)
        self._wake()

    def remove(self, entry: _Entry) -> None:
        """It needs nothing any more."""
        key = entry.claim.key
        self._leaving.pop(key, None)
        self._starting.pop(key, None)
        self._wake()
