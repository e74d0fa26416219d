"""Waits for a started engine to become ready, to end, or to make no progress for too long.

`startup_timeout` limits the time without progress, not the duration of the start: a large download may take hours.
"""

import asyncio
from collections.abc import Callable

from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.domain.progress import Progress
from vllm_proxy.engine.interface import Engine
from vllm_proxy.engine.probe import Probe, Ready
from vllm_proxy.runtime import clock

_POLL_SECONDS = 0.05
_FIRST_POLL_SECONDS = 0.003  # a refused connection on loopback costs little
_OF_START = 0.03  # so much longer a start may seem, where it is short
_BACK_SECONDS = 30.0  # for an adopted engine that has served before: it has nothing to load


async def until_ready(
    engine: Engine, probe: Probe, startup_timeout: Callable[[], float], show: Callable[[Progress], None]
) -> Ready | Diagnosis | None:
    """Poll an engine until it is ready; a `Diagnosis` when it takes too long, None when it ended.

    `startup_timeout` is in seconds without progress, read each time, since it may change meanwhile.
    """
    loop, place, output = asyncio.get_running_loop(), engine.place, engine.output
    activity, moved_at, shown = output.activity, loop.time(), None
    while not engine.exited.done():
        if ready := await probe.ready(place, engine.holds_address):
            return ready
        if output.activity != activity:
            activity, moved_at = output.activity, loop.time()
        if output.progress != shown:
            show(shown := output.progress)
        if engine.was_ready and clock.elapsed(moved_at) > _BACK_SECONDS:
            return Diagnosis(Reason.STALLED, "the adopted engine does not answer any more")
        if clock.elapsed(moved_at) > (limit := startup_timeout()):
            message = f"nothing happened for {limit:g} s in phase {output.progress.phase}"
            return Diagnosis(Reason.STARTUP_TIMEOUT, f"{message}; see its log, or raise startup_timeout")
        pause = min(max(_FIRST_POLL_SECONDS, engine.age_seconds() * _OF_START), _POLL_SECONDS)
        await asyncio.wait({engine.exited}, timeout=pause)
    return None
