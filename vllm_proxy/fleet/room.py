"""The claims of instances on devices, from when an engine asks to start until it serves, and while it is ended.

Owns the claims and their order, for supervisors, which make and withdraw them. Who may start is not decided here:
each change wakes the fleet loop, which has `domain/decide.py` say who is admitted and why others are not.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from vllm_proxy.domain.decide import Claim, NotNow, Standing
from vllm_proxy.domain.devices import Allocation
from vllm_proxy.runtime.background import tell

_MOST_TOLD = 100  # who waits, in one turn of the loop: each tells others


def _ignore(_why: NotNow | None) -> None:
    """Nobody wants to know."""


class _Entry:
    """A claim, and who waits for it to be admitted."""

    def __init__(self, claim: Claim, told: Callable[[NotNow | None], None] = _ignore) -> None:
        self.claim = claim
        self.admitted: asyncio.Future[Allocation] = asyncio.get_running_loop().create_future()
        self._told = told
        self._said: NotNow | None = None

    def admit(self, allocation: Allocation) -> None:
        """Let it start, unless that is wanted no more."""
        if not self.admitted.done():
            self.claim = replace(self.claim, standing=Standing.LOADS, allocation=allocation)
            self.admitted.set_result(allocation)
            self.say(None)

    def say(self, why: NotNow | None) -> bool:
        """Tell who waits, once a change; whether it was one."""
        if why == self._said or (why is not None and self.admitted.done()):
            return False
        self._said = why
        tell([self._told], why)
        return True


class Departure:
    """The claim of an engine that is being ended: nobody who needs what it has may start meanwhile."""

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
        told: Callable[[NotNow | None], None] = _ignore,
    ) -> AsyncIterator[Allocation]:
        """Wait until the instance may start, then keep others off its devices. Gives what it was allocated.

        `at_once`: do not wait, since the engine runs already. `told`: called with why it waits, and with None when
        nothing is in its way any more.
        """
        standing = Standing.LOADS if at_once else Standing.ASKS
        entry = _Entry(Claim(next(self._keys), instance, allocation, standing), told)
        self._starting[entry.claim.key] = entry
        self._wake()
        try:
            yield allocation if at_once else await entry.admitted
        finally:
            self.remove(entry)

    def leave(self, instance: str, allocation: Allocation, *, untried: bool = False) -> Departure:
        """Keep everybody waiting who needs what this engine has and was not let in yet, until it is gone.

        `untried`: an earlier daemon left it. Until it was tried to end it, nobody starts at all: its port and its
        memory are not free, and nobody knows whose they are.
        """
        entry = _Entry(Claim(next(self._keys), instance, allocation, Standing.LEAVES, untried=untried))
        self._leaving[entry.claim.key] = entry
        self._wake()
        return Departure(self, entry)

    def claims(self) -> tuple[Claim, ...]:
        """In the order they came; what leaves stands in front."""
        return tuple(entry.claim for entry in (*self._leaving.values(), *self._starting.values()))

    def follow(self, admit: Mapping[int, Allocation], wait: Mapping[int, NotNow]) -> None:
        """Let in who may start, and tell the others why not. Called by the fleet loop."""
        for key, allocation in admit.items():
            if entry := self._starting.get(key):
                entry.admit(allocation)
        told = 0
        for key, why in wait.items():
            if told == _MOST_TOLD:
                self._wake()
                return
            if entry := self._starting.get(key):
                told += entry.say(why)

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
