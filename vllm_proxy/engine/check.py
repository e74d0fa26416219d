"""Checks the options of a model against its own vLLM before an engine is started with them.

For writes over REST and for starts. `problems` does not wait for a table of options that is still being read: then
nothing is found, and vLLM's own parser refuses wrong options soon.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from vllm_proxy.domain import options
from vllm_proxy.domain.config import EngineDefaults, EngineSpec, ModelSpec
from vllm_proxy.domain.options import OptionTable
from vllm_proxy.engine.options import OptionTables, vllm_version
from vllm_proxy.engine.program import Programs
from vllm_proxy.runtime.background import run_once
from vllm_proxy.runtime.threads import Offload

_NAMES_SECONDS = 30.0
_DISK_SECONDS = 10.0  # of a disk that does not answer, nothing is known


class OptionCheck:
    """What the vLLM of each engine would refuse. `offload` runs what reads its installation in a thread."""

    def __init__(self, programs: Programs, tables: OptionTables, offload: Offload = asyncio.to_thread) -> None:
        self._programs = programs
        self._tables = tables
        self._offload = offload
        self._prefetching: set[asyncio.Task[None]] = set()
        self._versions: dict[Path, str] = {}  # of vLLM, by the Python that runs it

    async def problems(self, model: ModelSpec) -> list[tuple[str, str]]:
        """(key path, message) for each; none where nothing is known of its vLLM, which is then looked at."""
        try:
            async with asyncio.timeout(_DISK_SECONDS):
                table = await self._offload(self._known, model.engine)
        except TimeoutError:
            return []
        if table is None:
            self.prefetch([model.engine])
            return []
        return options.problems(table, model.engine, model.written)

    async def names(self, spec: EngineSpec) -> frozenset[str]:
        """The names of all options, waited for if they are being read; none where they cannot be had soon."""
        table = await self._table(spec)
        return options.names(table) if table else frozenset()

    async def of_engine(self, engine: EngineDefaults) -> OptionTable | None:
        """All options of the vLLM that `[engine]` starts, waited for; None where they cannot be had soon."""
        return await self._table(EngineSpec(model="any", command=engine.command, env=engine.env))

    async def _table(self, spec: EngineSpec) -> OptionTable | None:
        python = await self._offload(self._programs.python, spec)
        if python is None:
            return None
        try:
            async with asyncio.timeout(_NAMES_SECONDS):
                return await self._tables.load(python, self._programs.environment(spec))
        except TimeoutError:
            return None

    @property
    def versions(self) -> frozenset[str]:
        """Those of vLLM that were found so far."""
        return frozenset(self._versions.values())

    def default_share(self) -> float | None:
        """The part of a GPU that vLLM takes where nobody says how much; None: it is not known yet."""
        return self._tables.default("gpu-memory-utilization")

    def prefetch(self, specs: Iterable[EngineSpec]) -> None:
        """Have the options of each vLLM read in the background, once a version."""
        task = run_once(partial(self._prefetch, list(specs)), "options of vLLM")
        self._prefetching.add(task)
        task.add_done_callback(self._prefetching.discard)

    async def close(self) -> None:
        """End what still runs."""
        for task in self._prefetching:
            task.cancel()
        await asyncio.gather(*self._prefetching, return_exceptions=True)
        await self._tables.close()

    async def _prefetch(self, specs: Sequence[EngineSpec]) -> None:
        for python, env in await self._offload(self._sources, specs):
            await self._tables.load(python, env)

    def _sources(self, specs: Sequence[EngineSpec]) -> list[tuple[Path, Mapping[str, str]]]:
        """Where options are read from: each Python, with each environment that it would run with."""
        found: dict[tuple[Path, frozenset[tuple[str, str]]], Mapping[str, str]] = {}
        for spec in specs:
            if python := self._programs.python(spec):
                found[python, frozenset(spec.variables.items())] = self._programs.environment(spec)
                if version := vllm_version(python):
                    self._versions = {**self._versions, python: version}
        return [(python, env) for (python, _), env in found.items()]

    def _known(self, spec: EngineSpec) -> OptionTable | None:
        python = self._programs.python(spec)
        return self._tables.known(python, self._programs.environment(spec)) if python else None
