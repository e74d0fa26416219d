"""More models than memory: who comes, who gives way, and what is seen of it, with engines that share real sums."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.ledger import GIB, Devices
from tests.harness import Daemon, daemon, fake_engines, port_block

SAY = {"messages": [{"role": "user", "content": "hi"}]}


def models(**tables: str) -> str:
    """Models that have 6 GiB of a GPU each, with more keys."""
    return "".join(f'[models.{name}]\nmodel = "{name}"\nmemory = "6GiB"\n{keys}\n' for name, keys in tables.items())


@contextlib.asynccontextmanager
async def fleet(
    folder: Path, config: str, rules: str = 'min_residency = 0\nmax_wait = "1s"\n', gpus: int = 1, size: int = 10 * GIB
) -> AsyncIterator[tuple[Daemon, Devices]]:
    """A daemon whose engines share GPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    with Devices(folder / "gpus.toml", {str(number): size for number in range(gpus)}) as devices:
        ledger = f'[defaults]\nargs = {{ fake_ledger = "{devices.file}" }}\n'
        text = f"{fake_engines(port_block())}{devices.config}{rules}{ledger}{config}"
        async with daemon(text, folder) as running:
            yield running, devices
        assert not devices.events(), "nobody was refused, disturbed, or got less than asked for"


async def says(daemon: Daemon, model: str, status: int = 200, **more: object) -> Any:  # noqa: ANN401 - JSON
    """A chat completion."""
    return await daemon.post("/v1/chat/completions", {"model": model, **SAY, **more}, status)


async def test_two_models_that_do_not_fit_together_take_turns_and_no_request_fails(tmp_path: Path) -> None:
    """Each request brings its model, however often the other one was asked for."""
    on_demand = 'start = "on-demand"'
    async with fleet(tmp_path, models(chat=on_demand, code=on_demand)) as (running, devices):
        for _ in range(3):
            for name in ("chat", "code"):
                await says(running, name)
        together = await asyncio.gather(*(says(running, name) for name in ("chat", "code") * 5))
        assert len(together) == 10
        assert devices.most()["0"] <= 10 * GIB
        (shown,) = [model for model in (await running.get("/models"))["models"] if model["status"]["state"] == "stopped"]
        assert shown["status"]["reason"] == "gave_way"
        assert shown["status"]["message"].startswith("gave way to ")
