"""The sleep of the fake, as vLLM 0.32 has it: what its scheduler and its executor know, and what became of its memory.

Kept from vLLM: the development routes, which no key guards; a scheduler that is paused (new requests hang, those that
run are ended, waited for or frozen) and an executor that is asleep, of which `/is_sleeping` is the either-or; a call
that the core works on holds up every later one, and goes on when its client has left; memory is freed before anything
is checked, and mapped piece by piece, with no way back; nobody notices that weights hold nothing. Memory is freed
where there are devices and `--enable-sleep-mode`; else this is a true pause, as on the CPU.
"""

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Callable
from typing import NoReturn
from urllib.parse import parse_qs

import fake_engine  # type: ignore[import-not-found] # beside this script
import fake_ledger  # type: ignore[import-not-found] # as above
import fake_log  # type: ignore[import-not-found] # as above

ROUTES = {"/sleep": "POST", "/wake_up": "POST", "/is_sleeping": "GET", "/collective_rpc": "POST"}
_TAGS = ("weights", "kv_cache")  # in the order in which they are mapped
_PARTS = {"weights": "weights", "kv_cache": "kv"}  # as the ledger calls them
_INCREASED = "Memory usage increased after sleeping."
_NO_ROOM = "CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:163"
_ILLEGAL = "CUDA error: an illegal memory access was encountered"
_HOUR = 3600.0
type Answer = tuple[int, object]


class FailedError(Exception):
    """A call to the core has failed; the message is the cause."""


class Sleep:
    """The sleep of one engine."""

    def __init__(
        self,
        options: argparse.Namespace,
        engine: fake_engine.Engine,
        memory: fake_ledger.Memory | None,
        log: fake_log.Log,
    ) -> None:
        self.options, self.engine, self.log = options, engine, log
        self.memory = memory if options.enable_sleep_mode else None  # None: nothing is ever freed
        self.asleep: set[str] = set()  # tags, as the executor believes
        self.mapped = set(_TAGS)  # as it is
        self.lost = False  # the weights hold nothing
        self.level = 0  # of the last sleep
        self.wedged = False  # a wake has found no room
        self.working = ""  # what the core is held up by: "sleep", "wake", "reload"
        self.done = {"sleeps": 0, "wakes": 0, "reloads": 0}
        self.forget_devices: Callable[[], None] = lambda: None  # who else has something there
        self._core = asyncio.Lock()  # it does one thing after another
        self._calls: set[asyncio.Task[Answer]] = set()

    # Routes

    async def answer(self, method: str, target: str, body: bytes) -> Answer:
        """Status and JSON value for one request to ROUTES. What the core does for it goes on without its client."""
        path, _, query = target.partition("?")
        if method != ROUTES[path]:
            return 405, {"detail": "Method Not Allowed"}
        asked = parse_qs(query, keep_blank_values=True)
        call = asyncio.ensure_future(self._call(path.removeprefix("/"), asked, body))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await asyncio.shield(call)

    async def _call(self, name: str, asked: dict[str, list[str]], body: bytes) -> Answer:
        try:
            if name == "sleep":
                return await self._asked_to_sleep(asked)
            if name == "wake_up":
                tags = asked.get("tags")
                self.log.line("APIServer", "api_router.py:52", f"wake up the engine with tags: {tags}")
                awake = await self.wake(tags)
                return 200, {"status": "awake" if awake else "sleeping", "tags": tags}
            if name == "is_sleeping":
                await self.engine.running.wait()
                async with self._core:
                    return 200, {"is_sleeping": self.engine.paused or bool(self.asleep)}
            return await self._collective_rpc(body)
        except FailedError as error:
            self.log.line("EngineCore", "core.py:1750", f"Invocation of {name} method failed", "ERROR")
            cause = f"Worker failed with error '{error}', please check the stack trace above for the root cause"
            return _error(500, f"Call to {name} method failed: {cause if self.engine.core.workers else error}")

    async def _asked_to_sleep(self, asked: dict[str, list[str]]) -> Answer:
        level, mode = asked.get("level", ["1"])[-1], asked.get("mode", ["abort"])[-1]
        if level not in {"0", "1", "2"}:
            return _bad_query("level", level)
        if mode not in {"abort", "wait", "keep"}:
            return _bad_query("mode", mode)
        await self.sleep(int(level), mode)
        return 200, {"status": "sleeping", "level": int(level)}

    async def _collective_rpc(self, body: bytes) -> Answer:
        try:
            asked = json.loads(body)
        except ValueError as error:
            return _error(400, f"JSON decode error: {error}")
        if not isinstance(asked, dict):
            return _error(400, "Request body must be a JSON object")
        if (method := asked.get("method")) is None:
            return _error(400, "Missing 'method' in request body")
        await self.engine.running.wait()
        async with self._core:
            if method != "reload_weights":
                raise FailedError(f"'Worker' object has no attribute '{method}'")
            await self._reload()
        return 200, {"results": [None] * max(1, len(self.engine.core.workers))}

    # The core

    async def sleep(self, level: int, mode: str) -> None:
        """Pause, and from level 1 on tell the executor to free memory, once nothing runs."""
        await self.engine.running.wait()
        async with self._core:
            if mode == "abort":
                self.engine.abort()
            self.engine.pause(everybody=mode == "keep")
        if mode != "keep":
            await self.engine.drained.wait()
        if level:
            async with self._core:
                await self._fall_asleep(level)

    async def wake(self, tags: list[str] | None) -> bool:
        """Tell the executor to map what these tags name, None: all; go on where it believes that nothing is missing."""
        await self.engine.running.wait()
        async with self._core:
            if tags is not None and "scheduling" in tags:
                tags = [tag for tag in tags if tag != "scheduling"]
            if tags is None or tags:
                await self._wake_up(tags)
            if not self.asleep:
                self.engine.resume()
            return not self.asleep

    # The executor and its workers

    async def _fall_asleep(self, level: int) -> None:
        """Free memory, then see whether more of the devices is free than before, as each worker does."""
        if "weights" in self.asleep:
            return self._says("Executor is already sleeping.", "WARNING")
        fault = self.options.fake_sleep
        if fault == "dies":
            await self._die()
        before = self.memory.free() if self.memory else {}
        self.working = "sleep"
        await _last(self.options.fake_sleep_seconds or (_HOUR if fault == "slow" else 0), self.options.fake_sleep_until)
        self.working = ""
        if self.memory is not None and fault != "lies":
            freed = self.memory.unmap(offloads=level == 1)
            self._says(f"CuMemAllocator: sleep freed {fake_ledger.gib(freed)} GiB memory in total")
            self.mapped.clear()
            if level == 2:
                self.lost = True
                self.forget_devices()
        self.done["sleeps"] += 1
        self.level = level
        if fault == "fails-after-freeing":
            self.mapped.clear()
            raise FailedError(_INCREASED)
        after = self.memory.free() if self.memory else {}
        if any(free < before[device] for device, free in after.items()):
            raise FailedError(_INCREASED)
        self.asleep = set(_TAGS)
        self._says("It took 0.100000 seconds to fall asleep.")
        return None

    async def _wake_up(self, tags: list[str] | None) -> None:
        """Map memory, one piece after another, until there is no room; then it stays as it is."""
        if not self.asleep:
            return self._says("Executor is not sleeping.", "WARNING")
        if strange := set(tags or ()) - self.asleep:
            return self._says(f"Tag {min(strange)} is not in sleeping tags {self.asleep}", "WARNING")
        wanted = set(tags or self.asleep)
        fault = self.options.fake_wake
        if fault == "dies":
            await self._die()
        for tag in _TAGS:
            if tag in wanted - self.mapped or (fault == "oom" and tag in wanted):
                self._map(tag, fails=fault == "oom")
        if fault == "hangs":
            self.working = "wake"
            await asyncio.Event().wait()
        if "weights" in wanted and self.level == 1:
            await self._move_weights("wake")
        self.lost |= fault == "garbage"
        self.done["wakes"] += 1
        self.asleep -= wanted
        self._says(f"It took 0.100000 seconds to wake up tags {tags or sorted(wanted)}.")
        return None

    def _map(self, tag: str, *, fails: bool) -> None:
        """Take the memory back. What had no room once never has."""
        if not self.wedged and self.memory is not None:
            fails |= not self.memory.map(_PARTS[tag], stops_half_way=fails)
        self.wedged |= fails
        if self.wedged:
            raise FailedError(_NO_ROOM)
        self.mapped.add(tag)

    async def _reload(self) -> None:
        """Read the weights once more, into memory that has to be mapped."""
        if "weights" not in self.mapped:
            raise FailedError(_ILLEGAL)
        await self._move_weights("reload")
        self._says("Reloading and processing weights took 0.80 seconds")
        self.done["reloads"] += 1
        self.lost = self.options.fake_wake == "garbage"

    async def _move_weights(self, what: str) -> None:
        self.working = what
        await _last(self.options.fake_wake_seconds, self.options.fake_wake_until)
        self.working = ""

    async def _die(self) -> NoReturn:
        """The core dies over a call; the server notices by itself."""
        self.engine.core.signal(signal.SIGKILL)
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    def _says(self, text: str, level: str = "INFO") -> None:
        self.log.line("EngineCore", "abstract.py:390", text, level)

    # What requests see

    @property
    def usable(self) -> bool:
        """Whether a step finds its memory; else it is the end of the engine."""
        return self.mapped == set(_TAGS)

    def state(self) -> dict[str, object]:
        """What only tests see: what it believes and what is, and how often it has moved weights."""
        return {
            "paused": self.engine.paused,
            "asleep": sorted(self.asleep),
            "mapped": sorted(self.mapped),
            "weights_lost": self.lost,
            "working": self.working,
            **self.done,
        }


async def _last(seconds: float, file: str | None) -> None:
    """As long as that, and until this file exists."""
    await asyncio.sleep(seconds)
    while file and not os.path.exists(file):  # noqa: PTH110 - imports nothing
        await asyncio.sleep(0.01)


def _bad_query(name: str, value: str) -> Answer:
    return _error(400, f"1 validation error:\n  {{'loc': 'query.{name}', 'input': {value!r}}}", f"query.{name}")


def _error(status: int, message: str, parameter: str | None = None) -> Answer:
    kind = "InternalServerError" if status == 500 else "Bad Request"
    return status, {"error": {"message": message, "type": kind, "param": parameter, "code": status}}
