"""Two hundred clients that come and go while engines die and come back: every answer is honest, nothing leaks."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from tests.harness import Daemon, daemon, fake_engines, until

CLIENTS = 200
REQUESTS_EACH = 20
KILLS = 8
SHARED = "You are a helpful assistant. " * 40  # behind one of nine beginnings: replicas are chosen by what they had
MODELS = """
[defaults]
replicas = 2
balance = "prefix"
max_in_flight = 40
[defaults.restart]
backoff = "50ms"
max_backoff = "200ms"
max_failures = 1000
[models.a]
model = "x"
[models.b]
model = "x"
"""


class Client:
    """One client with a mind of its own, the same in every run."""

    def __init__(self, session: aiohttp.ClientSession, seed: int, outcomes: Counter[str]) -> None:
        self._session = session
        self._random = random.Random(seed)
        self._outcomes = outcomes

    async def run(self) -> None:
        """Some requests, one after another."""
        for _ in range(REQUESTS_EACH):
            self._outcomes[await self._request()] += 1

    async def _request(self) -> str:
        chunks = self._random.randrange(1, 30)
        stream = self._random.random() < 0.6
        body = {
            "model": self._random.choice(["a", "b", "b", "nobody"]),
            "messages": [{"role": "user", "content": f"{self._random.randrange(9)} {SHARED}"}],
            "stream": stream,
            "fake": {"chunks": chunks, "interval": 0.002},
        }
        leaves_after = self._random.randrange(chunks) if self._random.random() < 0.3 else None
        try:
            async with self._session.post("/v1/chat/completions", json=body) as answer:
                if answer.status != 200:
                    return f"refused {(await answer.json())['error']['code']}"
                if leaves_after is not None:
                    await answer.content.readline()
                    answer.close()
                    return "left"
                return judged(await answer.read(), stream=stream)
        except (aiohttp.ClientError, ConnectionError):
            return "visibly broken"


def judged(data: bytes, *, stream: bool) -> str:
    """What an answer is that looks whole."""
    if not stream:
        assert json.loads(data)["object"] == "chat.completion"
        return "whole"
    if data.endswith(b"data: [DONE]\n\n"):
        return "whole"
    last = data.strip().split(b"\n\n")[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_failed", data[-300:]
    return "said to be broken"


async def kill_engines(running: Daemon, clients: "asyncio.Future[list[None]]") -> int:
    """Kill the server or the whole engine of random instances while the clients run."""
    choose = random.Random(7)
    killed = 0
    while killed < KILLS and not clients.done():
        pids = [pid for model in "ab" for pid in await running.pids(model) if pid]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(choose.choice(pids), signal.SIGKILL)
                killed += 1
            await running.eventually("/health", lambda found: found["models"]["ready"] >= 1)
    return killed


def open_files(running: Daemon) -> int:
    """The daemon's open descriptors."""
    return len(list(Path(f"/proc/{running.process.pid}/fd").iterdir()))


async def count_of_tasks(running: Daemon) -> float:
    """The tasks of its event loop."""
    text = await (await running.session.get("/metrics")).text()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("vllm_proxy_tasks "))


def all_ready(listing: dict[str, list[dict[str, dict[str, list[dict[str, str]]]]]]) -> bool:
    """Whether every instance of every model is ready."""
    return all(item["state"] == "ready" for model in listing["models"] for item in model["status"]["instances"])


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_nothing_leaks_and_every_answer_is_honest(tmp_path: Path, port_start: int) -> None:
    """At rest all models are ready, every count is 0, and the daemon has the descriptors that it began with."""
    async with daemon(fake_engines(port_start) + MODELS, tmp_path) as running:
        await running.eventually("/models", all_ready)
        await running.close()
        running.session = aiohttp.ClientSession(running.url, connector=aiohttp.TCPConnector(force_close=True))
        before, tasks = open_files(running), await count_of_tasks(running)
        outcomes: Counter[str] = Counter()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(running.url, connector=connector) as session:
            crowd = asyncio.gather(*(Client(session, seed, outcomes).run() for seed in range(CLIENTS)))
            killed = await kill_engines(running, crowd)
            await crowd
        assert killed > 1
        assert sum(outcomes.values()) == CLIENTS * REQUESTS_EACH
        assert outcomes["whole"] > CLIENTS
        assert outcomes["left"]
        assert outcomes["refused model_not_found"]
        listing = await running.eventually("/models", all_ready)
        for model in listing["models"]:
            assert (model["status"]["in_flight"], model["status"]["queued"]) == (0, 0)
        # Idle connections to engines stay, at most one for each request that an instance may have.
        await running.eventually("/health", lambda _: open_files(running) <= before + 4 * 40)
        await until(
            lambda: count_of_tasks(running), lambda now: now <= tasks + 1
        )  # connections that close have one each
        text = await (await running.session.get("/metrics")).text()
        for line in text.splitlines():
            if line.startswith(("vllm_proxy_in_flight{", "vllm_proxy_queued{")):
                assert line.endswith(" 0"), line
        decided = re.findall(r'vllm_proxy_routed_total\{by="prefix",model="[ab]"\} (\d+)', text)
        assert sum(map(int, decided)) > CLIENTS
        assert "fault of the daemon" not in running.log()
        assert "Traceback" not in running.log()
