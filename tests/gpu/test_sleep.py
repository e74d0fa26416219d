"""Real models that sleep on a GPU: they take turns without a start, and count for what the driver says they have."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests import mixed_load
from tests.gpu.conftest import needs_gpus
from tests.gpu.test_swap import configuration
from tests.harness import Daemon, daemon, session_of
from tests.real.sleepers import answer
from vllm_proxy.demo.prepare import chat_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800), needs_gpus(1)]

NEAR = 64 * 2**20
LEVELS = {"one": 1, "two": 2}  # model -> level
MODELS = "".join(f"[models.{name}]\ndevices = [0]\nsleep = {level}\n" for name, level in LEVELS.items())
KEEP = '[server]\non_exit = "keep"\n'


def sleepers() -> str:
    """Two models that want more than half of the first GPU each, and sleep at one level each.

    Their weights are on disk: random ones would be others when they are read again.
    """
    return configuration(chat_model(os.environ), MODELS).replace(', load_format = "dummy"', "")


async def asleep(running: Daemon, *models: str) -> None:
    """Put these to sleep by hand."""
    for name in models:
        await running.post(f"/models/{name}/sleep", {}, 202)
        await running.once(name, lambda one: one["state"] == "sleeping")


async def test_sleepers_sleep_on_under_the_next_daemon(tmp_path: Path) -> None:
    """After a kill too; no weights are moved until somebody asks. First of all: it needs the GPU for itself."""
    config = sleepers()
    async with daemon(KEEP + config, tmp_path) as running:
        before = {}
        for name in LEVELS:
            before[name] = await answer(running, name)
            await asleep(running, name)
        pids = {name: await running.pids(name) for name in LEVELS}
        await running.stop(signal.SIGKILL)
    async with daemon(config, tmp_path) as running:
        for name in LEVELS:
            await running.once(name, lambda one: one["state"] == "sleeping")
        assert {name: await running.pids(name) for name in LEVELS} == pids
        for name in LEVELS:
            assert await answer(running, name) == before[name]


@pytest.fixture(scope="module")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with both."""
    async with daemon(sleepers(), tmp_path_factory.mktemp("sleep")) as running:
        yield running


async def test_models_take_turns_asleep_and_no_request_fails(two: Daemon) -> None:
    """Of 40, streams and whole answers for both models at once; each engine is started once."""
    assert await mixed_load.run(two.url, mixed_load.to_and_fro("one", "two", clients=4, requests=40)) == []
    for name in LEVELS:
        instance = await two.instance(name)
        assert (instance["restarts"], instance["last_exit"]) == (0, None)


async def test_a_sleeper_counts_for_what_it_has(two: Daemon) -> None:
    """Within 64 MiB of what the driver says of its processes."""
    for name in LEVELS:
        await answer(two, name)
        await asleep(two, name)
    device = next(one for one in (await two.get("/devices"))["devices"] if one["index"] == 0)
    used = await used_memory(two)
    for hold in device["holds"]:
        assert abs(hold["bytes"] - used[hold["instance"].removesuffix("/0")]) <= NEAR, (hold, used)


async def used_memory(running: Daemon) -> dict[str, int]:
    """Bytes of all GPUs that each model's processes have, as `nvidia-smi` says."""
    query = ("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    told = await asyncio.create_subprocess_exec("nvidia-smi", *query, stdout=asyncio.subprocess.PIPE)
    lines = (await told.communicate())[0].decode().splitlines()
    sizes = {int(pid): int(size) * 2**20 for pid, size in (line.split(",") for line in lines if line)}
    found = {}
    for name in LEVELS:
        (pid,) = await running.pids(name)
        found[name] = sum(sizes.get(one, 0) for one in session_of(pid))
    return found


async def test_models_say_the_same_after_twenty_naps(two: Daemon) -> None:
    """Ten at each level: their weights are read again, or come back from the machine's memory."""
    before = {name: await answer(two, name) for name in LEVELS}
    for _ in range(10):
        for name in LEVELS:
            await asleep(two, name)
            assert await answer(two, name) == before[name]
