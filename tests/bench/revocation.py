"""How soon a revocation is in force: `python -m tests.bench.revocation`. Needs no vLLM.

From the save of the file, the write over REST or the start of the command, to the first request that is refused, and to
the end of a stream that the key has running; with 20 models and 200 keys.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from tests.harness import Daemon, daemon, fake_engines, vllm_proxy
from vllm_proxy.domain.keys import hash_of, new_key

ROUNDS = 10
KEY = new_key(bytes(32))
OTHERS = "".join(f'[keys.k{n}]\nhash = "{hash_of(new_key(n.to_bytes(32)))}"\n' for n in range(1, 200))
MODELS = "".join(f'[models.m{n}]\nmodel = "x"\nstart = "on-demand"\n' for n in range(20))
CI = f'[keys.ci]\nhash = "{hash_of(KEY)}"\nenabled = true\n'
HEADERS = {"Authorization": f"Bearer {KEY}"}

type Revoke = Callable[[Daemon], Awaitable[None]]


async def by_file(running: Daemon) -> None:
    """An editor saves."""
    running.edit("enabled = true", "enabled = false")


async def by_rest(running: Daemon) -> None:
    """A PATCH."""
    await running.write("PATCH", "/keys/ci", {"enabled": False})


async def by_command(running: Daemon) -> None:
    """`vllm-proxy keys revoke`: most of it is Python's start."""
    await vllm_proxy(running.folder, "keys", "revoke", "ci")


async def refused(running: Daemon) -> float:
    """When a request of the key is refused."""
    while True:
        async with running.session.get("/v1/models/chat", headers=HEADERS) as answer:
            if answer.status == 401:
                return time.perf_counter()
        await asyncio.sleep(0.001)


async def ended(answer: aiohttp.ClientResponse) -> float:
    """When a stream has ended."""
    await answer.read()
    return time.perf_counter()


async def measure(running: Daemon, revoke: Revoke) -> tuple[float, float]:
    """Seconds to the first refusal, and to the end of the stream."""
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "fake": {"hold": "/nowhere", "hold_at": 1},
    }
    async with running.session.post("/v1/chat/completions", json=body, headers=HEADERS) as answer:
        await answer.content.readuntil(b"\n\n")
        begun = time.perf_counter()
        waits = asyncio.gather(refused(running), ended(answer))
        await revoke(running)
        first, end = await waits
    running.edit("enabled = false", "enabled = true")
    await running.write("POST", "/config/reload")
    return first - begun, end - begun


async def main() -> None:
    """Measure, and print a table in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        text = fake_engines(18_000) + MODELS + '[models.chat]\nmodel = "x"\n' + OTHERS + CI
        async with daemon(text, Path(folder)) as running:
            await running.eventually("/models/chat", lambda model: model["status"]["state"] == "ready")
            print(f"{'':10} {'first refusal: median':>22} {'worst':>7} {'stream ended: median':>22} {'worst':>7}")
            for name, revoke in (("file", by_file), ("REST", by_rest), ("command", by_command)):
                found = [await measure(running, revoke) for _ in range(ROUNDS)]
                cells = [f(column) * 1000 for column in zip(*found, strict=True) for f in (statistics.median, max)]
                print(f"{name:10} {cells[0]:22.0f} {cells[1]:7.0f} {cells[2]:22.0f} {cells[3]:7.0f}")


if __name__ == "__main__":
    asyncio.run(main())
