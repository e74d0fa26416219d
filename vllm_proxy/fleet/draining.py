"""Waits for the last requests of an engine that is to end: graceful shutdown of one instance.

For supervisors. Whatever ends the wait early, such as a daemon that stops, is an event.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import structlog

from vllm_proxy.engine.interface import Engine
from vllm_proxy.fleet.claims import Claim
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import spawn
from vllm_proxy.traffic.endpoint import Endpoint

log = structlog.get_logger()

_FOREVER = 1e9  # seconds


async def drain(endpoint: Endpoint, engine: Engine, seconds: float, skip: Iterable[asyncio.Event]) -> None:
    """Wait for the requests in flight, so long at most, and not for a dead engine, nor where one of `skip` is set."""
    await _first(spawn(endpoint.wait_idle(), f"last requests of {endpoint.instance}"), engine, seconds, skip)


async def give_way(
    endpoint: Endpoint, engine: Engine, claim: Claim, seconds: float, skip: Iterable[asyncio.Event]
) -> None:
    """As `drain`, for one that others wait for; 0 seconds: without limit.

    It waits for those too that measure its devices: memory that comes back would mislead them.
    """
    skip = tuple(skip)
    await drain(endpoint, engine, seconds or _FOREVER, skip)
    await _first(spawn(claim.may_go(), f"turn of {claim.name} to go"), engine, _FOREVER, skip)


def cut(endpoint: Endpoint) -> None:
    """End what is in flight all the same, and every connection: vLLM waits for open ones without limit."""
    if endpoint.in_flight:
        log.warning("requests did not end in time", instance=endpoint.instance, in_flight=endpoint.in_flight)
    endpoint.pool.close()


async def _first(awaited: asyncio.Task[None], engine: Engine, seconds: float, skip: Iterable[asyncio.Event]) -> None:
    skips = [spawn(event.wait(), f"drain of {engine.place.instance}") for event in skip]
    waits: set[asyncio.Future[Any]] = {awaited, engine.exited, *skips}
    try:
        await clock.wait(waits, seconds)
    finally:
        for task in (awaited, *skips):
            task.cancel()
