"""What all supervisors of one daemon share, as narrow interfaces, so that tests can replace them with fakes.

`daemon` makes the real one.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.devices import Allocation
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.engine.ending import Owner
from vllm_proxy.engine.interface import Engine
from vllm_proxy.engine.meter import Watchers
from vllm_proxy.engine.nap import Nap
from vllm_proxy.engine.probe import Probe
from vllm_proxy.engine.state import EngineRecord
from vllm_proxy.fleet.adapter_use import AdapterUse
from vllm_proxy.fleet.loop import FleetLoop
from vllm_proxy.runtime.threads import Offload
from vllm_proxy.traffic.registry import Registry


class Launcher(Protocol):
    """What starts engines."""

    def allocation(self, spec: EngineSpec) -> Allocation:
        """What an engine of this spec needs, as long as nothing places it elsewhere."""

    def running(
        self, model: ModelSpec, instance: str, allocation: Allocation, owner: Owner
    ) -> contextlib.AbstractAsyncContextManager[Engine]:
        """An engine that runs inside the block."""

    def adopted(
        self, record: EngineRecord, spec: EngineSpec, owner: Owner
    ) -> contextlib.AbstractAsyncContextManager[Engine]:
        """One that runs already, for this spec."""

    async def end_orphan(self, record: EngineRecord, owner: Owner) -> None:
        """End one that an earlier daemon left."""

    async def objection(self, model: ModelSpec) -> Diagnosis | None:
        """Why no engine would start for a model, as far as it can be known without starting one."""

    async def option_names(self, spec: EngineSpec) -> frozenset[str]:
        """The options that the vLLM of a spec takes, without dashes; none where they are not known."""


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What every supervisor shares."""

    launcher: Launcher
    loop: FleetLoop
    registry: Registry
    probe: Probe
    nap: Nap
    adapters: AdapterUse
    skip_drain: asyncio.Event  # set: stop draining
    stopping: asyncio.Event  # set: the daemon stops, nothing that has no end goes on
    offload: Offload = asyncio.to_thread
    mask: Callable[[str], str] = str  # hides the secrets in a text
    watchers: Watchers = field(default_factory=Watchers)
