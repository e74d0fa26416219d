"""Detects a stalled engine: a ready one in which nothing moves though requests wait, or whose `/health` stays bad.

A watchdog. `/health` only says that vLLM's server has not noticed the death of its engine core. So a hung engine is
found by what stands still: no byte of an answer, and none of vLLM's counters. An engine in which anything moves must
not be called stalled (tests/engine/test_liveness.py).
"""

import asyncio
from collections.abc import Callable

import structlog

from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.engine.meter import Meter
from vllm_proxy.engine.probe import Probe
from vllm_proxy.runtime import clock
from vllm_proxy.traffic.endpoint import Endpoint

log = structlog.get_logger()

_BEAT_SECONDS = 10.0
_BEATS_IN_TIMEOUT = 5  # a short stall_timeout makes for a quicker beat


async def until_stalled(
    endpoint: Endpoint, probe: Probe, meter: Meter, stall_timeout: Callable[[], float]
) -> Diagnosis:
    """Watch a ready engine; returns once it has stalled. `stall_timeout` in seconds, 0: never; it may change."""
    loop = asyncio.get_running_loop()
    healthy_at = moved_at = loop.time()
    seen: object = None
    while True:
        limit = stall_timeout()
        beat = min(_BEAT_SECONDS, limit / _BEATS_IN_TIMEOUT) if limit else _BEAT_SECONDS
        await asyncio.sleep(beat)
        if await probe.healthy(endpoint.address):
            healthy_at = loop.time()
        else:
            endpoint.suspect.set()
        mark = await _mark(endpoint, meter, beat / 2)
        if mark is None or mark != seen:
            seen, moved_at = mark, loop.time()
        if not limit:
            continue
        if clock.elapsed(moved_at) >= limit:
            message = f"requests wait and nothing moved for {limit:g} s; a long silent request? raise stall_timeout"
            return Diagnosis(Reason.STALLED, message)
        if clock.elapsed(healthy_at) >= limit:
            return Diagnosis(Reason.STALLED, f"/health gave no good answer for {limit:g} s; see its log")


async def _mark(endpoint: Endpoint, meter: Meter, seconds: float) -> object:
    """What changes whenever the engine gets on with its requests; None where no request waits for it.

    `seconds`: how old its counters may be. An engine that keeps none (`disable_log_stats`) may be busy with a long
    answer: it is never judged.
    """
    if not endpoint.pool.waiting():
        return None
    reads = endpoint.pool.reads
    counters = await meter.counters(seconds)
    return None if counters == "" else (reads, counters)
