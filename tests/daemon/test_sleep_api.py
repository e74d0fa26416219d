"""Models that sleep, as clients, people and programs see it, with engines that share a GPU."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.api.test_openapi import fits
from tests.daemon.test_room import ON_DEMAND, RULES, fleet, models, once, says
from tests.harness import vllm_proxy

SLEEPS = f"{ON_DEMAND}\nsleep = 1"
AMPLE = f'{RULES}host_memory = "1000GiB"\n'


async def told(events: aiohttp.ClientResponse, last: str) -> AsyncIterator[tuple[str, str | None]]:
    """State and phase of the only instance, from events of the model, up to this state."""
    kind = ""
    async for raw in events.content:
        name, _, value = raw.decode().strip().partition(": ")
        kind = value if name == "event" else kind
        if name == "data" and kind == "model":
            event = json.loads(value)
            yield event["state"], event["instances"][0]["phase"]
            if event["state"] == last:
                return


async def test_a_hand_puts_a_model_to_sleep_and_its_next_request_wakes_it(tmp_path: Path) -> None:
    """Over REST: each step is an event, `/models` and `/devices` show it, metrics count it; the same engine answers."""
    async with fleet(tmp_path, models(chat='start = "always"\nsleep = 1'), AMPLE) as (running, _):
        await once(running, "chat", state="ready")
        before = await running.instance("chat")
        assert (before["sleep"], before["port"]) == ("level 1", None)
        async with running.session.get("/events") as events:
            await events.content.readline()
            begun = await running.post("/models/chat/sleep", {}, 202)
            assert begun["status"]["state"] in {"unloading", "sleeping"}
            steps = [step async for step in told(events, "sleeping")]
            assert steps[-1] == ("sleeping", "sleeping")
            assert ("unloading", "falling_asleep") in steps
            found = await running.get("/models/chat")
            assert fits("Model", found, closed=True) == []
            (device,) = (await running.get("/devices"))["devices"]
            (hold,) = device["holds"]
            asleep = found["status"]["instances"][0]
            assert (asleep["pid"], hold["standing"], hold["bytes"]) == (before["pid"], "sleeps", asleep["memory_bytes"])
            assert asleep["memory_bytes"] < before["memory_bytes"] / 2
            assert await running.get("/ready") == {"status": "ready", "not_ready": {}}
            await running.until(lambda status: "0 of 0 models ready; sleeping: chat" in status)
            assert (await running.metrics())['vllm_proxy_sleepers{device="0"}'] == 1
            assert (await says(running, "chat"))["choices"]
            steps = [step async for step in told(events, "ready")]
        assert ("loading", "waking") in steps
        assert (await running.instance("chat"))["pid"] == before["pid"]
        numbers = await running.metrics()
        assert numbers['vllm_proxy_sleep_seconds_count{model="chat"}'] == 1
        assert numbers['vllm_proxy_wake_seconds_count{level="1",model="chat"}'] == 1
        assert numbers['vllm_proxy_host_memory_bytes{model="chat"}'] > 0
        assert numbers['vllm_proxy_sleepers{device="0"}'] == 0


async def test_the_commands_sleep_and_wake_wait_and_tell_what_became_of_it(tmp_path: Path) -> None:
    """0 when it sleeps, and when it is ready again; 1, with the reason, for one that may not sleep."""
    async with fleet(tmp_path, models(chat=SLEEPS, code=ON_DEMAND), AMPLE) as (running, _):
        status, out, _ = await vllm_proxy(tmp_path, "wake", "chat")
        assert (status, out.splitlines()[-1]) == (0, "chat: ready")
        (pid,) = await running.pids("chat")
        status, out, _ = await vllm_proxy(tmp_path, "sleep", "chat")
        assert (status, out.splitlines()[-1]) == (0, "chat: sleeping (sleeping)")
        status, out, _ = await vllm_proxy(tmp_path, "wake", "chat")
        assert (status, out.splitlines()[-1]) == (0, "chat: ready")
        assert await running.pids("chat") == [pid]
        status, _, err = await vllm_proxy(tmp_path, "sleep", "code")
        assert status == 1
        assert "cannot put code to sleep: its keys have no `sleep`" in err
        error = (await running.post("/models/code/sleep", {}, 409))["error"]
        assert error["code"] == "sleep_not_enabled"
        assert (await vllm_proxy(tmp_path, "sleep", "chat"))[0] == 0
        status, out, _ = await vllm_proxy(tmp_path, "stop", "chat")
        assert (status, out.splitlines()[-1]) == (
            0,
            "chat: stopped: stopped by hand; `vllm-proxy start` lets it serve again, and so does a change of it",
        )


async def test_a_sleep_that_fails_is_told_and_counted_and_the_next_request_is_answered(tmp_path: Path) -> None:
    """The command ends with 1, and says where to look; the second time in a row turns sleep off."""
    args = SLEEPS + '\nargs = {{ fake_sleep = "fails-after-freeing", fake_ledger = "{}" }}'.format(
        tmp_path / "gpus.toml"
    )
    async with fleet(tmp_path, models(chat=args), AMPLE) as (running, _):
        for _ in range(2):
            await says(running, "chat")
            status, out, err = await vllm_proxy(tmp_path, "sleep", "chat")
            assert (status, out.splitlines()[-1]) == (1, "chat: stopped")
            assert "vllm-proxy help sleep_failed" in err
        await says(running, "chat")
        assert (await running.instance("chat"))["sleep"].startswith(
            "off: cannot put the engine to sleep: /sleep?level=1&mode=wait answers 500"
        )
        error = (await running.post("/models/chat/sleep", {}, 409))["error"]
        assert error["message"].startswith(
            "cannot put chat to sleep: cannot put the engine to sleep: /sleep?level=1&mode=wait answers 500"
        )
        numbers: dict[str, Any] = await running.metrics()
        assert numbers['vllm_proxy_sleep_failures_total{model="chat",operation="sleep"}'] == 2


async def test_two_models_that_sleep_take_turns_without_a_start_and_swaps_are_wakes(tmp_path: Path) -> None:
    """And those who give way say so while they sleep."""
    async with fleet(tmp_path, models(chat=SLEEPS, code=SLEEPS), AMPLE) as (running, devices):
        for name in ("chat", "code", "chat", "code"):
            await says(running, name)
        status = await once(running, "chat", state="sleeping")
        assert status["reason"] == "gave_way"
        assert devices.starts() == {"chat": 1, "code": 1}
        numbers = await running.metrics()
        assert numbers['vllm_proxy_swaps_total{how="wake",model="chat"}'] == 1
        assert numbers['vllm_proxy_swaps_total{how="wake",model="code"}'] == 1
        assert numbers['vllm_proxy_evictions_total{depth="sleep",for="code",model="chat"}'] == 2
        both = await asyncio.gather(*(says(running, name) for name in ("chat", "code") * 3))
        assert len(both) == 6
