"""A change of one model beside a running one, with real vLLM."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.harness import Daemon

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


async def test_a_stream_runs_on_while_another_model_is_replaced(demo: Daemon) -> None:
    """B's `max_model_len` is edited: B comes back with the new length; A's stream and its process ids are untouched."""
    file = next(Path(demo.folder).rglob("models.toml"))
    (chat,), (embed,) = await demo.pids("chat"), await demo.pids("embed")
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": "Count to one thousand."}],
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
    }
    async with demo.session.post("/v1/chat/completions", json=body) as stream:
        first = await stream.content.readline()
        assert first.startswith(b"data: ")
        text = file.read_text()
        assert "[models.embed]\n" in text
        file.write_text(text.replace("[models.embed]\n", "[models.embed]\nmax_model_len = 64  # shorter\n"))
        rest = asyncio.create_task(stream.read())
        await _replaced(demo, embed, 64)
        assert (await rest).endswith(b"data: [DONE]\n\n")
    too_long = await demo.post("/v1/embeddings", {"model": "embed", "input": "word " * 100}, 400)
    assert "64" in json.dumps(too_long)
    (second,) = await demo.pids("embed")
    changed = await demo.write("PATCH", "/models/embed", {"max_model_len": None})
    assert "max_model_len" not in changed["spec"]
    assert file.read_text() == text
    await _replaced(demo, second, 256)
    assert await demo.pids("chat") == [chat]
    assert (await demo.instance("chat"))["restarts"] == 0


async def _replaced(demo: Daemon, old: int, length: int) -> None:
    """Wait for the new engine, as long as it may take on two slow cores."""
    async with asyncio.timeout(900):
        while True:
            one = await demo.instance("embed")
            if one["state"] == "ready" and one["pid"] != old:
                break
            await asyncio.sleep(0.2)  # what asks without a pause takes the processor from vLLM, which loads
    assert (await demo.get("/v1/models/embed"))["max_model_len"] == length
