"""What several files share, each for the whole session: `vllm-proxy demo` itself, two engines that may sleep, options.

All of `real` runs in one process (`tests/conftest.py`).
"""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.harness import Daemon, daemon, running_command, session_of
from tests.real.sleepers import LEVELS, all_pids, answer, configuration, in_state, record_of, under_daemon

PREPARE_SECONDS = 600.0  # converting the chat model, where no cache has it
LOAD_SECONDS = 900.0  # two vLLM starts side by side on two slow cores


@pytest.fixture(scope="session")
def new_place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a folder for a daemon and its state, which knows of vLLM's options what the daemons before it have read.

    To read them takes vLLM ten seconds of a processor; `test_options` does, and the first of the daemons.
    """
    known = tmp_path_factory.mktemp("options")

    def make(name: str) -> Path:
        place = tmp_path_factory.mktemp(name)
        (place / "state").mkdir(mode=0o700)
        (place / "state" / "options").symlink_to(known)
        return place

    return make


@pytest.fixture(scope="session")
async def demo(new_place: Callable[[str], Path]) -> AsyncIterator[Daemon]:
    """The demo, both models ready. It fails, and is never skipped, where vLLM is missing."""
    folder = new_place("demo")
    async with running_command(folder, "demo", seconds=PREPARE_SECONDS) as running:
        await running.until("2 of 2 models ready", LOAD_SECONDS)
        yield running


@pytest.fixture(scope="session")
async def sleepers(new_place: Callable[[str], Path]) -> AsyncIterator[Path]:
    """Where a daemon started both engines that the tests find: each ends its daemon, and keeps them. Then they end."""
    place = new_place("sleepers")
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
