"""Follows the devices of this machine: how much memory each has, how much of it is free, and who holds it.

They are looked at in a thread of their own, which a driver may block for as long as it likes: nobody waits for it but
the next look, and never is there more than one. What was seen counts until three looks in a row have failed; then
nothing counts as measured, and what engines were given is all that is known (tests/engine/test_devices.py).
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from vllm_proxy.domain import inventory
from vllm_proxy.domain.inventory import Seen
from vllm_proxy.engine.amdgpu import AmdGpu
from vllm_proxy.engine.device_file import DeviceFile
from vllm_proxy.engine.device_source import Sight, Source, SourceError
from vllm_proxy.engine.holders import Programs
from vllm_proxy.engine.machine_memory import MachineMemory
from vllm_proxy.engine.nvml import Nvml
from vllm_proxy.engine.ownership import Owned
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import notify, run_once, spawn
from vllm_proxy.runtime.threads import Disk, Offload

log = structlog.get_logger()

ASKED_SECONDS = 0.05  # between two looks while somebody waits for memory
IDLE_SECONDS = 5.0
SHORTEST_SECONDS = 0.005  # whoever wakes it in vain is not served more often
LOOK_SECONDS = 5.0  # a look that takes longer has failed
MOST_FAILURES = 3  # in a row
_NO_ANSWER = f"nothing has answered for {LOOK_SECONDS:.0f} s"


class Threads(Offload, Protocol):
    """Where looks are taken: one after another."""

    def close(self) -> None:
        """End what is idle; what hangs is left behind."""


def _one_thread() -> Threads:
    return Disk("the devices", 1)


class Inventory:
    """The devices that engines may be placed on. Used on the event loop alone."""

    def __init__(
        self,
        source: str,
        folder: Path,
        inherited: Mapping[str, str],
        engines: Callable[[], Mapping[str, Owned]],
        make_threads: Callable[[], Threads] = _one_thread,
    ) -> None:
        """Nothing is looked at yet.

        `source`: as `use` takes it, relative to `folder`. `inherited`: the environment that engines inherit.
        `engines`: ours that run, by instance.
        """
        self._folder = folder
        self._visible = inherited.get("CUDA_VISIBLE_DEVICES")
        self._engines = engines
        self._make_threads = make_threads
        self._devices: Mapping[str, Seen] = {}
        self._seen_by: Source | None = None  # whose these are
        self._problem: str | None = None
        self._failures = 0  # in a row
        self._hangs = False  # the last one did not answer in time
        self.looked_at = -math.inf  # when the last look began, on the loop's clock
        self.seen_at = -math.inf  # when the one began that told of `devices`
        self._woken = asyncio.Event()
        self._name = source
        self._source = self._source_of(source)
        self._threads: Threads | None = None  # made when it is needed

    @property
    def devices(self) -> Mapping[str, Seen]:
        """As they were last seen, by name."""
        return self._devices

    @property
    def managed(self) -> bool:
        """Whether anything is known of the devices. Where not, engines only take turns."""
        return bool(self._devices)

    @property
    def problem(self) -> str | None:
        """Why something is not known that ought to be; until it is."""
        return self._problem

    @property
    def usable(self) -> frozenset[str]:
        """Where engines are placed whose models name no devices: what CUDA_VISIBLE_DEVICES leaves to the daemon."""
        return inventory.usable(self._visible, self._devices)

    def use(self, source: str) -> None:
        """Look there from now on: "auto", "none", "cpu", or the path of a file.

        What was seen counts until that has answered once: meanwhile nobody starts as if nothing were known.
        """
        if source == self._name:
            return
        if self._threads is not None and self._source is not None:
            run_once(partial(_let_go, self._threads, self._source), "letting go of the devices")
        self._threads = None  # one that hangs holds up nothing of the new source
        self._name, self._source = source, self._source_of(source)
        self._problem = None
        if self._source is None:
            self._devices = {}
        self.wake()

    def close(self) -> None:
        """Look no more. A look that hangs is left behind."""
        if self._threads is not None:
            self._threads.close()

    def wake(self) -> None:
        """Look at once: somebody asks for memory, or some has come back."""
        self._woken.set()

    async def follow(self, asked: Callable[[], bool], changed: Callable[[], None]) -> None:
        """Look again and again until cancelled, often while `asked`.

        Call `changed` after what is new, whichever look has found it, and after each look while `asked`.
        """
        told: tuple[Mapping[str, Seen], str | None] | None = None
        while True:
            self._woken.clear()
            await self.look()
            # Who asked since the last look may be waiting for this one.
            if told != (self._devices, self._problem) or asked():
                told = self._devices, self._problem
                notify([changed])
            await clock.sleep(SHORTEST_SECONDS)
            with contextlib.suppress(TimeoutError):
                pause = ASKED_SECONDS if asked() else IDLE_SECONDS
                async with asyncio.timeout(pause - SHORTEST_SECONDS):
                    await self._woken.wait()

    async def look(self) -> None:
        """Look once, for some seconds at most. What fails is a `problem`, and raises nothing."""
        source, began = self._source, asyncio.get_running_loop().time()
        if source is not None:
            try:
                sight = await self._ask(source)
            except Exception as error:  # noqa: BLE001 - whatever a driver's bindings raise
                if source is self._source:
                    self._fail(error)
            else:
                if source is self._source:
                    self._adopt(sight)
                    self.seen_at = began
        self.looked_at = began

    async def _ask(self, source: "_Watched") -> Sight:
        """What it says, in a thread. Once one has hung nobody waits again as long as it does."""
        if self._hangs and source.busy:
            raise SourceError(_NO_ANSWER)
        if self._threads is None:
            self._threads = self._make_threads()
        call = spawn(self._threads(source.look, dict(self._engines())), "a look at the devices")
        try:
            self._hangs = not await clock.wait([call], LOOK_SECONDS)
            if self._hangs:
                raise SourceError(_NO_ANSWER)
            return call.result()
        finally:
            call.cancel()

    def _adopt(self, sight: Sight) -> None:
        found = {one.name: one for one in sight.devices}
        if self._seen_by is self._source and (gone := self._devices.keys() - found.keys()):
            log.warning("devices are gone: engines on them are left alone, and nothing starts there",
                        devices=sorted(gone))  # fmt: skip
        self._failures, self._seen_by = 0, self._source
        self._devices = found
        self._report(sight.problem)

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        if self._seen_by is not self._source:
            self._devices = {}
        if self._devices and self._failures < MOST_FAILURES:
            return
        self._devices = {name: _unmeasured(one) for name, one in self._devices.items()}
        expected = isinstance(error, SourceError | OSError)
        known = "what engines were given is all that counts" if self._devices else "engines only take turns"
        why = f"cannot look at the devices: {error if expected else repr(error)}; until it works, {known}"
        self._report(why, None if expected else error)

    def _report(self, problem: str | None, fault: Exception | None = None) -> None:
        """Say it once, and that it is over."""
        if problem is not None and self._problem is None:
            log.warning("not all is known of the devices", source=self._name, why=problem, exc_info=fault)
        elif problem is None and self._problem is not None:
            log.info("all devices are measured again", source=self._name)
        self._problem = problem

    def _source_of(self, name: str) -> "_Watched | None":
        match name:
            case "none":
                return None
            case "auto":
                return _Watched(_Auto())
            case "cpu":
                return _Watched(MachineMemory())
        return _Watched(DeviceFile(self._folder / name))


class _Watched:
    """A source, and whether it is `busy` with a call."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.busy = False
        self.close = source.close

    def look(self, engines: Mapping[str, Owned]) -> Sight:
        """As the source."""
        self.busy = True
        try:
            return self._source.look(engines)
        finally:
            self.busy = False


class _Auto:
    """The first kind of GPUs that is found. It stays with that: one that vanishes has not become another."""

    def __init__(self) -> None:
        self._kinds: tuple[Source, ...] = (Nvml(Programs()), AmdGpu())
        self._found = False

    def look(self, engines: Mapping[str, Owned], /) -> Sight:
        """What is there; nothing where no kind is.

        Raises:
            SourceError: it cannot be told, or nothing is left of what was there.
            OSError: as it comes.

        """
        for kind in self._kinds:
            sight = kind.look(engines)
            if sight.devices or sight.problem:
                self._kinds, self._found = (kind,), True
                return sight
        if self._found:
            raise SourceError("no GPU is left of those that were there")
        return Sight()

    def close(self) -> None:
        """Let go of the drivers."""
        for kind in self._kinds:
            kind.close()


def _unmeasured(one: Seen) -> Seen:
    return replace(one, free=None, held={}, foreign=())


async def _let_go(threads: Threads, source: _Watched) -> None:
    """In a thread too: behind a look that hangs it waits as long as that."""
    call = spawn(threads(source.close), "letting go of a source")
    try:
        await clock.wait([call], LOOK_SECONDS)
    finally:
        call.cancel()
        threads.close()
