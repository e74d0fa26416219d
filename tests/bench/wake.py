"""What a wake costs beside what the engine takes: one model that is put to sleep by hand, and asked for again.

From the request to its first byte, less what the fake engine has worked on what the daemon asks it for meanwhile: to
wake, whether it sleeps, and the canary. What is left is ours: to decide, to see what is free, to ask, to relay.
"""

import asyncio
import statistics
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from tests.bench.swap import Swap, overheads
from tests.fakes.ledger import GIB, Devices
from tests.harness import PLAIN, Daemon, fake_engines, port_block, running_command

_TOTAL = 80 * GIB
_CHAT = "/v1/chat/completions"
_LEARNING = 4  # wakes before those that are measured


def measure(folder: Path, count: int, say: Callable[[str], None]) -> list[Swap]:
    """So many wakes."""
    folder.mkdir(parents=True)
    wakes = asyncio.run(_measure(folder, count))
    middle, tail = overheads(wakes)
    engine = statistics.median(wake.engine_ms for wake in wakes)
    say(f"wake: p50 {middle:.1f} ms, p95 {tail:.1f} ms beside the engine's own {engine:.0f} ms, {count} wakes")
    return wakes


async def _measure(folder: Path, count: int) -> list[Swap]:
    with Devices(folder / "devices.toml", {"0": _TOTAL}) as devices:
        file = folder / "models.toml"
        file.write_text(_configuration(devices), encoding="utf-8")
        flags = ("--config", str(file), "--log-level", "error")
        async with running_command(folder, "serve", *flags, program=PLAIN) as running:
            await running.post(_CHAT, _body(stream=False))
            connector = aiohttp.UnixConnector(_socket(running))
            async with aiohttp.ClientSession("http://localhost", connector=connector) as engine:
                wakes = [await _wake(running, engine) for _ in range(_LEARNING + count)]
        assert devices.events() == []
        assert devices.starts() == {"a": 1}
    return wakes[_LEARNING:]


def _configuration(devices: Devices) -> str:
    model = '[models.a]\nmodel = "x"\nmemory = "44GiB"\nstart = "on-demand"\nsleep = 1\n'
    args = f'args = {{ fake_ledger = "{devices.file}" }}\n'
    return f'{fake_engines(port_block())}{devices.config}host_memory = "1TiB"\n{model}{args}'


def _body(*, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": "a", "messages": messages, "stream": stream, "fake": {"chunks": 1}}


def _socket(running: Daemon) -> str:
    (record,) = tomllib.loads((running.state_dir / "engines.toml").read_text(encoding="utf-8"))["engines"]
    address: str = record["address"]
    return address.removeprefix("unix:")


async def _wake(running: Daemon, engine: aiohttp.ClientSession) -> Swap:
    """Put it to sleep, then ask for it."""
    await running.post("/models/a/sleep", {}, 202)
    await running.eventually("/models/a", lambda found: found["status"]["state"] == "sleeping")
    began = time.time()
    async with running.session.post(_CHAT, json=_body(stream=True)) as answer:
        ended = time.time()  # its first bytes are there
        assert answer.status == 200, await answer.text()
        await answer.read()
    async with engine.get("/fake/seen") as told:
        seen = [one for one in await told.json() if one["began"] >= began and one["path"] != _CHAT]
    own = sum(one["ended"] - one["began"] for one in seen if one["ended"] <= ended)
    return Swap((ended - began) * 1000, own * 1000)
