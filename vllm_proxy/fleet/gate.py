"""Who may start now. Its one rule: no engine starts beside one that loads on, or has not left, what it needs.

Starts that share a GPU go one after another, and behind what leaves it: vLLM measures the device while it loads. An
engine that could not be ended keeps its GPUs and its instance's name until it is gone.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from vllm_proxy.domain.devices import overlap


def _hear_nothing(_why: str | None) -> None:
    """Nobody wants to know."""


class _Place:
    """In the line: of a holder, of one that waits, or of one that leaves."""

    def __init__(self, instance: str, devices: frozenset[str], told: Callable[[str | None], None]) -> None:
        self.instance = instance
        self.devices = devices
        self.admitted = asyncio.Event()
        self.stuck: str | None = None  # why it cannot leave
        self.told = told
        self.heard: str | None = None

    def hear(self, why: str | None) -> None:
        if why != self.heard:
            self.heard = why
            self.told(why)


class Leaving:
    """The place of an engine that is being ended: nobody who needs what it has is let in meanwhile."""

    def __init__(self, gate: "DeviceGate", place: _Place) -> None:
        self._gate = gate
        self._place = place

    def fails(self, why: str) -> None:
        """It could not be ended; that is tried again."""
        self._place.stuck = why
        self._gate.admit()

    def gone(self) -> None:
        """Nothing of it is left."""
        self._gate.remove(self._place)


class DeviceGate:
    """First come, first served, for each set of devices."""

    def __init__(self) -> None:
        self._line: list[_Place] = []  # holders and waiters, in the order they came

    @asynccontextmanager
    async def hold(
        self,
        devices: frozenset[str],
        instance: str = "",
        *,
        at_once: bool = False,
        told: Callable[[str | None], None] = _hear_nothing,
    ) -> AsyncIterator[None]:
        """Wait until nobody who came earlier shares a device or the instance, then keep the others waiting.

        `at_once`: do not wait, since the engine runs already. `told`: called with why it waits for an engine that could
        not be ended, and with None when it does so no more.
        """
        place = _Place(instance, devices, told)
        if at_once:
            place.admitted.set()
        self._line.append(place)
        try:
            self.admit()
            await place.admitted.wait()
            yield
        finally:
            self.remove(place)

    def leave(self, devices: frozenset[str], instance: str = "") -> Leaving:
        """Keep everybody waiting who needs what this one has and was not let in yet, until it is gone."""
        place = _Place(instance, devices, _hear_nothing)
        self._line.insert(0, place)
        return Leaving(self, place)

    def not_ended(self) -> dict[str, str]:
        """The instances whose engines could not be ended, and why."""
        return dict(sorted((place.instance, place.stuck) for place in self._line if place.stuck is not None))

    def admit(self) -> None:
        """Let in who needs to wait no more, and tell the others what for."""
        for position, place in enumerate(self._line):
            if place.admitted.is_set():
                continue
            before = [other for other in self._line[:position] if _conflict(place, other)]
            stuck = next(
                (f"{other.instance} could not be ended: {other.stuck}" for other in before if other.stuck), None
            )
            if not before:
                place.admitted.set()
            place.hear(stuck)

    def remove(self, place: _Place) -> None:
        """It needs nothing any more."""
        self._line.remove(place)
        self.admit()


def _conflict(one: _Place, other: _Place) -> bool:
    same = one.instance == other.instance != ""
    return same or overlap(one.devices, other.devices)
