"""Real models that sleep, under one daemon after another: idle, woken by a request, adopted, the same after each nap.

On a processor a nap pauses the engine truly and frees nothing; level 2 loads its weights again all the same. So what
is told apart from a good nap is told by `/is_sleeping` and by the canary alone, also where the memory of the processors
is managed as a device: what an engine was given there is on record for each daemon that adopts it.
"""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Daemon, daemon, session_of
from vllm_proxy.demo.prepare import chat_model
from vllm_proxy.demo.threads import openmp

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

KEEP = '[server]\non_exit = "keep"\n'
LEVELS = {"one": 1, "two": 2}  # model -> level
NAPS = 10  # of each


def configuration(model: Path) -> str:
    """The same weights under two names, one for each level."""
    environment = "\n".join(f'{name} = "{value}"' for name, value in openmp(1).items())
    models = "".join(f"[models.{name}]\nsleep = {level}\n" for name, level in LEVELS.items())
    return f"""
[engine.env]
{environment}
HF_HUB_OFFLINE = "1"
VLLM_CPU_OMP_THREADS_BIND = "nobind"
VLLM_CPU_KVCACHE_SPACE = "1"
[devices]
source = "cpu"
reserve = 0
[defaults]
start = "on-demand"
model = "{model}"
max_model_len = 512
gpu_memory_utilization = 0.1
queue_timeout = "15m"
restart = {{ max_failures = 1 }}
args = {{ enforce_eager = true }}
{models}
"""


@pytest.fixture(scope="module")
async def folder(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """Where a daemon started both engines that the tests find: each ends its daemon, and keeps them. Then they end."""
    place = tmp_path_factory.mktemp("sleep")
    async with under_daemon(place) as running:
        for name in LEVELS:  # engines on one device start one at a time
            await answer(running, name)
        pids = await all_pids(running)
    yield place
    async with daemon(configuration(chat_model(os.environ)), place) as running:
        await in_state(running, "ready", *LEVELS)
        assert await all_pids(running) == pids  # one start of each has done for all
        assert await running.stop() == 0
    assert not any(session_of(pid) for pid in pids.values())


def under_daemon(folder: Path, more: str = "") -> Any:  # noqa: ANN401 - a context manager
    """A daemon that keeps its engines. `more`: keys for all models."""
    config = configuration(chat_model(os.environ)).replace("[defaults]", f"[defaults]\n{more}")
    return daemon(KEEP + config, folder)


async def all_pids(running: Daemon) -> dict[str, int]:
    """The first process of each model's engine."""
    return {name: (await running.instance(name))["pid"] for name in LEVELS}


async def answer(running: Daemon, model: str) -> str:
    """A whole greedy answer to a client."""
    ask = {"model": model, "prompt": "The capital of France is", "max_tokens": 24, "temperature": 0}
    text: str = (await running.post("/v1/completions", ask))["choices"][0]["text"]
    return text


async def in_state(running: Daemon, state: str, *models: str) -> None:
    """Wait until these are so."""
    for name in models:
        await running.once(name, lambda one: one["state"] == state)


async def asleep_by_hand(running: Daemon, *models: str) -> None:
    """Put these to sleep."""
    for name in models:
        await running.post(f"/models/{name}/sleep", {}, 202)
    await in_state(running, "sleeping", *models)


async def test_idle_models_sleep_and_requests_wake_them(folder: Path) -> None:
    """At both levels, and say the same afterwards."""
    async with under_daemon(folder, 'idle_timeout = "1s"') as running:
        before = {name: await answer(running, name) for name in LEVELS}
        for _ in range(2):
            await in_state(running, "sleeping", *LEVELS)
            assert {name: await answer(running, name) for name in LEVELS} == before


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_sleepers_sleep_on_under_the_next_daemon(folder: Path, end: signal.Signals) -> None:
    """However the first one ended; the next request wakes them, and they say what they said to the first one."""
    async with under_daemon(folder) as running:
        before = {name: await answer(running, name) for name in LEVELS}
        await asleep_by_hand(running, *LEVELS)
        pids = await all_pids(running)
        await running.stop(end)
    async with under_daemon(folder) as running:
        await in_state(running, "sleeping", *LEVELS)
        assert await all_pids(running) == pids
        assert {name: await answer(running, name) for name in LEVELS} == before


async def test_a_stream_ends_before_its_engine_sleeps_and_who_comes_meanwhile_wakes_it(folder: Path) -> None:
    """No request fails, nor waits for longer than a nap."""
    async with under_daemon(folder) as running:
        for name in LEVELS:
            before = await answer(running, name)
            ask = {"model": name, "prompt": "Once", "max_tokens": 64, "stream": True, "ignore_eos": True}
            async with running.session.post("/v1/completions", json=ask) as stream:
                await stream.content.readline()  # it runs
                await running.post(f"/models/{name}/sleep", {}, 202)
                assert b"[DONE]" in await stream.content.read()
            assert await answer(running, name) == before


async def test_models_say_the_same_after_twenty_naps(folder: Path) -> None:
    """Ten at each level, each a fall asleep by hand and a wake by a request."""
    async with under_daemon(folder) as running:
        before = {name: await answer(running, name) for name in LEVELS}
        for _ in range(NAPS):
            await asleep_by_hand(running, *LEVELS)
            assert {name: await answer(running, name) for name in LEVELS} == before
        failures = {name: value for name, value in (await running.metrics()).items() if "sleep_failures_total{" in name}
        assert sum(failures.values()) == 0
