"""Clients that come and go whatever happens. Each request must have exactly one outcome, the true one."""

import asyncio
import json
import random
from collections import Counter

import aiohttp

HANG_SECONDS = 120.0  # no request may take so long here: queue_timeout is far below, on a busy machine too
MODELS = ["a", "a", "b", "rare", "nobody"]
SHARED = "You are a helpful assistant. " * 40  # behind one of nine beginnings: replicas are chosen by what they had
# What the daemon may say instead of an answer, while engines come and go.
REFUSALS = frozenset(
    {"model_not_found", "model_error", "model_stopped", "shutting_down", "queue_timeout", "engine_failed", "overloaded"}
)


class Crowd:
    """So many clients, one request after another each."""

    def __init__(self, url: str, count: int, seed: int) -> None:
        self._url = url
        self._count = count
        self._seed = seed
        self.outcomes: Counter[str] = Counter()
        self.enough = asyncio.Event()

    async def run(self) -> None:
        """Until it is enough.

        Raises:
            AssertionError: when an answer lies, or none comes.

        """
        session = aiohttp.ClientSession(self._url, connector=aiohttp.TCPConnector(limit=0))
        async with session, asyncio.TaskGroup() as group:
            for number in range(self._count):
                group.create_task(self._client(session, random.Random(self._seed * 1000 + number)))

    async def _client(self, session: aiohttp.ClientSession, choose: random.Random) -> None:
        while not self.enough.is_set():
            try:
                async with asyncio.timeout(HANG_SECONDS):
                    outcome = await _request(session, choose)
            except TimeoutError:
                raise AssertionError("a request got no answer at all") from None
            self.outcomes[outcome] += 1
            await asyncio.sleep(choose.random() * 0.1)


async def _request(session: aiohttp.ClientSession, choose: random.Random) -> str:
    chunks, stream = choose.randrange(1, 30), choose.random() < 0.6
    body = {
        "model": choose.choice(MODELS),
        "messages": [{"role": "user", "content": f"{choose.randrange(9)} {SHARED}"}],
        "stream": stream,
        "fake": {"chunks": chunks, "interval": 0.01},
    }
    leaves_after = choose.randrange(chunks) if choose.random() < 0.2 else None
    try:
        async with session.post("/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                code = (await answer.json())["error"]["code"]
                assert code in REFUSALS, code
                return f"refused: {code}"
            if leaves_after is not None:
                await answer.content.readline()
                answer.close()
                return "left"
            return judged(await answer.read(), stream=stream)
    except aiohttp.ClientConnectorError:
        return "no daemon"
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
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] in REFUSALS, data[-300:]
    return "said to be broken"
