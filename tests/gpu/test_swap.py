"""Real models that do not fit together on a GPU: swapped under load, beside the memory of others, and over two GPUs."""

import asyncio
import contextlib
import functools
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests import mixed_load
from tests.gpu.conftest import needs_gpus
from tests.harness import Daemon, daemon, port_block, real_engines
from tests.real.swapping import refused_without_room
from vllm_proxy.domain.ledger import Device

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800), needs_gpus(1)]

HOLDER = """
import sys, torch
free, total = torch.cuda.mem_get_info(0)
held = torch.empty(int(total * float(sys.argv[1])), dtype=torch.uint8, device="cuda:0")
print("held", flush=True)
sys.stdin.read()
"""


@functools.cache
def engines() -> str:
    """The table of engines of every daemon here: one may adopt those of another."""
    return real_engines(port_block())


def configuration(model: Path, models: str) -> str:
    """Models of random weights, each started by its first request."""
    return f"""
{engines()}
[engine.env]
HF_HUB_OFFLINE = "1"
[devices]
source = "auto"
min_residency = "1s"
[defaults]
start = "on-demand"
model = "{model}"
max_model_len = 512
gpu_memory_utilization = 0.55
queue_timeout = "15m"
restart = {{ max_failures = 1 }}
args = {{ enforce_eager = true, load_format = "dummy" }}
{models}
"""


@pytest.fixture(scope="module")
async def two(tmp_path_factory: pytest.TempPathFactory, random_model: Path) -> AsyncIterator[Daemon]:
    """A daemon with two models that want more than half of the first GPU each."""
    models = "[models.a]\ndevices = [0]\n[models.b]\ndevices = [0]\n"
    async with daemon(configuration(random_model, models), tmp_path_factory.mktemp("swap")) as running:
        yield running


@contextlib.contextmanager
def foreign_memory(share: float) -> Iterator[int]:
    """Another program has so much of the first GPU; its pid."""
    command = [sys.executable, "-c", HOLDER, str(share)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        assert program.stdout.readline() == "held\n"
        yield program.pid
        program.stdin.close()


async def test_no_request_fails_through_swaps(two: Daemon) -> None:
    """Of 40, streams and whole answers for both models at once, while each of them makes room for the other."""
    assert await mixed_load.run(two.url, mixed_load.to_and_fro("a", "b", clients=4, requests=40)) == []


async def test_vllm_refuses_what_has_no_room_in_the_numbers_of_the_daemon(two: Daemon) -> None:
    """Beside the CUDA context, which is made before vLLM looks at what is free."""
    total = next(device["total"] for device in (await two.get("/devices"))["devices"] if device["index"] == 0)
    said, counted = await refused_without_room(two, lambda: Device(total))
    assert abs(said - counted) <= 0.01


async def test_a_model_waits_for_the_memory_of_another_program(tmp_path: Path, random_model: Path) -> None:
    """Its request waits, the sentence says whose memory it is; it starts once the program has ended."""
    config = configuration(random_model, "[models.a]\ndevices = [0]\n")
    async with daemon(config, tmp_path) as running:
        with foreign_memory(0.6) as pid:
            asked = asyncio.create_task(mixed_load.run(running.url, [["a"]]))
            waiting = await running.once("a", lambda instance: instance["phase"] == "queued" and instance["message"])
            assert str(pid) in waiting["message"]
            assert not asked.done()
        assert await asked == []


@needs_gpus(2)
async def test_a_model_on_two_gpus_takes_turns_with_one_on_each(tmp_path: Path, random_model: Path) -> None:
    """It gets both at once, or waits; no request fails."""
    wide = "[models.wide]\ntensor_parallel_size = 2\ndevices = [0, 1]\n"
    single = "[models.a]\ndevices = [0]\n[models.b]\ndevices = [1]\n"
    plans = [*mixed_load.to_and_fro("a", "wide", 4, 20), *mixed_load.to_and_fro("b", "wide", 4, 20)]
    async with daemon(configuration(random_model, wide + single), tmp_path) as running:
        assert await mixed_load.run(running.url, plans) == []
