"""Real models that sleep, under one daemon after another: idle, woken by a request, adopted, the same after each nap.

On a processor a nap pauses the engine truly and frees nothing; level 2 loads its weights again all the same. So what
is told apart from a good nap is told by `/is_sleeping` and by the canary alone, also where the memory of the processors
is managed as a device: what an engine was given there is on record for each daemon that adopts it.
"""

import signal
from pathlib import Path

import pytest

from tests.harness import Daemon
from tests.real.sleepers import LEVELS, all_pids, answer, in_state, under_daemon

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

NAPS = 10  # of each


async def asleep_by_hand(running: Daemon, *models: str) -> None:
    """Put these to sleep."""
    for name in models:
        await running.post(f"/models/{name}/sleep", {}, 202)
    await in_state(running, "sleeping", *models)


async def test_idle_models_sleep_and_requests_wake_them(sleepers: Path) -> None:
    """At both levels, and say the same afterwards."""
    async with under_daemon(sleepers, defaults='idle_timeout = "1s"') as running:
        before = {name: await answer(running, name) for name in LEVELS}
        for _ in range(2):
            await in_state(running, "sleeping", *LEVELS)
            assert {name: await answer(running, name) for name in LEVELS} == before


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_sleepers_sleep_on_under_the_next_daemon(sleepers: Path, end: signal.Signals) -> None:
    """However the first one ended; the next request wakes them, and they say what they said to the first one."""
    async with under_daemon(sleepers) as running:
        before = {name: await answer(running, name) for name in LEVELS}
        await asleep_by_hand(running, *LEVELS)
        pids = await all_pids(running)
        await running.stop(end)
    async with under_daemon(sleepers) as running:
        await in_state(running, "sleeping", *LEVELS)
        assert await all_pids(running) == pids
        assert {name: await answer(running, name) for name in LEVELS} == before


async def test_a_stream_ends_before_its_engine_sleeps_and_who_comes_meanwhile_wakes_it(sleepers: Path) -> None:
    """No request fails, nor waits for longer than a nap."""
    async with under_daemon(sleepers) as running:
        for name in LEVELS:
            before = await answer(running, name)
            ask = {"model": name, "prompt": "Once", "max_tokens": 64, "stream": True, "ignore_eos": True}
            async with running.session.post("/v1/completions", json=ask) as stream:
                await stream.content.readline()  # it runs
                await running.post(f"/models/{name}/sleep", {}, 202)
                assert b"[DONE]" in await stream.content.read()
            assert await answer(running, name) == before


async def test_models_say_the_same_after_twenty_naps(sleepers: Path) -> None:
    """Ten at each level, each a fall asleep by hand and a wake by a request."""
    async with under_daemon(sleepers) as running:
        before = {name: await answer(running, name) for name in LEVELS}
        for _ in range(NAPS):
            await asleep_by_hand(running, *LEVELS)
            assert {name: await answer(running, name) for name in LEVELS} == before
        failures = {name: value for name, value in (await running.metrics()).items() if "sleep_failures_total{" in name}
        assert sum(failures.values()) == 0
