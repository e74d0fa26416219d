"""Starts that share a GPU go one after another, and behind what leaves it: vLLM measures the device while it loads."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class DeviceGate:
    """First come, first served, for each set of devices."""

    def __init__(self) -> None:
        self._line: list[tuple[frozenset[str], asyncio.Event]] = []  # holders and waiters, in the order they came

    @asynccontextmanager
    async def hold(self, devices: frozenset[str], *, at_once: bool = False) -> AsyncIterator[None]:
        """Wait until nobody who came earlier shares a device, then keep the others waiting.

        `at_once`: do not wait, since the engine runs already.
        """
        place = (devices, asyncio.Event())
        if at_once:
            place[1].set()
        self._line.append(place)
        try:
            self._admit()
            await place[1].wait()
            yield
        finally:
            self._line.remove(place)
            self._admit()

    def leave(self, devices: frozenset[str]) -> Callable[[], None]:
        """Keep everybody waiting who shares a device and was not let in yet, until the returned function is called."""
        place = (devices, asyncio.Event())
        self._line.insert(0, place)

        def gone() -> None:
            self._line.remove(place)
            self._admit()

        return gone

    def _admit(self) -> None:
        for position, (devices, admitted) in enumerate(self._line):
            if not any(_overlap(devices, earlier) for earlier, _ in self._line[:position]):
                admitted.set()


def _overlap(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two sets may name the same GPU. An index and a UUID may: nothing here can tell."""
    return any(a == b or a.isdigit() != b.isdigit() for a in one for b in other)
