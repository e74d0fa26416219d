"""Engines that may sleep: at Unix sockets of their own they are served, watched, replaced and adopted as all others."""

import asyncio
import os
import signal
import tomllib
from pathlib import Path
from typing import Any

from tests.harness import Daemon, daemon, fake_engines, lives

CHAT = '[models.chat]\nmodel = "org/chat"\nreplicas = 2\nsleep = 1\nrestart = { backoff = "10ms" }\n'
ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


def addresses(running: Daemon) -> dict[str, str]:
    """Where each engine on record listens."""
    records = tomllib.loads((running.state_dir / "engines.toml").read_text())["engines"]
    return {record["instance"]: record["address"] for record in records}


async def instances(running: Daemon) -> list[Any]:
    """All of them, ready."""
    await running.all_ready()
    found: list[Any] = (await running.get("/models/chat"))["status"]["instances"]
    return found


async def test_engines_at_sockets_live_as_all_others(tmp_path: Path, port_start: int) -> None:
    """Two beside one that has the only port; served, streamed, restarted after a crash, adopted by the next daemon."""
    one_port = fake_engines(port_start).replace(f"port_end = {port_start + 199}", f"port_end = {port_start}")
    config = f'{one_port}{CHAT}[models.embed]\nmodel = "org/embed"\n'
    async with daemon(config, tmp_path) as first:
        before = await instances(first)
        assert [one["port"] for one in before] == [None, None]
        assert (await first.instance("embed"))["port"] == port_start
        where = addresses(first)
        for number in (0, 1):
            assert where[f"chat/{number}"].startswith("unix:/")
            assert where[f"chat/{number}"].endswith("/http.sock")
        for _ in range(4):
            assert (await first.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        async with first.session.post("/v1/chat/completions", json={**ASK, "stream": True}) as answer:
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        os.kill(before[1]["pid"], signal.SIGKILL)
        again = await first.once("chat", lambda one: one["state"] == "ready" and one["restarts"] == 1, 1)
        assert again["port"] is None
        assert addresses(first)["chat/1"] != where["chat/1"]
        await first.stop(signal.SIGKILL)
        left = addresses(first)
    async with daemon(config, tmp_path) as second:
        after = await instances(second)
        assert [one["pid"] for one in after] == [before[0]["pid"], again["pid"]]
        assert addresses(second) == left
        assert (await second.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        assert await second.stop() == 0
    assert not any(Path(address.removeprefix("unix:")).exists() for address in left.values())
    assert not lives(after[0]["pid"])


async def test_whoever_takes_an_engines_socket_gets_no_request(tmp_path: Path, port_start: int) -> None:
    """In the place of it, while the engine loads: its health is all that it is asked for, without the credential."""
    heard: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    gate = tmp_path / "go"
    args = f'args = {{ fake_phase_until = "weights={gate}" }}\n'
    config = f'{fake_engines(port_start)}[models.chat]\nmodel = "x"\nsleep = 2\n{args}'
    async with daemon(config, tmp_path) as running:
        await running.once("chat", lambda one: one["pid"] and one["phase"] != "importing")
        path = addresses(running)["chat/0"].removeprefix("unix:")
        Path(path).unlink(missing_ok=True)
        server = await asyncio.start_unix_server(hear, path)
        async with server:
            await running.logged("not provably the engine")
        assert heard
        assert not any(b"Authorization" in head for head in heard)
        assert (await running.instance("chat"))["state"] == "loading"
