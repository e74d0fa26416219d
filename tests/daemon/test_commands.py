"""Commands that act on a running daemon, and the routes and the control socket behind them."""

import asyncio
import json
import os
import signal
import socket
import sys
import tomllib
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.harness import clean_environment, daemon, fake_engines, session_of, until, vllm_proxy

CHAT = '[models.chat]\nmodel = "org/chat"\n'
TWO = '[models.chat]\nmodel = "org/chat"\nreplicas = 2\n'
ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


async def test_stop_start_and_restart_act_and_tell_what_became_of_it(tmp_path: Path, port_start: int) -> None:
    """Each waits until the model has come to rest, says how far it is, and exits with 0."""
    table = CHAT + "args = { fake_load_seconds = 0.5 }\n"
    async with daemon(fake_engines(port_start) + table, tmp_path) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        status, out, _ = await vllm_proxy(tmp_path, "stop", "chat")
        assert (status, out.splitlines()[-1]) == (
            0,
            "chat: stopped: stopped by hand; `vllm-proxy start` lets it serve again, and so does a change of it",
        )
        assert session_of(pid) == set()
        assert (await running.post("/v1/chat/completions", ASK, 503))["error"]["code"] == "model_stopped"
        status, out, _ = await vllm_proxy(tmp_path, "start", "chat")
        assert (status, out.splitlines()[-1]) == (0, "chat: ready")
        assert any(line.startswith("chat: loading") for line in out.splitlines())
        (before,) = await running.pids("chat")
        status, out, _ = await vllm_proxy(tmp_path, "restart", "chat")
        assert (status, out.splitlines()[-1]) == (0, "chat: ready")
        assert await running.pids("chat") != [before]


async def test_json_prints_the_resource_alone(tmp_path: Path, port_start: int) -> None:
    """For programs: one document, the model as it is when the command has done its work."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await running.all_ready()
        status, out, _ = await vllm_proxy(tmp_path, "stop", "chat", "--json")
        assert (status, json.loads(out)["status"]["reason"]) == (0, "stopped_by_hand")


async def test_a_start_that_fails_exits_with_1_and_the_reason(tmp_path: Path, port_start: int) -> None:
    """The model rests in error; the sentence is the resource's, and where to read on is told."""
    table = (
        CHAT + 'restart = { max_failures = 1 }\nargs = { fake_exit_at = "weights", fake_exit_text = "BadLuck: no" }\n'
    )
    async with daemon(fake_engines(port_start) + table, tmp_path) as running:
        await running.once("chat", lambda one: one["state"] == "error")
        status, out, err = await vllm_proxy(tmp_path, "start", "chat")
        assert status == 1
        assert "BadLuck: no" in out
        assert err == "vllm-proxy: `vllm-proxy help crashed` says what to look at, and what to do\n"


async def test_who_waits_for_a_model_is_told_that_somebody_else_wants_it_otherwise(
    tmp_path: Path, port_start: int
) -> None:
    """Instead of waiting for ever; but a model that has gone to sleep again was started."""
    models = CHAT + f'args = {{ fake_phase_until = "weights={tmp_path / "never"}" }}\n'
    models += '[models.quick]\nmodel = "x"\nstart = "on-demand"\nidle_timeout = "50ms"\n'
    async with daemon(fake_engines(port_start) + models, tmp_path) as running:
        before = (await running.once("chat", lambda one: one["pid"] is not None))["pid"]
        starting = asyncio.create_task(vllm_proxy(tmp_path, "restart", "chat"))
        await running.once("chat", lambda one: one["pid"] not in {None, before})
        await running.post("/models/chat/stop", {}, 202)
        quick = await vllm_proxy(tmp_path, "start", "quick")
        assert quick[0] == 0
        status, out, _ = await starting
        assert (status, out.splitlines()[-1]) == (
            1,
            "chat: stopped: stopped by hand; `vllm-proxy start` lets it serve again, and so does a change of it",
        )


async def test_what_the_daemon_does_not_know_or_allow_is_1(tmp_path: Path, port_start: int) -> None:
    """A model that there is not, one that is disabled: in the daemon's words."""
    async with daemon(fake_engines(port_start) + CHAT + "enabled = false\n", tmp_path):
        status, _, err = await vllm_proxy(tmp_path, "start", "nobody")
        listed = "`vllm-proxy status` and GET /models list them"
        assert (status, err) == (1, f"vllm-proxy: cannot find model 'nobody': there is chat; {listed}\n")
        status, _, err = await vllm_proxy(tmp_path, "restart", "chat")
        assert status == 1
        assert "disabled" in err


@pytest.mark.parametrize(
    "command",
    [("start", "chat"), ("stop", "chat"), ("restart", "chat"), ("sleep", "chat"), ("wake", "chat"), ("logs", "chat")],
)
async def test_without_a_daemon_it_is_3(tmp_path: Path, command: tuple[str, ...]) -> None:
    """The message says where none was found."""
    status, _, err = await vllm_proxy(tmp_path, *command)
    assert status == 3
    assert f"none listens on {tmp_path}/state/control.sock" in err


async def test_the_socket_of_a_killed_daemon_is_no_daemon(tmp_path: Path, port_start: int) -> None:
    """Its file is left, and nobody answers; the next daemon takes its place."""
    config = fake_engines(port_start) + CHAT
    async with daemon(config, tmp_path) as first:
        await first.all_ready()
        await first.stop(signal.SIGKILL)
    assert (tmp_path / "state" / "control.sock").is_socket()
    assert (await vllm_proxy(tmp_path, "stop", "chat"))[0] == 3
    async with daemon(config, tmp_path) as second:
        await second.all_ready()
        assert (await vllm_proxy(tmp_path, "stop", "chat"))[0] == 0
        assert await second.stop() == 0
    assert not (tmp_path / "state" / "control.sock").exists()


async def test_stop_all_stops_every_model_of_the_running_daemon(tmp_path: Path, port_start: int) -> None:
    """They rest as if each had been stopped by hand; the daemon lives on."""
    table = TWO + '[models.embed]\nmodel = "org/embed"\n[models.off]\nmodel = "x"\nenabled = false\n'
    async with daemon(fake_engines(port_start) + table, tmp_path) as running:
        await running.all_ready()
        assert (await vllm_proxy(tmp_path, "stop", "--all"))[0] == 0
        assert (await running.get("/health"))["models"]["stopped"] == 3
        assert running.process.returncode is None


async def test_stop_all_tells_its_outcome_in_json(tmp_path: Path, port_start: int) -> None:
    """One document: the models of a running daemon, or the engines that one had left."""
    config = '[server]\non_exit = "keep"\n' + fake_engines(port_start) + TWO
    async with daemon(config, tmp_path) as running:
        await running.all_ready()
        status, out, _ = await vllm_proxy(tmp_path, "stop", "--all", "--json")
        found = json.loads(out)
        assert (status, found["ended"], found["engines"]) == (0, True, [])
        assert [model["status"]["state"] for model in found["models"]] == ["stopped"]
        await running.post("/models/chat/start", {}, 202)
        await running.all_ready()
        pids = await running.pids("chat")
        await running.stop()
    status, out, _ = await vllm_proxy(tmp_path, "stop", "--all", "--json")
    found = json.loads(out)
    assert (status, found["ended"], found["models"]) == (0, True, [])
    left = {(engine["instance"], engine["pid"]) for engine in found["engines"]}
    assert left == {("chat/0", pids[0]), ("chat/1", pids[1])}


async def test_the_control_socket_is_the_owners_alone_and_lies_in_the_runtime_directory(
    tmp_path: Path, port_start: int
) -> None:
    """Mode 0600; it answers whatever it is called, also where the port lets nobody in. But for what pages can be."""
    runtime = tmp_path / "run"
    runtime.mkdir()
    config = '[server]\nhost = "0.0.0.0"\n' + fake_engines(port_start) + CHAT
    async with daemon(config, tmp_path, env={"RUNTIME_DIRECTORY": str(runtime)}) as running:
        path = runtime / "control.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        async with running.session.get("/models") as answer:
            assert (await answer.json())["error"]["code"] == "missing_api_key"
        connector = aiohttp.UnixConnector(str(path))
        async with aiohttp.ClientSession("http://whatever", connector=connector) as session:
            async with session.get("/models") as answer:
                assert answer.status == 200
            for header in ({"Origin": "http://whatever"}, {"Host": "evil.example"}):
                async with session.get("/models", headers=header) as answer:
                    assert answer.status == 403


async def test_a_state_directory_with_a_very_long_name_has_a_control_socket_too(
    tmp_path: Path, port_start: int
) -> None:
    """A socket's name has at most 107 bytes; a path may have more."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    async with daemon(fake_engines(port_start) + CHAT, deep) as running:
        await running.all_ready()
        assert (await vllm_proxy(deep, "stop", "chat"))[0] == 0


# Logs


async def test_logs_are_the_last_lines_of_every_instance(tmp_path: Path, port_start: int) -> None:
    """Of several instances each line says whose it is; `lines` says how many of each."""
    async with daemon(fake_engines(port_start) + TWO, tmp_path) as running:
        await running.all_ready()
        async with running.admin.get("/models/chat/logs?lines=2") as answer:
            assert answer.content_type == "text/plain"
            lines = (await answer.text()).splitlines()
        assert [line.partition(" | ")[0] for line in lines] == ["chat/0", "chat/0", "chat/1", "chat/1"]
        assert "Application startup complete." in lines[1]
        status, out, _ = await vllm_proxy(tmp_path, "logs", "chat", "-n", "2")
        assert (status, out.splitlines()) == (0, lines)
        status, out, _ = await vllm_proxy(tmp_path, "logs", "chat", "-n", "1", "--json")
        assert json.loads(out.splitlines()[0]) == {"line": lines[1]}


@pytest.mark.parametrize("lines", ["x", "-1", "1.5", "9" * 20, "٣"])
async def test_a_number_of_lines_that_is_none_is_refused(tmp_path: Path, port_start: int, lines: str) -> None:
    """400, with what was given."""
    async with (
        daemon(fake_engines(port_start) + CHAT, tmp_path) as running,
        running.admin.get("/models/chat/logs", params={"lines": lines}) as answer,
    ):
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "bad_request")


async def test_the_logs_of_a_model_that_never_ran_are_empty_and_of_none_are_404(
    tmp_path: Path, port_start: int
) -> None:
    """An on-demand model has no engine yet; that is no error."""
    async with daemon(fake_engines(port_start) + CHAT + 'start = "on-demand"\n', tmp_path) as running:
        async with running.admin.get("/models/chat/logs") as answer:
            assert (answer.status, await answer.text()) == (200, "")
        assert (await running.write("GET", "/models/nobody/logs", status=404))["error"]["code"] == "model_not_found"


async def test_a_followed_log_goes_on_until_the_daemon_stops(tmp_path: Path, port_start: int) -> None:
    """What an engine writes comes as events, over its restart too; the stop of the daemon ends the stream in order."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        async with running.admin.get("/models/chat/logs?follow=1&lines=1") as answer:
            assert answer.content_type == "text/event-stream"
            assert b"Application startup complete" in await answer.content.readline()
            os.kill(pid, signal.SIGKILL)
            text = b""
            while b"Application startup complete" not in text:
                text += await answer.content.readline()
            stopping = asyncio.create_task(running.stop())
            rest = await answer.content.read()
        assert await stopping == 0
        assert all(line.startswith(b"data: ") for line in (text + rest).splitlines() if line)


async def test_logs_f_prints_lines_as_they_come(tmp_path: Path, port_start: int) -> None:
    """Until it is interrupted."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        follower = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vllm_proxy", "logs", "chat", "-f", "-n", "1", "--state-dir", str(running.state_dir),
            env=clean_environment(), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert follower.stdout is not None
        assert b"Application startup complete" in await follower.stdout.readline()
        os.kill(pid, signal.SIGKILL)
        while b"Application startup complete" not in await follower.stdout.readline():
            pass
        follower.send_signal(signal.SIGINT)
        assert await follower.wait() == 1


async def test_a_line_may_be_as_long_as_a_log_can_hold(tmp_path: Path, port_start: int) -> None:
    """A megabyte without a newline, before and while it is followed."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await running.all_ready()
        (log,) = (running.state_dir / "logs").iterdir()
        with log.open("a") as file:
            file.write("x" * 2**20 + "\n")
        status, out, _ = await vllm_proxy(tmp_path, "logs", "chat", "-n", "1")
        assert (status, out) == (0, "x" * 2**20 + "\n")
        follower = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vllm_proxy", "logs", "chat", "-f", "-n", "1", "--state-dir", str(running.state_dir),
            env=clean_environment(), stdout=asyncio.subprocess.PIPE, limit=2**22,
        )  # fmt: skip
        assert follower.stdout is not None
        assert await follower.stdout.readline() == b"x" * 2**20 + b"\n"
        with log.open("a") as file:
            file.write("y" * 2**20 + "\nlast\n")
        seen = b""
        while not seen.endswith(b"last\n"):
            seen += await follower.stdout.readline()
        assert seen.count(b"y") == 2**20
        await running.stop()
        assert await follower.wait() == 0


async def test_engine_output_is_passed_on_with_its_instance(tmp_path: Path, port_start: int) -> None:
    """One place to read: the daemon's own log holds the lines of all engines."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await running.all_ready()

        async def log() -> str:
            return running.log()

        await until(log, lambda text: any(
            line.startswith("chat/0 | ") and "Application startup complete" in line for line in text.splitlines()
        ))  # fmt: skip


# On demand


async def test_an_on_demand_model_is_started_by_its_first_request(tmp_path: Path, port_start: int) -> None:
    """Requests that come together share one start; `/ready` does not wait for it; STATUS says that it sleeps."""
    async with daemon(fake_engines(port_start) + CHAT + 'start = "on-demand"\n', tmp_path) as running:
        await running.until("0 of 0 models ready; on demand: chat")
        await running.get("/ready")
        answers = await asyncio.gather(*(running.post("/v1/chat/completions", ASK) for _ in range(5)))
        assert {answer["object"] for answer in answers} == {"chat.completion"}
        await running.logged("engine started", 1)
        assert (await running.get("/v1/models"))["data"][0]["id"] == "chat"


async def test_an_on_demand_model_is_unloaded_when_idle_and_comes_back(tmp_path: Path, port_start: int) -> None:
    """After `idle_timeout` nothing of it is left; the next request waits for a new start."""
    table = CHAT + 'start = "on-demand"\nidle_timeout = "300ms"\n'
    async with daemon(fake_engines(port_start) + table, tmp_path) as running:
        await running.post("/v1/chat/completions", ASK)
        (pid,) = await running.pids("chat")
        await running.eventually("/models/chat", lambda found: found["status"]["state"] == "stopped")
        assert pid is None or session_of(pid) == set()
        assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        await running.logged("engine started", 2)


# The estimate


async def test_the_next_start_is_estimated_from_the_last_ones(tmp_path: Path, port_start: int) -> None:
    """The resource says how long a start of the same spec may still take."""
    gate = tmp_path / "go"
    gate.touch()
    table = CHAT + f'args = {{ fake_load_seconds = 0.2, fake_phase_until = "weights={gate}" }}\n'
    async with daemon(fake_engines(port_start) + table, tmp_path) as running:
        await running.all_ready()
    gate.unlink()
    file = tmp_path / "state/starts.toml"
    ((took,),) = tomllib.loads(file.read_text())["seconds"].values()
    assert took >= 0.2
    file.write_text(file.read_text().replace(str(took), "30.0"))  # on a busy machine a start may outlast the first one
    async with daemon(fake_engines(port_start) + table, tmp_path) as running:
        seen: dict[str, Any] = await running.once("chat", lambda one: one["ready_in_seconds"] is not None)
        assert 0 < seen["ready_in_seconds"] <= 30
        await running.until(lambda status: "s left" in status)
        gate.touch()
        await running.all_ready()


async def test_a_second_daemon_does_not_take_the_first_ones_socket(tmp_path: Path, port_start: int) -> None:
    """The state directory is locked before the socket is touched."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await running.all_ready()
        command = [sys.executable, "-m", "vllm_proxy", "serve", "-c", str(tmp_path / "models.toml"), "--port", "1"]
        second = await asyncio.create_subprocess_exec(
            *command, "--state-dir", str(running.state_dir), env=clean_environment(), stderr=asyncio.subprocess.DEVNULL
        )
        assert await second.wait() == 1
        assert (await vllm_proxy(tmp_path, "stop", "chat"))[0] == 0


def nothing_listens(path: Path) -> bool:
    """Whether a Unix socket refuses."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) != 0


async def test_the_socket_is_gone_behind_an_orderly_stop(tmp_path: Path, port_start: int) -> None:
    """No file is left that a client could take for a daemon."""
    async with daemon(fake_engines(port_start), tmp_path) as running:
        path = running.state_dir / "control.sock"
        assert not nothing_listens(path)
        assert await running.stop() == 0
        assert not path.exists()
