"""How the daemon ends, and what it leaves: nothing."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.harness import clean_environment, connected, daemon, fake_engines, request, session_of
from vllm_proxy.engine.proc import look_up

CHAT = '[models.chat]\nmodel = "org/chat"\nreplicas = 2\n'
READY = "1 of 1 models ready"


async def both_ready(running: object) -> list[int]:
    """The pids of both instances, once both are ready."""
    resource = await running.eventually(  # type: ignore[attr-defined]
        "/models/chat", lambda found: all(item["state"] == "ready" for item in found["status"]["instances"])
    )
    return [item["pid"] for item in resource["status"]["instances"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_everything_with_status_0(tmp_path: Path, port_start: int, number: signal.Signals) -> None:
    """No process of any engine is left, no temporary folder, and systemd was told in order."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path, env={"RUNTIME_DIRECTORY": str(tmp_path)}) as running:
        pids = await both_ready(running)
        assert all(len(session_of(pid)) == 2 for pid in pids)
        assert len(list(tmp_path.glob("vp-*"))) == 2
        assert await running.stop(number) == 0
        assert [session_of(pid) for pid in pids] == [set(), set()]
        assert not list(tmp_path.glob("vp-*"))
        told = [note for note in running.notes.messages if not note.startswith("STATUS=")]
        assert told == ["READY=1", "STOPPING=1", "EXTEND_TIMEOUT_USEC=30000000"]


async def test_a_stream_in_flight_is_finished_before_the_engine_is_stopped(tmp_path: Path, port_start: int) -> None:
    """A stop waits for running requests; a new connection is refused meanwhile."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await running.until(READY)
        body = {"model": "chat", "stream": True, "fake": {"chunks": 20, "interval": 0.05}}
        async with running.session.post("/v1/chat/completions", json=body) as answer:
            await answer.content.readline()
            running.process.send_signal(signal.SIGTERM)
            text = (await answer.read()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert "t19" in text
        assert await running.stop() == 0


async def test_a_stop_closes_what_idles_and_serves_what_was_accepted(tmp_path: Path, port_start: int) -> None:
    """A kept-alive connection ends at once; a request that is half sent, and one that is still to come, are served."""
    body = b'{"model": "chat", "messages": [{"role": "user", "content": "hi"}]}'
    whole = request("/v1/chat/completions", body)
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await both_ready(running)
        async with connected(running.port) as idle, connected(running.port) as half, connected(running.port) as fresh:
            await idle.send(whole)
            assert (await idle.answer()).status == 200
            await half.send(whole[:-5])
            await running.metrics()  # accepted after them, so they are accepted too
            running.process.send_signal(signal.SIGTERM)
            await running.until("STOPPING=1")
            assert await idle.closed()
            for client, rest in ((half, whole[-5:]), (fresh, whole)):
                await client.send(rest)
                answer = await client.answer()
                assert (answer.status, answer.all("Connection")) == (200, ["close"])
                assert await client.closed()
        assert await running.stop() == 0


async def test_a_request_whose_rest_comes_after_the_signal_is_served(tmp_path: Path, port_start: int) -> None:
    """Clients send head and body apart: the stop finds the one without the other, and nothing else to wait for."""
    body = b'{"model": "chat", "messages": [{"role": "user", "content": "hi"}]}'
    whole = request("/v1/chat/completions", body)
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await both_ready(running)
        async with connected(running.port) as client:
            await client.send(whole[: -len(body)])
            await running.metrics()
            running.process.send_signal(signal.SIGTERM)
            await running.until("STOPPING=1")
            await client.send(body)
            assert (await client.answer()).status == 200
        assert await running.stop() == 0


async def test_a_second_signal_skips_the_wait_for_requests(tmp_path: Path, port_start: int) -> None:
    """A stream that never ends holds the daemon no longer than people want; its end says so."""
    config = '[models.chat]\nmodel = "x"\nstop_timeout = "1s"\n'
    async with daemon(fake_engines(port_start) + config, tmp_path) as running:
        await running.until(READY)
        body = {"model": "chat", "stream": True, "fake": {"hang": 1}}
        async with running.session.post("/v1/chat/completions", json=body) as answer:
            await answer.content.readline()
            running.process.send_signal(signal.SIGTERM)
            await running.until("STOPPING=1")
            running.process.send_signal(signal.SIGTERM)
            text = (await answer.read()).decode()
        assert '"code":"engine_failed"' in text
        assert "[DONE]" not in text
        assert await running.stop() == 0


async def test_an_engine_that_ignores_sigterm_is_killed(tmp_path: Path, port_start: int) -> None:
    """After `stop_timeout` every process of its session gets SIGKILL."""
    config = '[models.chat]\nmodel = "x"\nstop_timeout = "200ms"\nargs = { fake_ignore_sigterm = true }\n'
    async with daemon(fake_engines(port_start) + config, tmp_path) as running:
        await running.until(READY)
        (pid,) = await running.pids("chat")
        assert await running.stop() == 0
        assert session_of(pid) == set()


async def test_a_stop_while_models_load_ends_them(tmp_path: Path, port_start: int) -> None:
    """SIGTERM before anything is ready leaves nothing either."""
    config = f'[models.chat]\nmodel = "x"\nargs = {{ fake_load_until = "{tmp_path}/never" }}\n'
    async with daemon(fake_engines(port_start) + config, tmp_path) as running:
        resource = await running.eventually(
            "/models/chat", lambda found: found["status"]["instances"][0]["pid"] is not None
        )
        pid = resource["status"]["instances"][0]["pid"]
        assert await running.stop() == 0
        assert session_of(pid) == set()


async def test_a_daemon_killed_right_after_a_start_leaves_nothing_unrecorded(tmp_path: Path, port_start: int) -> None:
    """An engine is on record before it runs: killed at any moment, the next daemon finds it."""
    config = fake_engines(port_start) + CHAT
    async with daemon(config, tmp_path) as first:
        await first.stop(signal.SIGKILL)
    async with daemon(config, tmp_path) as second:
        mine = set(await both_ready(second))  # adopted ones among them
        for entry in Path("/proc").iterdir():
            process = look_up(int(entry.name)) if entry.name.isdigit() else None
            if process and process.alive and port_start <= _engine_port(process.pid) < port_start + 200:
                assert process.session in mine


def _engine_port(pid: int) -> int:
    """The port that an engine was given on its command line; 0 for any other process."""
    try:
        found = re.search(r"\0--port=(\d+)\0", Path(f"/proc/{pid}/cmdline").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


async def test_a_second_daemon_on_the_same_state_directory_is_refused(tmp_path: Path, port_start: int) -> None:
    """It says so, exits with 1 and touches nothing of the first."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        pids = await both_ready(running)
        command = [sys.executable, "-m", "vllm_proxy", "serve", "-c", str(tmp_path / "models.toml"), "--port", "1"]
        second = await asyncio.to_thread(
            subprocess.run, [*command, "--state-dir", str(running.state_dir)],
            env=clean_environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert second.returncode == 1
        assert "another daemon does; choose another with --state-dir" in second.stderr
        assert await both_ready(running) == pids


def test_a_taken_port_is_named_with_the_way_out(tmp_path: Path) -> None:
    """The daemon says which port is taken and how to choose another, and exits with 1."""
    (tmp_path / "models.toml").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "vllm_proxy", "serve", "--state-dir", str(tmp_path / "state")]
        env = {**clean_environment(), "APP_PORT": str(port)}
        ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in ended.stderr
    assert "--port, APP_PORT or server.port" in ended.stderr


async def test_engines_get_neither_the_daemons_port_nor_its_systemd_messages(tmp_path: Path, port_start: int) -> None:
    """The daemon's own port is left out of the engines' range, and NOTIFY_SOCKET out of their environment."""
    config = fake_engines(port_start) + CHAT
    async with daemon(config, tmp_path, "--port", str(port_start), env={"MASTER_PORT": "1"}) as running:
        running.url = f"http://127.0.0.1:{port_start}"
        await running.until(lambda status: status.startswith("1 of 1"))
        async with aiohttp.ClientSession(running.url) as session, session.get("/models/chat") as answer:
            instances = (await answer.json())["status"]["instances"]
        for instance in instances:
            environment = Path(f"/proc/{instance['pid']}/environ").read_text()
            assert "NOTIFY_SOCKET" not in environment
            assert "MASTER_PORT" not in environment
            assert "VLLM_PROXY" not in environment
            assert instance["port"] != port_start


async def test_the_soft_limit_of_open_files_is_raised(tmp_path: Path, port_start: int) -> None:
    """A daemon started with the usual soft limit runs with the hard one, less what it keeps for its own work."""
    async with daemon(fake_engines(port_start), tmp_path) as running:
        limits = Path(f"/proc/{running.process.pid}/limits").read_text()
        soft, hard = next(line for line in limits.splitlines() if "open files" in line).split()[3:5]
        assert int(hard) - 64 == int(soft)
