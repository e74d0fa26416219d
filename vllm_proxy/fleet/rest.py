"""The sleep of one engine, from its last request until it serves again: each step verified, each failure its end.

For supervisors. What vLLM says is not believed: memory has to come back, and a canary to answer as before
(`engine/nap.py`). Two failures in a row of one spec, and its engines are ended in place of put to sleep.
"""

import asyncio
from typing import Any

from vllm_proxy.domain.canary import Canary
from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.engine.interface import Engine
from vllm_proxy.engine.nap import Failed, Nap
from vllm_proxy.fleet.claims import Claim
from vllm_proxy.fleet.history import History
from vllm_proxy.fleet.measuring import Measuring
from vllm_proxy.fleet.room import Room
from vllm_proxy.runtime.background import spawn


class ColdStartError(Exception):
    """An engine that was to wake has to be started anew."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


class EndedAsleepError(Exception):
    """An engine has ended by itself while it slept."""


class Rest:
    """Of one engine that may sleep."""

    def __init__(self, nap: Nap, room: Room, engine: Engine, claim: Claim, history: History) -> None:
        self._nap, self._room, self._engine, self._claim, self._history = nap, room, engine, claim, history

    async def begin(self, level: int) -> Failed | None:
        """Put it to sleep; why that failed, where it did."""

        def note(canary: Canary | None) -> None:
            self._engine.note_sleep(level, canary)

        spec = self._claim.tenant.spec.engine
        memory, began = Measuring(self._room, self._claim), asyncio.get_running_loop().time()
        if level == 1:
            self._take_host(self._engine.memory_bytes)
        await memory.begin()
        done = await self._nap.sleep(self._engine.place, level, note, memory.freed)
        if isinstance(done, Failed):
            self._history.nap_failed(spec, done)
            return done
        self._history.slept(asyncio.get_running_loop().time() - began)
        keeps = memory.keeps()
        if keeps is not None:
            self._history.keep_residue(spec, keeps)
        self._claim.sleeps(keeps)
        return None

    async def adopted(self) -> bool | None:
        """Whether one of an earlier daemon sleeps that was to; None: it does not, and what it has is not known."""
        if self._engine.before_sleep is not None:  # what it took of the machine's memory it has until it ends
            self._take_host(self._engine.before_sleep)
        if not self._engine.asleep:
            return False
        sleeps = await self._nap.is_sleeping(self._engine.place)
        if sleeps is False:
            checked = await self._nap.verify(self._engine.place, self._engine.canary)
            return None if isinstance(checked, Failed) else False
        return sleeps

    def _take_host(self, before: int) -> None:
        """What it has of its devices goes to the machine's memory, or is there."""
        allocation = self._claim.allocation
        if allocation is not None and allocation.gpus:
            self._claim.takes_host(allocation.takes, before)

    async def until_admitted(self) -> bool:
        """Wait until it is to wake and has its room for that; False where its engine ends before.

        Raises:
            LaunchError: it is refused.

        """
        admitted = spawn(self._claim.admission(), f"wake of {self._claim.name}")
        waits: set[asyncio.Future[Any]] = {admitted, self._engine.exited}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._engine.exited.done():
                return False
            await admitted
        finally:
            admitted.cancel()
        return True

    async def end(self, spec: ModelSpec) -> Failed | None:
        """Wake it, on the devices that it was admitted to; why that failed, where it did."""
        engine, began = self._engine, asyncio.get_running_loop().time()
        done = await self._nap.wake(engine.place, engine.asleep, engine.canary, spec.policy.startup_timeout)
        if isinstance(done, Failed):
            self._history.nap_failed(spec.engine, done)
            return done
        took = asyncio.get_running_loop().time() - began
        self._claim.woke(took)
        self._history.woke(spec.engine, engine.asleep, took)
        engine.note_sleep(0, engine.canary)
        return None
