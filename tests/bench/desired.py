"""How long a change takes with many models declared: `python -m tests.bench.desired`. Needs no vLLM.

Their engines sleep (`start = "on-demand"`); what is measured is the daemon's own work on 200 tables.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from tests.harness import Daemon, daemon, fake_engines

MODELS, ROUNDS = 200, 15
TABLE = """
# Number {n}.
[models.m{n}]
model = "org/model-{n}"
max_model_len = 4096
start = "on-demand"
description = "version 0 of {n}"
aliases = ["alias-{n}"]
[models.m{n}.args]
enable_prefix_caching = true
hf_overrides = {{ a = {n}, b = "x" }}
[models.m{n}.env]
HF_HOME = "/srv/models"
"""


async def edits(running: Daemon) -> list[float]:
    """Seconds from a save to the change being visible."""
    found = []
    for number in range(ROUNDS):
        text = running.file.read_text().replace(f"version {number} of 7", f"version {number + 1} of 7")
        beside = running.file.with_suffix(".new")
        beside.write_text(text)
        begun = time.perf_counter()
        beside.rename(running.file)
        while f"version {number + 1} of" not in (await running.get("/models/m7"))["effective"]["description"]:
            await asyncio.sleep(0.002)
        found.append(time.perf_counter() - begun)
    return found


async def reloads(running: Daemon) -> list[float]:
    """Seconds for a reload that changes nothing."""
    found = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        assert (await running.write("POST", "/config/reload"))["changes"] == []
        found.append(time.perf_counter() - begun)
    return found


async def writes(running: Daemon) -> list[float]:
    """Seconds for a PATCH, to its answer."""
    found = []
    for number in range(ROUNDS):
        begun = time.perf_counter()
        await running.write("PATCH", "/models/m99", {"description": f"patched {number}"})
        found.append(time.perf_counter() - begun)
    return found


async def longest_silence(running: Daemon, stop: asyncio.Event) -> float:
    """Seconds of the slowest of many small requests, sent one after another while something else is measured."""
    slowest = 0.0
    async with aiohttp.ClientSession(running.url) as session:
        while not stop.is_set():
            begun = time.perf_counter()
            async with session.get("/v1/models/m1") as answer:
                await answer.read()
            slowest = max(slowest, time.perf_counter() - begun)
    return slowest


async def main() -> None:
    """Measure and print a table."""
    text = fake_engines(30_000) + "".join(TABLE.format(n=number) for number in range(MODELS))
    with tempfile.TemporaryDirectory() as folder:
        async with daemon(text, Path(folder)) as running:
            print(f"{MODELS} models, {len(text)} bytes, {ROUNDS} rounds\n")
            print("| what | median ms | worst ms | slowest small request beside it, ms |\n|---|---|---|---|")
            for name, work in {"save to visible": edits, "reload of nothing": reloads, "PATCH": writes}.items():
                stop = asyncio.Event()
                beside = asyncio.create_task(longest_silence(running, stop))
                found = await work(running)
                stop.set()
                silence = await beside
                print(
                    f"| {name} | {statistics.median(found) * 1e3:.0f} | {max(found) * 1e3:.0f} | {silence * 1e3:.0f} |"
                )


asyncio.run(main())
