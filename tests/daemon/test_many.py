"""Five hundred models: nobody waits for long while all of them are shown, or changed."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness import PAUSE_SECONDS, WAIT_SECONDS, Daemon, daemon, fake_engines

COUNT = 500
MODELS = "".join(f'[models.m{number}]\nmodel = "org/m"\nstart = "on-demand"\n' for number in range(COUNT))


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One daemon for all of them; it fails at its end where a callback took long."""
    engines = fake_engines(11_400).replace("port_end = 11599", "port_end = 11999")
    folder: Path = tmp_path_factory.mktemp("many")
    async with daemon(engines + '[defaults]\ndescription = "one"\n' + MODELS, folder) as running:
        yield running


async def test_lists_of_five_hundred_models_are_whole(shared: Daemon) -> None:
    """Resources, cards for clients, and the series of each, also for those who ask at once."""
    models, cards, metrics, again = await asyncio.gather(
        shared.get("/models"), shared.get("/v1/models"), shared.metrics(), shared.metrics()
    )
    names = [f"m{number}" for number in range(COUNT)]
    assert [model["id"] for model in models["models"]] == names
    assert [card["id"] for card in cards["data"]] == names
    for found in (metrics, again):
        assert sum(series.startswith("vllm_proxy_queued{") for series in found) == COUNT
    assert metrics["vllm_proxy_log_lines_dropped_total"] == 0


async def test_the_lag_of_the_event_loop_is_measured(shared: Daemon) -> None:
    """Ten times a second: the first time may come after the first lists were answered."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not (metrics := await shared.metrics())["vllm_proxy_loop_lag_seconds_count"]:
            await asyncio.sleep(PAUSE_SECONDS)
    assert metrics["vllm_proxy_loop_lag_max_seconds"] >= 0


async def test_a_change_of_the_defaults_reaches_five_hundred_models(shared: Daemon) -> None:
    """Live, and all of them."""
    shared.edit('"one"', '"two"')
    await shared.adopts()
    shown = (await shared.get("/models"))["models"]
    assert {model["effective"]["description"] for model in shown} == {"two"}
