"""Two real models that do not fit together in this machine's memory: swapped under load, and refused without room."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests import mixed_load
from tests.harness import Daemon, daemon, session_of
from tests.real.cpu import engines_on_cpu
from tests.real.swapping import GIB, one_serves, refused_without_room
from vllm_proxy.demo.prepare import chat_model
from vllm_proxy.domain.ledger import Device, Kind
from vllm_proxy.engine.machine_memory import node_memory

SHARE = 0.55
SMALL = 2.5 * GIB  # vLLM takes 1.5 of it before there is a KV cache
LEAST = 12 * GIB  # that must be available
ASKED_SECONDS = 5.0  # what vLLM's own end takes at least, after a SIGTERM


MEMORY = node_memory()
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        MEMORY.available < max(LEAST, (SHARE + 0.05) * MEMORY.total),
        reason=f"{MEMORY.available / GIB:.1f} GiB are available, too little for one engine of {SHARE} of the memory",
    ),
]


def configuration(model: Path, share: float, devices: str = "") -> str:
    """The same weights under two names. `devices`: more of that table."""
    return f"""
{engines_on_cpu(1, by_share=True)}
[devices]
source = "cpu"
min_residency = "1s"
{devices}
[defaults]
start = "on-demand"
model = "{model}"
max_model_len = 512
gpu_memory_utilization = {share}
queue_timeout = "15m"
restart = {{ max_failures = 1 }}
[defaults.args]
enforce_eager = true
[models.a]
[models.b]
"""


async def test_an_idle_engine_is_gone_at_once(new_place: Callable[[str], Path]) -> None:
    """With all its processes: it is killed, which takes a tenth of a second on a quiet machine. Asked, it took five.

    Small ones, of which only one is allowed: what an engine has touched is taken back by the kernel at some GiB a
    second. Before the large ones of this file are there: they leave no room for it.
    """
    config = configuration(chat_model(os.environ), SMALL / MEMORY.total, f'limit = {{ cpu = "{int(1.5 * SMALL)}B" }}')
    async with daemon(config, new_place("small")) as running:
        instance, other = await one_serves(running)
        assert len(session_of(instance["pid"])) >= 3  # server, engine core, worker
        await asyncio.sleep(6)  # it has been idle for long enough to give way at once
        body = {"model": other, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        began = time.monotonic()
        wanted = asyncio.create_task(running.post("/v1/chat/completions", body))
        while session_of(instance["pid"]):
            await asyncio.sleep(0.005)
        assert time.monotonic() - began < ASKED_SECONDS / 2
        wanted.cancel()


@pytest.fixture(scope="module")
async def two(new_place: Callable[[str], Path]) -> AsyncIterator[Daemon]:
    """A daemon with both; nothing of it is left."""
    async with daemon(configuration(chat_model(os.environ), SHARE), new_place("swap")) as running:
        yield running
        assert await running.stop() == 0


async def test_no_request_fails_through_swaps(two: Daemon) -> None:
    """Of 40, streams and whole answers for both models at once, while each of them makes room for the other."""
    assert await mixed_load.run(two.url, mixed_load.to_and_fro("a", "b", clients=4, requests=40)) == []


async def test_vllm_refuses_what_has_no_room_in_the_numbers_of_the_daemon(two: Daemon) -> None:
    """Nothing makes room where nothing is managed: vLLM says what it wants, and that is what the daemon counts with."""
    said, counted = await refused_without_room(two, lambda: Device(node_memory().total, kind=Kind.MEMORY))
    assert abs(said - counted) <= 0.01
