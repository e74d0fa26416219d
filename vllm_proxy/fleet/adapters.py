"""The adapters of one model: a snapshot of the files of each, what its engines hold of them, and what is shown of that.

For `model` and its supervisors. Every adapter is alone: what fails is its own, and neither its base nor another waits
for it. Where the files of one that is served cannot be had any more, the snapshot before stays.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from vllm_proxy.domain.adapters import Adapter
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.engine.adapter_source import AdapterError
from vllm_proxy.engine.interface import Engine
from vllm_proxy.fleet.adapter_use import AdapterUse, Store
from vllm_proxy.fleet.engine_adapters import EngineAdapters, Wish
from vllm_proxy.fleet.instance import Instance
from vllm_proxy.runtime.background import run_once
from vllm_proxy.traffic.registry import Registry

type AdapterState = Literal["loading", "ready", "error"]


@dataclass(frozen=True, slots=True)
class AdapterNow:
    """One adapter, as it is shown."""

    id: str
    state: AdapterState
    message: str | None  # why it is in error; of a ready one, what of it failed all the same
    instances: tuple[int, ...]  # that hold it


class _Files:
    """The snapshot of one adapter."""

    def __init__(self, store: Store, changed: Callable[[], None]) -> None:
        self.folder: Path | None = None  # the last one that could be had
        self.problem: str | None = None  # why what is wanted now cannot be
        self.is_here = True  # what is wanted is on this machine: it takes no long time
        self._store = store
        self._changed = changed
        self._wanted: tuple[str, str, bool] | None = None
        self._kept: asyncio.Task[None] | None = None  # keeps `folder` from being removed
        self._making: asyncio.Task[None] | None = None

    @property
    def pending(self) -> bool:
        """Whether what is wanted is being copied, or fetched."""
        return self._making is not None

    def follow(self, adapter: Adapter, engine: EngineSpec, *, again: bool) -> None:
        """Have a snapshot of this. `again`: where that has failed before, too."""
        wanted = adapter.path, adapter.revision, adapter.is_hub_id
        if wanted == self._wanted and not (again and self.problem is not None):
            return
        self._wanted, self.problem, self.is_here = wanted, None, not adapter.is_hub_id
        if self._making is not None:
            self._making.cancel()
        make = partial(self._hold, engine, adapter.path, is_hub_id=adapter.is_hub_id)
        fault = partial(self._failed, "a fault of the daemon itself: see its log")
        self._making = run_once(make, f"files of adapter {adapter.id}", fault)

    async def _hold(self, engine: EngineSpec, path: str, *, is_hub_id: bool) -> None:
        try:
            async with self._store.held(engine, path, is_hub_id=is_hub_id) as folder:
                if self._kept is not None:
                    self._kept.cancel()
                self._kept, self._making = self._making, None
                self.folder = folder
                self._changed()
                await asyncio.Event().wait()  # until it is cancelled
        except AdapterError as error:
            self._failed(str(error))

    def _failed(self, why: str) -> None:
        self._making, self.problem = None, why
        self._changed()

    def close(self) -> None:
        """Nobody wants it any more."""
        for task in (self._kept, self._making):
            if task is not None:
                task.cancel()


class ModelAdapters:
    """Those of one model. `changed` is called after every change of what is shown of them."""

    def __init__(
        self,
        spec: ModelSpec,
        use: AdapterUse,
        registry: Registry,
        changed: Callable[[], None],
        no_room: Callable[[EngineSpec], str | None],
    ) -> None:
        """`no_room`: why an engine of this spec has no room for one and no other comes; None: another comes."""
        self.use = use
        self.registry = registry
        self.model_id = spec.id
        self._spec = spec
        self._changed = changed
        self._no_room = no_room
        self._files: dict[str, _Files] = {}
        self._engines: list[EngineAdapters] = []
        self._is_needed = False  # an engine runs, or has

    def follow(self, spec: ModelSpec, *, again: bool = False) -> None:
        """The file wants these. `again`: what has failed is tried once more."""
        if not (again or spec.adapters != self._spec.adapters):
            return
        self._spec = spec
        if self._is_needed:
            self._follow(again=again)
            for engine in self._engines:
                engine.look(again=again)
        self._changed()

    def prepare(self) -> None:
        """An engine comes: have the files ready. Those that could not be had are tried again."""
        self._is_needed = True
        if self._spec.adapters:
            self._follow(again=True)

    def close(self) -> None:
        """No engine runs any more, and none will."""
        for files in self._files.values():
            files.close()
        self._files.clear()

    def of_engine(self, instance: Instance, engine: Engine, *, adopted: bool) -> EngineAdapters:
        """What the engine of an instance holds; as a context manager, while it lives."""
        return EngineAdapters(self, engine, instance.index, instance.spec.engine, adopted=adopted)

    def join(self, engine: EngineAdapters) -> None:
        """An engine lives."""
        self._engines.append(engine)

    def leave(self, engine: EngineAdapters) -> None:
        """It does not any more."""
        self._engines.remove(engine)
        self.moved()

    def moved(self) -> None:
        """An engine holds others than before, or one has failed there."""
        if self._spec.adapters:
            self._changed()

    @property
    def is_copying(self) -> bool:
        """Whether files are being copied that are on this machine."""
        return any(files.pending and files.is_here for files in self._files.values())

    def wishes(self) -> Mapping[str, Wish]:
        """What engines are to hold, by id; without a folder where there is none yet."""
        enabled = (adapter for adapter in self._spec.adapters.values() if adapter.enabled)
        return {one.id: Wish(self._files[one.id].folder, one.rank) for one in enabled if one.id in self._files}

    def _follow(self, *, again: bool) -> None:
        wanted = {adapter.id: adapter for adapter in self._spec.adapters.values() if adapter.enabled}
        for name in [name for name in self._files if name not in wanted]:
            self._files.pop(name).close()
        for name, adapter in wanted.items():
            files = self._files.get(name)
            if files is None:
                files = self._files[name] = _Files(self.use.store, self._look)
            files.follow(adapter, self._spec.engine, again=again)

    def _look(self) -> None:
        """Other files are there, or are not to be had."""
        for engine in self._engines:
            engine.look()
        self._changed()

    def now(self) -> list[AdapterNow]:
        """Each that is enabled, in the file's order."""
        return [self._now(adapter) for adapter in self._spec.adapters.values() if adapter.enabled]

    def problems(self) -> dict[str, str]:
        """Why those in error are, by id."""
        return {one.id: one.message or "" for one in self.now() if one.state == "error"}

    def _now(self, adapter: Adapter) -> AdapterNow:
        files = self._files.get(adapter.id)
        holders = tuple(sorted(one.index for one in self._engines if adapter.id in one.serves))
        failed = files.problem if files else None
        serving = [one for one in self._engines if one.is_open]
        of_engines = [self._problem(one, adapter.id) for one in serving]
        first = failed or next((why for why in of_engines if why is not None), None)
        if holders:
            return AdapterNow(adapter.id, "ready", first, holders)
        hopeless = (failed is not None and files is not None and files.folder is None) or (
            bool(of_engines) and None not in of_engines
        )
        return AdapterNow(adapter.id, "error" if hopeless else "loading", first if hopeless else None, ())

    def _problem(self, engine: EngineAdapters, name: str) -> str | None:
        """Why an engine does not hold one, and will not."""
        if (lacks := engine.lacks_room(name)) is None:
            return engine.problem(name)
        why = self._no_room(engine.spec)
        return None if why is None else f"{lacks}: {why}"
