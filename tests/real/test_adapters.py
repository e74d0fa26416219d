"""Adapters on real engines, under one daemon after another: live additions, changes and removals, and what replaces.

The engine holds two of them at a time, so that each test has some read again.
"""

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Daemon, daemon
from tests.real.cpu import engines_on_cpu
from tests.real.lora import make_adapter
from vllm_proxy.demo.prepare import chat_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

LOAD_SECONDS = 900.0
PROMPT = "The capital of France is"


def configuration(model: Path) -> str:
    """One model with two adapters."""
    return f"""
[server]
on_exit = "keep"
{engines_on_cpu(1)}
[models.chat]
model = "{model}"
max_model_len = 512
gpu_memory_utilization = 0.2
args = {{ enforce_eager = true }}
[models.chat.adapters.one]
path = "adapters/one"
[models.chat.adapters.two]
path = "adapters/two"
[models.chat.adapters_max]
cpu_loras = 2
loras = 1
"""


@pytest.fixture(scope="module")
async def folder(new_place: Callable[[str], Path]) -> AsyncIterator[Path]:
    """Where a daemon started the engine that the tests find: each ends its daemon, and keeps it. Then it ends."""
    place = new_place("adapters")
    for seed, name in enumerate(("one", "two", "three", "four"), 1):
        make_adapter(place / "adapters" / name, seed=seed)
    async with daemon(configuration(chat_model(os.environ)), place) as running:
        await ready(running)
    yield place
    async with daemon((place / "models.toml").read_text().replace('"keep"', '"stop"'), place) as running:
        assert await running.stop() == 0


def under(place: Path) -> Any:  # noqa: ANN401 - a context manager of a daemon
    """The next daemon, with the file as the last one left it."""
    return daemon((place / "models.toml").read_text(), place)


async def ready(running: Daemon, **states: str) -> dict[str, Any]:
    """Wait until every instance serves, and adapters are in these states; their messages."""

    def holds(found: Any) -> bool:  # noqa: ANN401 - JSON
        adapters = {one["id"]: one["state"] for one in found["status"]["adapters"]}
        return (
            all(one["state"] == "ready" for one in found["status"]["instances"]) and states.items() <= adapters.items()
        )

    async with asyncio.timeout(LOAD_SECONDS):
        while not holds(found := await running.get("/models/chat")):
            await asyncio.sleep(0.2)
    return {one["id"]: one for one in found["status"]["adapters"]}


async def says(running: Daemon, model: str, tokens: int = 12) -> str:
    """A greedy answer."""
    asked = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    found = await running.post("/v1/completions", asked)
    assert found["model"] == model
    text: str = found["choices"][0]["text"]
    return text


async def add(running: Daemon, name: str, path: str | None) -> None:
    """By PATCH; None removes it."""
    await running.write("PATCH", "/models/chat", {"adapters": {name: path and {"path": path}}})


async def test_adapters_come_change_and_go_under_a_stream_of_the_base(
    folder: Path, record_property: Callable[[str, object], None]
) -> None:
    """Four answer differently from the base and from each other; the stream has all of its tokens.

    Not the very ones that it has alone: in a batch with others the numbers are rounded otherwise. How long it took from
    a PATCH to the adapter's first answer is recorded, for who wants to know.
    """
    async with under(folder) as running:
        await ready(running, one="ready", two="ready")
        pids = await running.pids("chat")
        asked = {"model": "chat", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        async with running.session.post("/v1/completions", json=asked) as stream:
            first = await stream.content.readuntil(b"\n\n")
            began = time.monotonic()
            await add(running, "three", "adapters/three")
            await says(running, "three", 1)
            record_property("seconds to the first answer, beside a stream", time.monotonic() - began)
            said = [await says(running, name) for name in ("chat", "one", "two", "three")]
            assert len({*said}) == 4
            make_adapter(folder / "adapters" / "one", seed=9)
            async with asyncio.timeout(60):
                while await says(running, "one") == said[1]:
                    await asyncio.sleep(0.05)
            assert await says(running, "two") == said[2]
            await add(running, "two", None)
            await running.post("/v1/completions", {"model": "two", "prompt": PROMPT}, 404)
            events = (first + await stream.read()).decode().split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert json.loads(events[-3][6:])["usage"]["completion_tokens"] == 200
        for name in ("four", "two"):
            began = time.monotonic()
            await add(running, name, f"adapters/{name}")
            await says(running, name, 1)
            record_property("seconds to the first answer", time.monotonic() - began)
        assert await says(running, "two") == said[2]
        assert await running.pids("chat") == pids


async def test_a_broken_adapter_is_an_error_of_its_own(folder: Path) -> None:
    """What only vLLM finds: its weights end too early. The base, the others and the engine go on."""
    weights = make_adapter(folder / "adapters" / "broken") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    async with under(folder) as running:
        await ready(running, one="ready")
        pids = await running.pids("chat")
        await add(running, "broken", "adapters/broken")
        shown = await ready(running, broken="error", one="ready")
        answer = await running.post("/v1/completions", {"model": "broken", "prompt": PROMPT}, 503)
        assert answer["error"]["code"] == "model_error"
        assert answer["error"]["message"] == f"cannot serve broken: {shown['broken']['message']}"
        assert shown["broken"]["message"].startswith("Error while deserializing header")
        await says(running, "one")
        await says(running, "chat")
        await add(running, "broken", None)
        assert await running.pids("chat") == pids


async def test_engines_are_adopted_with_their_adapters(folder: Path) -> None:
    """After a daemon was killed too: none is loaded again, and what changed meanwhile is changed."""
    async with under(folder) as running:
        await ready(running, one="ready", two="ready")
        pids = await running.pids("chat")
        before = {name: await says(running, name) for name in ("chat", "one", "two")}
        await running.stop(signal.SIGKILL)
    make_adapter(folder / "adapters" / "one", seed=11)
    async with under(folder) as running:
        await ready(running, one="ready", two="ready")
        assert await running.pids("chat") == pids
        async with asyncio.timeout(60):  # until then it serves with what it holds, and says so
            while "adapter loaded" not in running.log().rpartition("engine adopted")[2]:
                await asyncio.sleep(0.1)
        await ready(running, one="ready", two="ready")
        assert running.log().rpartition("engine adopted")[2].count("adapter loaded") == 1
        after = {name: await says(running, name) for name in ("chat", "one", "two")}
        assert [name for name in before if before[name] != after[name]] == ["one"]


async def test_an_engine_outlives_the_files_of_its_adapters(folder: Path) -> None:
    """It holds two of four, and reads the others again from snapshots, though their folders are gone."""
    names = ("one", "two", "three", "four")
    async with under(folder) as running:
        await ready(running, one="ready", two="ready", three="ready", four="ready")
        pids = await running.pids("chat")
        said = [await says(running, name) for name in names]
        (folder / "adapters").rename(folder / "elsewhere")
        async with asyncio.timeout(60):
            while not all(one["message"] for one in (await ready(running)).values()):
                await asyncio.sleep(0.1)
        assert [await says(running, name) for name in names] == said
        assert len({*said}) == 4
        (folder / "elsewhere").rename(folder / "adapters")
        async with asyncio.timeout(60):
            while any(one["message"] for one in (await ready(running)).values()):
                await asyncio.sleep(0.1)
        assert [await says(running, name) for name in names] == said
        assert await running.pids("chat") == pids


async def test_a_larger_rank_is_a_replacement_that_the_plan_names_and_each_replica_holds_all(folder: Path) -> None:
    """Rank 64 where the engine has room for 8; a second instance is given all of them before it serves."""
    make_adapter(folder / "adapters" / "large", rank=64, seed=5)
    shutil.rmtree(folder / "adapters" / "four")
    async with under(folder) as running:
        await add(running, "four", None)
        await ready(running, one="ready")
        pids = await running.pids("chat")
        text = running.file.read_text() + '[models.chat.adapters.large]\npath = "adapters/large"\n'
        (change,) = (await running.write("POST", "/config/plan", text))["changes"]
        assert change["action"] == "replace"
        assert "its rank 64 is more than the 8 that engines hold" in change["reason"]
        await running.write("PATCH", "/models/chat", {"replicas": 2, "adapters": {"large": {"path": "adapters/large"}}})
        request = asyncio.create_task(says(running, "large"))
        await ready(running, one="ready", two="ready", three="ready", large="ready")
        assert not {*pids} & {*await running.pids("chat")}
        shown = await ready(running)
        assert {tuple(one["instances"]) for one in shown.values()} == {tuple(shown["one"]["instances"])}
        assert len(shown["one"]["instances"]) == 2
        large = await request
        assert large != await says(running, "chat")
        for _ in range(4):
            assert await says(running, "large") == large
