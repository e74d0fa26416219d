"""The claims of instances on devices, while engines start or leave. `domain/decide.py` says who may start.

A claim is made, changed and withdrawn here; each change wakes the fleet loop, which admits who waits or says why not.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from vllm_proxy.domain.decide import Claim, NotNow, Standing
from vllm_proxy.domain.devices import Allocation


def _ignore(_why: NotNow | None) -> None:
    """Nobody wants to know."""


class _Entry:
    """A claim, and who waits for it to be admitted."""

    def __init__(self, claim: Claim, told: Callable[[NotNow | None], None] = _ignore) -> None:
        self.claim = claim
        self.admitted: asyncio.Future[Allocation] = asyncio.get_running_loop().create_future()
        self._told = told
        self._said: NotNow | None = None

    def say(self, why: NotNow | None) -> None:
        """Tell who waits, once a change."""
        if why != self._said:
            self._said = why
            self._told(why)


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
    """Every claim, in the order they came. `wake` is called after each change."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._entries: list[_Entry] = []
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
        self._entries.append(entry)
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
        self._entries.insert(0, entry)
        self._wake()
        return Departure(self, entry)

    def claims(self) -> tuple[Claim, ...]:
        """In the order they came; what leaves stands in front."""
        return tuple(entry.claim for entry in self._entries)

    def follow(self, admit: Mapping[int, Allocation], wait: Mapping[int, NotNow]) -> None:
        """Let in who may start, and tell the others why not. Called by the fleet loop."""
        for entry in list(self._entries):
            key = entry.claim.key
            if key in wait:
                entry.say(wait[key])
            elif key in admit and not entry.admitted.done():
                entry.claim = replace(entry.claim, standing=Standing.LOADS, allocation=admit[key])
                entry.admitted.set_result(admit[key])
                entry.say(None)

    def not_ended(self) -> dict[str, str]:
        """The instances whose engines could not be ended, and why."""
        claims = (entry.claim for entry in self._entries)
        return dict(sorted((claim.instance, claim.not_ended) for claim in claims if claim.not_ended is not None))

    def change(self, entry: _Entry, *, not_ended: str) -> None:
        """Its engine could not be ended."""
        entry.claim = replace(entry.claim, not_ended=not_ended, untried=False)
        self._wake()

    def remove(self, entry: _Entry) -> None:
        """It needs nothing any more."""
        if entry in self._entries:
            self._entries.remove(entry)
            self._wake()
