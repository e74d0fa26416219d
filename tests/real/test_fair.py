"""Keys share a real vLLM: behind sixteen requests of one key another's is next, and nothing is slower for it."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Daemon
from tests.real.sleepers import in_state, under_daemon
from vllm_proxy.domain.keys import hash_of, new_key

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

KEYS = {name: new_key(bytes([number]) * 32) for number, name in enumerate(("heavy", "light"))}
TOKENS = 24
MODEL = "one"


TABLES = "".join(f'[keys.{name}]\nhash = "{hash_of(key)}"\n' for name, key in KEYS.items())


@pytest.fixture
async def fair(sleepers: Path) -> AsyncIterator[Daemon]:
    """A daemon with two keys, whose model is ready and works on one request at a time."""
    async with under_daemon(sleepers, tables=TABLES) as running:
        await in_state(running, "ready", MODEL)
        yield running


async def ask(running: Daemon, key: str, order: list[str]) -> float:
    """One stream, to its end; notes whose it is at its first token, and returns the seconds until that."""
    body: dict[str, Any] = {
        "model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": TOKENS, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    began = time.monotonic()
    async with running.session.post(
        "/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEYS[key]}"}
    ) as answer:
        assert answer.status == 200, await answer.text()
        await answer.content.readline()
        first = time.monotonic() - began
        order.append(key)
        await answer.read()
    return first


async def test_a_light_key_is_next_behind_sixteen_requests_of_a_heavy_one(fair: Daemon) -> None:
    """It waits for the one that is being worked on, and not for the fifteen that wait in vLLM's own queue."""
    order: list[str] = []
    heavy = [asyncio.create_task(ask(fair, "heavy", order)) for _ in range(16)]
    while not order:
        await asyncio.wait(heavy, timeout=0.01)
    light = await ask(fair, "light", order)
    before = order.index("light")
    waits = await asyncio.gather(*heavy)
    assert before <= 2
    assert light < sorted(waits)[4]
    assert len(order) == 17
