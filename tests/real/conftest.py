"""One daemon with two real models for the whole session: `vllm-proxy demo` itself."""

from collections.abc import AsyncIterator

import pytest

from tests.harness import Daemon, running_command

PREPARE_SECONDS = 600.0  # converting the chat model, where no cache has it
LOAD_SECONDS = 900.0  # two vLLM starts side by side on two slow cores


@pytest.fixture(scope="session")
async def demo(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """The demo, both models ready. It fails, and is never skipped, where vLLM is missing."""
    folder = tmp_path_factory.mktemp("demo")
    async with running_command(folder, "demo", seconds=PREPARE_SECONDS) as running:
        await running.until("2 of 2 models ready", LOAD_SECONDS)
        yield running
