"""Which snapshots of adapters the engines of the fleet may read, so that those that nobody may can be removed.

An engine uses every snapshot that it was given, until it has ended: one that was unloaded may be read again for a
request in flight, and an engine whose adapter's files are gone dies. While one of an earlier daemon has not said what
it holds, nothing is removed.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.engine.adapters import Adapters
from vllm_proxy.errors import StartupError
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import run_once

_PAUSE_SECONDS = 1.0  # several engines may end at once


class Store(Protocol):
    """Where snapshots are kept."""

    def held(self, spec: EngineSpec, path: str, *, is_hub_id: bool) -> AbstractAsyncContextManager[Path]:
        """The snapshot of what an adapter's path, or its id of the hub, means now; it stays while the block lasts.

        Raises:
            AdapterError: there is none.

        """

    async def open(self) -> None:
        """Make it.

        Raises:
            OSError: it cannot be made.
            StartupError: it is somebody else's.

        """

    async def sweep(self, used: Callable[[], Iterable[Path]]) -> None:
        """Remove those that nobody holds or uses."""


class AdapterUse:
    """Of one daemon."""

    def __init__(self, engines: Adapters, store: Store) -> None:
        self.engines = engines
        self.store = store
        self._given: dict[str, set[Path] | None] = {}  # by the own name of an engine; None: it was not asked yet
        self._sweeping: asyncio.Task[None] | None = None
        self._again = False
        self._closed = False

    async def open(self) -> None:
        """Have a place for snapshots.

        Raises:
            StartupError: there cannot be one.

        """
        try:
            await self.store.open()
        except OSError as error:
            where = error.filename or "the state directory"
            msg = f"cannot keep adapters in {where}: {error.strerror}; choose another with --state-dir"
            raise StartupError(msg) from error

    def expect(self, own_name: str) -> None:
        """An engine of an earlier daemon may use any."""
        self._given[own_name] = None

    def note(self, own_name: str, folders: Iterable[Path]) -> None:
        """An engine is given these, or holds them."""
        self._given[own_name] = {*(self._given.get(own_name) or ()), *folders}

    def forget(self, own_name: str) -> None:
        """An engine has ended."""
        if own_name in self._given and not self._closed:
            del self._given[own_name]
            self.sweep_soon()

    def close(self) -> None:
        """The daemon stops, and engines may live on, which then use what they were given: nothing is removed."""
        self._closed = True

    def sweep_soon(self) -> None:
        """Fewer may be needed than before."""
        self._again = True
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = run_once(self._sweep, "sweep of adapters' snapshots")

    async def _sweep(self) -> None:
        while self._again:
            self._again = False
            await clock.sleep(_PAUSE_SECONDS)
            if not self._closed and None not in self._given.values():
                await self.store.sweep(self._used)

    def _used(self) -> set[Path]:
        return {folder for given in self._given.values() for folder in given or ()}
