"""Several engines of one model: what begins alike goes to one of them, within the bound on load."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.harness import Daemon, daemon, fake_engines, port_block, until

CHAT = "/v1/chat/completions"
LONG = "You are a helpful assistant who answers in few words. " * 20
MODELS = """
[defaults]
replicas = 4
model = "x"
[defaults.restart]
backoff = "50ms"
[models.chat]
[models.plain]
balance = "least-loaded"
"""


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with two models of four engines each."""
    async with daemon(fake_engines(port_block()) + MODELS, tmp_path_factory.mktemp("balance")) as found:
        await found.all_ready()
        yield found


async def sent(
    running: Daemon, text: str, model: str = "chat", headers: dict[str, str] | None = None, **more: object
) -> str:
    """Which instance answers such a chat."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    async with running.session.post(CHAT, json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()
        return answer.headers["X-Vllm-Proxy-Instance"]


async def routed(running: Daemon, model: str = "chat") -> dict[str, float]:
    """What has decided so far."""
    series = await running.metrics()
    return {by: series.get(f'vllm_proxy_routed_total{{by="{by}",model="{model}"}}', 0) for by in ("prefix", "load")}


async def test_the_same_beginning_goes_to_the_same_engine_and_unlike_ones_spread(running: Daemon) -> None:
    """Turn after turn, each chat at the engine that had its first turn; all engines have some of the chats."""
    before = await routed(running)
    firsts = {}
    for number in range(24):
        text = f"{number} {LONG}"
        firsts[number] = await sent(running, text)
        for turn in range(3):
            text = f"{text} and turn {turn}"
            assert await sent(running, text) == firsts[number]
    assert len(set(firsts.values())) == 4
    after = await routed(running)
    assert {by: after[by] - before[by] for by in after} == {"prefix": 72, "load": 24}
    series = await running.metrics()
    yes, no = (series[f'vllm_proxy_prefix_bytes_total{{known="{known}",model="chat"}}'] for known in ("yes", "no"))
    assert yes > no > 0


async def test_a_session_stays_where_it_is(running: Daemon) -> None:
    """By the header, which goes on to the engine, and by the member of the body."""
    for number, more in enumerate(({"headers": {"X-Session-ID": "one"}}, {"prompt_cache_key": "two"})):
        found = {await sent(running, f"{number} {turn}", **more) for turn in range(12)}  # type: ignore[arg-type]
        assert len(found) == 1
    await sent(running, "seen", headers={"X-Session-ID": "three", "X-Request-Id": "with-session"})
    (seen,) = await running.seen("with-session")
    assert ["X-Session-ID", "three"] in seen["headers"]


async def test_the_bound_on_load_holds(running: Daemon) -> None:
    """Forty streams that begin alike, of which none ends: no engine has more than 1.25 times the mean and three."""
    body: dict[str, Any] = {
        "model": "chat", "messages": [{"role": "user", "content": f"all {LONG}"}], "stream": True,
        "fake": {"chunks": 10_000, "interval": 0.05},
    }  # fmt: skip
    async with aiohttp.ClientSession(running.url, connector=aiohttp.TCPConnector(limit=0)) as session:
        answers = await asyncio.gather(*(session.post(CHAT, json=body) for _ in range(40)))
        held = Counter(answer.headers["X-Vllm-Proxy-Instance"] for answer in answers)
        for answer in answers:
            answer.close()
    assert sum(held.values()) == 40
    assert len(held) > 2  # three within the bound are enough
    assert max(held.values()) <= 1.25 * 10 + 3
    idle = "vllm_proxy_in_flight"
    await until(running.metrics, lambda found: not any(value for name, value in found.items() if name.startswith(idle)))


async def test_a_change_of_the_key_is_live(running: Daemon) -> None:
    """No engine notices; what was known before is not known after it."""
    pids = await running.pids("plain")
    before = await routed(running, "plain")
    assert len({await sent(running, LONG, "plain") for _ in range(40)}) > 1
    await running.write("PATCH", "/models/plain", {"balance": "prefix"})
    assert len({await sent(running, LONG, "plain") for _ in range(20)}) == 1
    await running.write("PATCH", "/models/plain", {"balance": "least-loaded"})
    assert len({await sent(running, LONG, "plain") for _ in range(40)}) > 1
    after = await routed(running, "plain")
    assert {by: after[by] - before[by] for by in after} == {"prefix": 19, "load": 81}
    assert await running.pids("plain") == pids


async def test_a_new_engine_is_known_to_have_nothing(running: Daemon) -> None:
    """What one had that was killed is new wherever it goes; what others have is where it was."""
    texts = {await sent(running, text): text for text in (f"killed {number} {LONG}" for number in range(24))}
    (name, text), (other, kept), *_ = texts.items()
    index = int(name.rpartition("/")[2])
    pid = (await running.instance("chat", index))["pid"]
    os.kill(pid, signal.SIGKILL)
    await running.once("chat", lambda one: one["state"] == "ready" and one["pid"] != pid, index)
    before = await routed(running)
    assert await sent(running, kept) == other
    await sent(running, text)
    after = await routed(running)
    assert {by: after[by] - before[by] for by in after} == {"prefix": 1, "load": 1}
