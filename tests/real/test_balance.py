"""What `balance` is worth in real vLLM's own counters: two replicas with prefix caches, chats of several turns."""

import asyncio
import os
import re
import tomllib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Daemon, daemon
from tests.real.cpu import engines_on_cpu
from vllm_proxy.demo.prepare import chat_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

LOAD_SECONDS = 600.0  # two engines start together
APPLICATIONS, CHATS, TURNS = 8, 2, 2
SYSTEM, QUESTION = 90, 40  # words
WORDS = "apple river stone cloud maple tiger lemon ocean paper candle garden silver winter bridge rocket violin".split()


def configuration() -> str:
    """One model with two replicas."""
    return f"""
{engines_on_cpu(2)}
[models.chat]
model = "{chat_model(os.environ)}"
max_model_len = 2048
gpu_memory_utilization = 0.1
replicas = 2
balance = "least-loaded"
args = {{ enforce_eager = true, enable_prefix_caching = true, block_size = 32 }}
"""


@pytest.fixture
async def replicas(new_place: Callable[[str], Path]) -> AsyncIterator[Daemon]:
    """Both are ready."""
    async with daemon(configuration(), new_place("balance")) as running:
        await running.until("1 of 1 models ready", LOAD_SECONDS)
        async with asyncio.timeout(LOAD_SECONDS):
            while any(one["state"] != "ready" for one in (await running.get("/models/chat"))["status"]["instances"]):
                await asyncio.sleep(1)  # it computes, and whoever asks takes the processor from it
        yield running


async def cache(running: Daemon) -> tuple[float, float]:
    """Tokens that were asked of the prefix caches of both engines, and those that were found there."""
    found = {"queries": 0.0, "hits": 0.0}
    for record in tomllib.loads((running.state_dir / "engines.toml").read_text())["engines"]:
        async with running.session.get(f"http://{record['address']}/metrics") as answer:
            text = await answer.text()
        for name in found:
            found[name] += sum(map(float, re.findall(rf"(?m)^vllm:prefix_cache_{name}_total\S* (\S+)$", text)))
    return found["queries"], found["hits"]


def text(seed: str, count: int) -> str:
    """So many words that no other seed begins with."""
    return " ".join([seed, *(WORDS[hash((seed, number)) % len(WORDS)] for number in range(count))])


async def talk(running: Daemon, seed: str) -> None:
    """The chats of some applications, each behind its system prompt, take turns: one request at a time.

    Were all sent at once, whose request has just ended would find its engine to be the one with the fewest.
    """
    chats: list[list[dict[str, Any]]] = [
        [{"role": "system", "content": text(f"{seed} {number}", SYSTEM)}]
        for number in range(APPLICATIONS)
        for _ in range(CHATS)
    ]
    for turn in range(TURNS):
        for number, messages in enumerate(chats):
            messages.append({"role": "user", "content": text(f"{number} {turn}", QUESTION)})
            body = {"model": "chat", "messages": messages, "max_tokens": 1, "temperature": 0}
            said = await running.post("/v1/chat/completions", body)
            messages.append({"role": "assistant", "content": said["choices"][0]["message"]["content"]})


async def hit_rate(running: Daemon, balance: str) -> float:
    """Of chats none of which was there before."""
    await running.write("PATCH", "/models/chat", {"balance": balance})
    queries, hits = await cache(running)
    await talk(running, balance)
    after = await cache(running)
    assert after[0] - queries > APPLICATIONS * CHATS * TURNS * SYSTEM
    return (after[1] - hits) / (after[0] - queries)


async def test_replicas_that_remember_compute_less_again(replicas: Daemon) -> None:
    """By 1.3 times the hit rate at least; and the daemon's own figure of what is known is near to that."""
    load = await hit_rate(replicas, "least-loaded")
    prefix = await hit_rate(replicas, "prefix")
    series = await replicas.metrics()
    known, unknown = (series[f'vllm_proxy_prefix_bytes_total{{known="{one}",model="chat"}}'] for one in ("yes", "no"))
    guess = known / (known + unknown)
    shown = f"hit rate {load:.3f} by load, {prefix:.3f} by prefix ({prefix / load:.2f} times); known {guess:.3f}"
    print(shown)
    assert prefix >= 1.3 * load, shown
    assert abs(guess - prefix) < 0.2, shown
