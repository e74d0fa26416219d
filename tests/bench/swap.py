"""What a swap costs beside what its engines take: two models that do not fit together, each asked for in turn.

From the request to its first byte, less what the fake engine takes itself, by one clock: from SIGKILL to all of its
processes until the last one is dead, as it is without a daemon; from its interpreter's first moment until it accepts
connections; from its death until its memory is back. What is left is ours: to decide, to end an engine, to see that its
memory is back, to start one, to see that it is ready, to relay.
"""

import asyncio
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes import running as fakes
from tests.fakes.ledger import GIB, Devices
from tests.harness import FAKE, PLAIN, Daemon, port_block, running_command

_TOTAL = 80 * GIB
_RELEASE_SECONDS = 0.0  # from a death until the memory is back
_DEATHS = 10  # of which the median counts
_LEARNING = 4  # swaps before those that are measured: until then starts are thought to take a minute
# A fake whose environment says when its interpreter was started.
_COMMAND = ["bash", "-c", 'FAKE_BORN_AT=$EPOCHREALTIME exec "$@"', "fake", sys.executable, "-S", str(FAKE), "serve"]


@dataclass(frozen=True, slots=True)
class Swap:
    """One, in ms: all of it, and what the engine took of that."""

    all_ms: float
    engine_ms: float

    @property
    def overhead_ms(self) -> float:
        """What the daemon took."""
        return self.all_ms - self.engine_ms


def overheads(swaps: list[Swap]) -> tuple[float, float]:
    """Their median and their 95th percentile, in ms."""
    found = [swap.overhead_ms for swap in swaps]
    return statistics.median(found), statistics.quantiles(found, n=20)[-1]


def measure(folder: Path, count: int, say: Callable[[str], None]) -> list[Swap]:
    """So many swaps."""
    folder.mkdir(parents=True)
    swaps = asyncio.run(_measure(folder, count))
    middle, tail = overheads(swaps)
    engine = statistics.median(swap.engine_ms for swap in swaps)
    say(f"swap: p50 {middle:.1f} ms, p95 {tail:.1f} ms beside the engine's own {engine:.0f} ms, {count} swaps")
    return swaps


async def _measure(folder: Path, count: int) -> list[Swap]:
    with Devices(folder / "devices.toml", {"0": _TOTAL}) as devices:
        file = folder / "models.toml"
        file.write_text(_configuration(devices), encoding="utf-8")
        flags = ("--config", str(file), "--log-level", "error")
        dying = statistics.median(_dying() for _ in range(_DEATHS))
        async with running_command(folder, "serve", *flags, program=PLAIN) as running:
            swaps = [await _swap(running, "ab"[number % 2], dying) for number in range(_LEARNING + count)]
        assert devices.events() == []
        assert sum(devices.starts().values()) == len(swaps)  # each was one
    return swaps[_LEARNING:]


def _configuration(devices: Devices) -> str:
    first = port_block()
    models = "".join(
        f'[models.{name}]\nmodel = "x"\nmemory = "44GiB"\nstart = "on-demand"\n'
        f'args = {{ fake_ledger = "{devices.file}", fake_release_delay = {_RELEASE_SECONDS} }}\n'
        for name in "ab"
    )
    engine = f"[engine]\ncommand = {_COMMAND!r}\nport_start = {first}\nport_end = {first + 199}\n"
    return f'{engine}{devices.config}min_residency = "0s"\n{models}'


def _dying() -> float:
    """Seconds from SIGKILL to all processes of a fake until the last one has let go of its output."""
    with fakes.engine() as engine:
        engine.connect().close()
        began = time.monotonic()
        os.killpg(engine.pid, signal.SIGKILL)
        engine.rest()
        return time.monotonic() - began


async def _swap(running: Daemon, model: str, dying: float) -> Swap:
    """Ask for the model that does not run, once the other one has been idle for long enough to give way at once."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True, "fake": {"chunks": 1}}
    began = time.time()
    async with running.session.post("/v1/chat/completions", json=body) as answer:
        ended = time.time()  # its first bytes are there
        assert answer.status == 200, await answer.text()
        await answer.read()
    engine = await _state(running, model)
    start = engine["listens_at"] - engine["born_at"]
    await asyncio.sleep(max(0.2, start + _RELEASE_SECONDS))  # half of what its return costs, and some more
    return Swap((ended - began) * 1000, (start + dying + _RELEASE_SECONDS) * 1000)


async def _state(running: Daemon, model: str) -> Any:  # noqa: ANN401 - JSON
    """What the engine of a model tells of itself."""
    (port,) = await running.ports(model)
    async with running.session.get(f"http://127.0.0.1:{port}/fake/state") as answer:
        return await answer.json()
