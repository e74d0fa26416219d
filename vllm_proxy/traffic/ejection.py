"""Passive ejection (a circuit breaker): an instance whose connections fail gets no requests until it is healthy.

Three connections in a row without an answer, or one bad `/health` in the watch for stalls (`engine/liveness.py`), make
an instance suspect; whether it is ejected (gets no requests), and readmitted, is up to `/health` alone. Whatever an
engine answers, 4xx and 5xx alike, never counts (tests/traffic/test_ejection.py).
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from vllm_proxy.domain.address import Address
from vllm_proxy.traffic.endpoint import Endpoint

log = structlog.get_logger()

_RETRY_SECONDS = 1.0


class HealthProbe(Protocol):
    """Health checks of an engine."""

    async def healthy(self, address: Address) -> bool:
        """Whether `/health` answers 200."""


async def watch_health(endpoint: Endpoint, probe: HealthProbe, readmitted: Callable[[], None]) -> None:
    """Watch one endpoint until cancelled; `readmitted` is called when it takes requests again (the circuit closes)."""
    while True:
        await endpoint.suspect.wait()
        while not await probe.healthy(endpoint.address):
            if not endpoint.ejected:
                endpoint.ejected = True
                log.warning("the instance takes no connections and gets no requests", instance=endpoint.instance)
            await asyncio.sleep(_RETRY_SECONDS)
        endpoint.failures = 0
        endpoint.suspect.clear()
        if endpoint.ejected:
            endpoint.ejected = False
            log.info("the instance gets requests again", instance=endpoint.instance)
            readmitted()
