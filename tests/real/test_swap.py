"""Two real models that do not fit together in this machine's memory: swapped under load, and refused without room."""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests import mixed_load
from tests.harness import Daemon, daemon, session_of
from vllm_proxy.demo.prepare import chat_model
from vllm_proxy.demo.threads import openmp
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.fit import demand_of, needs
from vllm_proxy.domain.ledger import Device, Kind

GIB = 2**30
SHARE = 0.55
LEAST = 12 * GIB  # that must be available


def node() -> tuple[int, int]:
    """Of the memory that vLLM counts on this machine: all of it, and what is available."""
    text = Path("/sys/devices/system/node/node0/meminfo").read_text(encoding="utf-8")
    kib = {name: int(size) for name, size in re.findall(r"Node 0 (\S+): +(\d+) kB", text)}
    free = sum(kib[name] for name in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))
    return kib["MemTotal"] * 1024, free * 1024


TOTAL, AVAILABLE = node()
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        max(LEAST, (SHARE + 0.05) * TOTAL) > AVAILABLE,
        reason=f"{AVAILABLE / GIB:.1f} GiB are available, too little for one engine of {SHARE} of the memory",
    ),
]


def configuration(model: Path) -> str:
    """The same weights under two names."""
    environment = "\n".join(f'{name} = "{value}"' for name, value in openmp(1).items())
    return f"""
[engine.env]
{environment}
HF_HUB_OFFLINE = "1"
VLLM_CPU_OMP_THREADS_BIND = "nobind"
[devices]
source = "cpu"
min_residency = "1s"
[defaults]
start = "on-demand"
model = "{model}"
max_model_len = 512
gpu_memory_utilization = {SHARE}
queue_timeout = "15m"
restart = {{ max_failures = 1 }}
[defaults.args]
enforce_eager = true
[models.a]
[models.b]
"""


@pytest.fixture(scope="module")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with both; nothing of it is left."""
    model = chat_model(os.environ)
    async with daemon(configuration(model), tmp_path_factory.mktemp("swap")) as running:
        yield running
        assert await running.stop() == 0


async def which_serves(running: Daemon) -> tuple[Any, str]:
    """The instance that is ready, and the name of the other model."""
    for name, other in (("a", "b"), ("b", "a")):
        instance = await running.instance(name)
        if instance["state"] == "ready":
            return instance, other
    raise AssertionError("neither is ready")


async def test_no_request_fails_through_swaps(two: Daemon) -> None:
    """Of 40, streams and whole answers for both models at once, while each of them makes room for the other."""
    assert await mixed_load.run(two.url, mixed_load.to_and_fro("a", "b", clients=4, requests=40)) == []


async def test_an_idle_engine_is_gone_at_once(two: Daemon) -> None:
    """With all its processes, 0.3 s after the request that needs its room at the latest."""
    instance, other = await which_serves(two)
    assert len(session_of(instance["pid"])) >= 3  # server, engine core, worker
    await asyncio.sleep(6)  # it has been idle for long enough to give way at once
    wanted = asyncio.create_task(mixed_load.run(two.url, [[other]]))
    await asyncio.sleep(0)
    began = time.monotonic()
    while session_of(instance["pid"]):
        await asyncio.sleep(0.005)
    assert time.monotonic() - began < 0.3
    assert await wanted == []


async def test_vllm_refuses_what_has_no_room_in_the_numbers_of_the_daemon(two: Daemon) -> None:
    """Nothing makes room where nothing is managed: vLLM says what it wants, and that is what the daemon counts with."""
    _, other = await which_serves(two)
    config = two.file.read_text(encoding="utf-8")
    two.save(config.replace('source = "cpu"', 'source = "none"'))
    await two.adopts()
    (failure,) = await mixed_load.run(two.url, [[other]])
    assert "503" in failure
    ended = (await two.instance(other))["last_exit"]
    assert ended["reason"] == "insufficient_memory"
    said = re.search(r" asks for ([\d.]+) GiB", ended["message"])
    assert said, ended
    model = parse_config(config.encode(), "models.toml").models[other]
    (need,) = needs(demand_of(model), {"0": Device(TOTAL, kind=Kind.MEMORY)}).values()
    assert abs(float(said[1]) - need / GIB) <= 0.01
