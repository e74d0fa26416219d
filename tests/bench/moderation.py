"""What moderation adds to its guard's own time: `python -m tests.bench.moderation`. Needs no vLLM.

The guard is the fake engine, asked directly and through the daemon in turn: `/v1/moderations` with one text, and with
sixteen beside the same sixteen asked at once; a chat of a moderated model beside one of a model that is not.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.harness import Daemon, daemon, fake_engines, port_block

ROUNDS = 300
TEXT = "Nothing bad is said here, and some more words of it. " * 10
FILE = """[moderation]
model = "guard"
kind = "classifier"
classes = ["safe", "toxic", "threat"]
threshold = 1.0
[models.guard]
model = "x"
args = { fake_guard = "classifier" }
[models.chat]
model = "x"
moderate = true
[models.free]
model = "x"
"""

type Ask = Callable[[], Awaitable[None]]


def asks(running: Daemon, guard: int, texts: int) -> dict[str, Ask]:
    """What is measured. `guard`: the port of the guard's engine."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 1}

    async def post(url: str, body: object) -> None:
        async with running.session.post(url, json=body) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()

    async def direct() -> None:
        question = {"model": "guard", "input": TEXT}
        await asyncio.gather(*(post(f"http://127.0.0.1:{guard}/classify", question) for _ in range(texts)))

    return {
        "the guard": direct,
        "/v1/moderations": lambda: post("/v1/moderations", {"input": [TEXT] * texts}),
        "a chat": lambda: post("/v1/chat/completions", {"model": "free", **chat}),
        "a moderated chat": lambda: post("/v1/chat/completions", {"model": "chat", **chat}),
    }


async def measure(running: Daemon, texts: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds, the median of each."""
    (guard,) = await running.ports("guard")
    found = asks(running, guard, texts)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, ask in found.items():
            began = time.perf_counter()
            await ask()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) * 1000 for name, each in times.items()}


def added(found: dict[str, float]) -> tuple[float, float]:
    """Milliseconds that moderation adds to the guard's own: by its own route, and before a chat."""
    guard = found["the guard"]
    return found["/v1/moderations"] - guard, found["a moderated chat"] - found["a chat"] - guard


async def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        async with daemon(FILE + fake_engines(port_block()), Path(folder)) as running:
            await running.all_ready()
            for texts in (1, 16):
                await measure(running, texts, 20)
                found = await measure(running, texts)
                print(f"{texts} texts: " + ", ".join(f"{name} {value:.2f} ms" for name, value in found.items()))
                route, chat = added(found)
                print(f"  /v1/moderations adds {route:.2f} ms" + (f", a check {chat:.2f} ms" if texts == 1 else ""))


if __name__ == "__main__":
    asyncio.run(main())
