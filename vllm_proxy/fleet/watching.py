"""What looks at an engine while it serves: whether it is healthy again once it was ejected, its tokens, a stall."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from vllm_proxy.domain.config import Policy
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.engine.liveness import until_stalled
from vllm_proxy.engine.meter import Meter
from vllm_proxy.fleet.dependencies import Dependencies
from vllm_proxy.runtime.background import keep_running
from vllm_proxy.traffic.ejection import watch_health
from vllm_proxy.traffic.endpoint import Endpoint


@contextlib.contextmanager
def watched(
    endpoint: Endpoint, meter: Meter, shared: Dependencies, policy: Callable[[], Policy]
) -> "Iterator[asyncio.Task[Diagnosis]]":
    """An engine is looked at inside the block; yields what is done when it has stalled. `policy`: the one now."""
    model_id, name, probe = endpoint.instance.rpartition("/")[0], endpoint.instance, shared.probe
    readmit = partial(shared.registry.readmit, model_id)
    health = keep_running(partial(watch_health, endpoint, probe, readmit), f"ejection of {name}")
    metering = keep_running(partial(meter.follow, endpoint, shared.watchers), f"meter of {name}")
    stall = partial(until_stalled, endpoint, probe, meter, lambda: policy().stall_timeout)
    stalling = keep_running(stall, f"stall watch of {name}")
    try:
        yield stalling
    finally:
        for task in (health, metering, stalling):
            task.cancel()
