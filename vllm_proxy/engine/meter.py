"""Reads one engine's own token counters: what it has computed, for whomever, whether or not anybody is metered.

Owns when `/metrics` of an engine is asked: only where requests were in flight since the last look. The watch for stalls
takes the same answers (tests/engine/test_meter.py). What an engine counts between the last look and its crash is lost.
"""

import asyncio
import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Self

from vllm_proxy.domain.address import Address
from vllm_proxy.engine.interface import Engine
from vllm_proxy.engine.probe import Probe
from vllm_proxy.traffic.endpoint import Endpoint

_PAUSE_SECONDS = 10.0
_WATCHED_PAUSE_SECONDS = 2.0
_LATE_SECONDS = 1.0  # vLLM may count a request's last tokens a moment after it has sent them
_LAST_LOOK_SECONDS = 1.0  # for an engine that is about to be ended

_KINDS = {"prompt_tokens": "prompt", "prompt_tokens_cached": "cached", "generation_tokens": "generation"}
_COUNTER = re.compile(
    r"^vllm:(" + "|".join(_KINDS) + r")_total\{.*\} (\d{1,25}(?:\.\d{1,25})?(?:e\+\d{1,2})?)$", re.MULTILINE
)


_KV_USAGE = re.compile(r"^vllm:kv_cache_usage_perc\{.*\} (\d(?:\.\d{1,25})?(?:e-\d{1,3})?)$", re.MULTILINE)


class Watchers:
    """Who follows what the daemon does at this moment. `with watchers:` is one of them."""

    def __init__(self) -> None:
        self._count = 0
        self.present = asyncio.Event()

    def __enter__(self) -> None:
        self._count += 1
        self.present.set()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self.present.clear()


class Meter:
    """Of one engine, from its readiness to its end. `add` is given the tokens since the last look, by kind.

    Kinds are `prompt`, which includes `cached`, and `generation`; one that an engine does not count is missing.
    """

    def __init__(self, address: Address, probe: Probe, add: Callable[[Mapping[str, int]], None]) -> None:
        self._address = address
        self._probe = probe
        self._add = add
        self.kv_usage: float | None = None  # 0 to 1, at the last look; of several engine cores the most
        self._known: Counter[str] | None = Counter()  # as last seen; None: it has a past that we have not seen yet
        self._looked_at = -math.inf  # on the loop's clock, when that look began
        self._text: str | None = None
        self._looking = asyncio.Lock()

    @classmethod
    async def of(cls, engine: Engine, probe: Probe, add: Callable[[Mapping[str, int]], None]) -> Self:
        """Of an engine that is ready. What one of an earlier daemon has counted until now is not ours."""
        meter = cls(engine.place.address, probe, add)
        if engine.was_ready:
            meter._known = None
            await meter.counters(0.0)
        return meter

    async def follow(self, endpoint: Endpoint, watchers: Watchers) -> None:
        """Look again and again, until cancelled."""
        while True:
            await _pause(watchers)
            if self._has_worked(endpoint):
                await self.counters((_WATCHED_PAUSE_SECONDS if watchers.present.is_set() else _PAUSE_SECONDS) / 2)

    async def finish(self, endpoint: Endpoint) -> None:
        """Look once more: the engine is about to be ended. It does not have to answer."""
        if self._has_worked(endpoint):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_LOOK_SECONDS):
                    await self.counters(0.0)

    async def counters(self, seconds: float) -> str | None:
        """As `Probe.counters`, from a look that is at most so many seconds old."""
        async with self._looking:
            now = asyncio.get_running_loop().time()
            if now - self._looked_at > seconds:
                self._text = await self._probe.counters(self._address)
                self._looked_at = now
                self._count(self._text)
        return self._text

    def _has_worked(self, endpoint: Endpoint) -> bool:
        """Whether a request has been in flight since the last look."""
        return endpoint.in_flight > 0 or endpoint.idle_since + _LATE_SECONDS > self._looked_at

    def _count(self, text: str | None) -> None:
        self.kv_usage = max((round(float(used), 3) for used in _KV_USAGE.findall(text or "")), default=None)
        found = _tokens(text or "")
        if not found:
            return
        before, self._known = self._known, found
        if before is not None:
            # Less than before: its counters have begun anew.
            self._add({kind: count - before[kind] if count >= before[kind] else count for kind, count in found.items()})


async def _pause(watchers: Watchers) -> None:
    if watchers.present.is_set():
        await asyncio.sleep(_WATCHED_PAUSE_SECONDS)
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PAUSE_SECONDS):
            await watchers.present.wait()


def _tokens(text: str) -> Counter[str]:
    """Tokens by kind, over all engine cores of the engine; nothing where it keeps no counters."""
    found: Counter[str] = Counter()
    for name, value in _COUNTER.findall(text):
        found[_KINDS[name]] += int(float(value))
    return found
