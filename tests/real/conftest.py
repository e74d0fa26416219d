"""What several files share, each for the whole session: `vllm-proxy demo` itself, and two engines that may sleep.

All of `real` runs in one process (`tests/conftest.py`).
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness import Daemon, daemon, running_command, session_of
from tests.real.sleepers import LEVELS, all_pids, answer, configuration, in_state, record_of, under_daemon

PREPARE_SECONDS = 600.0  # converting the chat model, where no cache has it
LOAD_SECONDS = 900.0  # two vLLM starts side by side on two slow cores


@pytest.fixture(scope="session")
async def demo(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """The demo, both models ready. It fails, and is never skipped, where vLLM is missing."""
    folder = tmp_path_factory.mktemp("demo")
    async with running_command(folder, "demo", seconds=PREPARE_SECONDS) as running:
        await running.until("2 of 2 models ready", LOAD_SECONDS)
        yield running


@pytest.fixture(scope="session")
async def sleepers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """Where a daemon started both engines that the tests find: each ends its daemon, and keeps them. Then they end."""
    place = tmp_path_factory.mktemp("sleepers")
    async with under_daemon(place) as running:
        for name in LEVELS:  # engines on one device start one at a time
            await answer(running, name)
        pids = await all_pids(running)
        folders = [Path(record_of(running, name)["folder"]) for name in LEVELS]
    yield place
    async with daemon(configuration(), place) as running:
        await in_state(running, "ready", *LEVELS)
        assert await all_pids(running) == pids  # one start of each has done for all
        assert await running.stop() == 0
    assert not any(session_of(pid) for pid in pids.values())
    assert not any(folder.exists() for folder in folders)
