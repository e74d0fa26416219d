"""Every fault of an engine that the fake can be made to show, as real processes: the rows of docs/faults.md."""

import asyncio
import json
import os
import signal
import socket
import sys
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.fakes.ledger import GIB, Devices
from tests.harness import FAKE, Daemon, daemon, fake_engines, session_of, until, vllm_proxy
from vllm_proxy.engine.proc import Process, look_up

ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
OTHER = '[models.other]\nmodel = "org/other"\n'
QUICK = '[defaults]\nrestart = { backoff = "10ms", max_backoff = "10ms" }\nstop_timeout = "300ms"\n'


def chat(*lines: str, **args: object) -> str:
    """The table of the model that fails; `args` are the fake's options."""
    options = "".join(
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}\n" for key, value in args.items()
    )
    keys = "".join(f"{line}\n" for line in lines)
    return f'[models.chat]\nmodel = "org/chat"\n{keys}[models.chat.args]\n{options}'


@asynccontextmanager
async def beside_a_neighbour(folder: Path, port_start: int, table: str) -> AsyncIterator[Daemon]:
    """A daemon with the model that fails and one that must not notice: same process, no restart, still serving."""
    async with daemon(fake_engines(port_start) + QUICK + OTHER + table, folder) as running:
        other = await running.once("other", lambda one: one["state"] == "ready")
        yield running
        now = await running.instance("other")
        assert (now["pid"], now["restarts"], now["last_exit"]) == (other["pid"], 0, None)
        assert (await running.post("/v1/chat/completions", ASK | {"model": "other"}))["object"] == "chat.completion"
        assert await running.stop() == 0
        assert session_of(other["pid"]) == set()


async def control(running: Daemon, what: str) -> None:
    """Tell the chat engine to do what only tests ask for."""
    (port,) = await running.ports("chat")
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(f"http://127.0.0.1:{port}/fake/{what}") as answer:
                await answer.read()
        except aiohttp.ClientError:
            assert what in {"die", "lose-core"}


def exits(found: Any, reason: str) -> bool:  # noqa: ANN401 - JSON
    """Whether an instance is back, and why it was away."""
    return found["state"] == "ready" and found["last_exit"] is not None and found["last_exit"]["reason"] == reason


# While it starts


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("gpu_memory_utilization = 0.92", {"key": "gpu_memory_utilization", "value": 0.39}),
        ('memory = "72GiB"', {"key": "memory", "value": "31.1GiB"}),
    ],
)
async def test_what_would_have_done_is_told_by_the_key_that_the_model_has(
    tmp_path: Path, port_start: int, key: str, change: dict[str, object]
) -> None:
    """Where vLLM has said how much is free, and no longer once it runs."""
    text = (
        "ValueError: Free memory on device cuda:0 (31.2/79.11 GiB) on startup is less than desired GPU memory "
        "utilization (0.92, 72.78 GiB)."
    )
    table = chat(key, "restart.max_failures = 1", fake_exit_at="weights", fake_exit_text=text)
    with Devices(tmp_path / "devices.toml", {"0": 80 * GIB}) as devices:
        async with daemon(fake_engines(port_start) + devices.config + table, tmp_path) as running:
            await running.once("chat", lambda one: one["state"] == "error")
            status = (await running.get("/models/chat"))["status"]
            assert (status["reason"], status["change"]) == ("insufficient_memory", change)
            running.edit("fake_exit_at", "fake_exit_code = 1 #")
            await running.all_ready()
            assert (await running.get("/models/chat"))["status"]["change"] is None


@pytest.mark.parametrize("phase", ["import", "bind", "weights", "profile", "capture", "listen"])
async def test_an_engine_that_dies_while_it_starts_is_started_again(
    tmp_path: Path, port_start: int, phase: str
) -> None:
    """Whatever it was at, the next start is a new one, the dead one's processes are gone, and who waited is served."""
    fault = {"fake_exit_at": phase, "fake_exit_text": "RuntimeError: no luck", "fake_once": str(tmp_path / "once")}
    async with beside_a_neighbour(tmp_path, port_start, chat(**fault)) as running:
        assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        now = await running.once("chat", lambda one: one["state"] == "ready")
        last = now["last_exit"]
        assert (now["restarts"], last["reason"], last["code"]) == (1, "crashed", 1)
        assert "RuntimeError: no luck" in last["message"]
        assert "RuntimeError: no luck" in "\n".join(last["log_tail"])


async def test_an_engine_that_keeps_dying_rests_in_error_and_says_why(tmp_path: Path, port_start: int) -> None:
    """After `restart.max_failures` nothing more is tried; requests are told at once; a start by hand tries anew."""
    table = chat("restart = { max_failures = 3 }", fake_exit_at="weights", fake_exit_text="RuntimeError: no luck")
    async with beside_a_neighbour(tmp_path, port_start, table) as running:
        now = await running.once("chat", lambda one: one["state"] == "error")
        assert now["restarts"] == 2
        error = (await running.post("/v1/chat/completions", ASK, 503))["error"]
        assert error["code"] == "model_error"
        assert "RuntimeError: no luck" in error["message"]
        await running.post("/models/chat/start", {}, 202)
        await running.once("chat", lambda one: one["restarts"] == 4)


async def test_a_start_that_hangs_is_ended_and_tried_again(tmp_path: Path, port_start: int) -> None:
    """Silence for `startup_timeout`, and no processor or disk at work: it is not waited for any longer."""
    table = chat('startup_timeout = "1s"', fake_hang_at="weights", fake_once=str(tmp_path / "once"))
    async with beside_a_neighbour(tmp_path, port_start, table) as running:
        now = await running.once("chat", lambda one: exits(one, "startup_timeout"))
        assert "loading_weights" in now["last_exit"]["message"]
        assert "startup_timeout" in now["last_exit"]["message"]


async def test_an_engine_that_loses_its_port_to_another_program_gets_the_next(tmp_path: Path, port_start: int) -> None:
    """Between the choice of a port and vLLM's bind somebody else may take it."""
    async with beside_a_neighbour(
        tmp_path, port_start, chat(fake_steal_port=True, fake_once=str(tmp_path / "once"))
    ) as running:
        now = await running.once("chat", lambda one: exits(one, "port_in_use"))
        assert now["restarts"] == 1


async def test_a_foreign_server_on_a_port_of_ours_is_skipped_and_never_used(tmp_path: Path, port_start: int) -> None:
    """Whoever listens there already keeps the port."""
    with socket.create_server(("127.0.0.1", port_start)), socket.create_server(("127.0.0.1", port_start + 1)):
        async with beside_a_neighbour(tmp_path, port_start, chat()) as running:
            await running.all_ready()
            assert {*await running.ports("chat"), *await running.ports("other")} == {port_start + 2, port_start + 3}


async def test_an_engine_that_does_not_know_our_name_is_not_ours(tmp_path: Path, port_start: int) -> None:
    """A server that is healthy on the right port but lists other models gets no request."""
    table = chat('startup_timeout = "1s"', "restart = { max_failures = 1 }", fake_foreign=True)
    async with beside_a_neighbour(tmp_path, port_start, table) as running:
        now = await running.once("chat", lambda one: one["state"] == "error")
        assert now["last_exit"]["reason"] == "startup_timeout"


async def test_a_command_that_is_missing_rests_at_once(tmp_path: Path, port_start: int) -> None:
    """No retry finds a program that is not there; the message names it."""
    async with beside_a_neighbour(tmp_path, port_start, chat('command = ["no-such-vllm"]')) as running:
        status = (await running.get("/models/chat"))["status"]
        assert (status["state"], status["reason"]) == ("error", "command_not_found")
        assert "no-such-vllm" in status["message"]


def vllm_that_tells_its_options(folder: Path) -> list[str]:
    """The fake as an installed vLLM, whose Python knows `--hf-overrides`; it tells that only once the fake starts."""
    option = {"names": ["--hf-overrides"], "kind": "store", "nargs": None, "type": "json", "choices": None}
    table = json.dumps({"version": "0.32.0", "options": [option]})
    (folder / "lib/python3.13/site-packages/vllm-0.32.0.dist-info").mkdir(parents=True)
    (folder / "bin").mkdir()
    os.mkfifo(folder / "gate")
    scripts = {
        "python": f"""case $1 in
            */read_options.py) read -r started <{folder}/gate; echo '{table}';;
            *) echo start | tee {folder}/gate >>{folder}/starts; shift; exec {sys.executable} -S {FAKE} "$@";;
            esac""",
        "vllm": "",
    }
    for name, text in scripts.items():
        (folder / "bin" / name).write_text(f"#!{folder}/bin/python\n" if name == "vllm" else f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return [str(folder / "bin/vllm"), "serve"]


async def test_an_unknown_option_is_named_with_the_one_that_was_meant(tmp_path: Path, port_start: int) -> None:
    """By vLLM's own words, where its options were not known yet."""
    command = vllm_that_tells_its_options(tmp_path / "vllm")
    async with beside_a_neighbour(tmp_path, port_start, chat(f"command = {command}", hf_overide="x")) as running:
        now = await running.once("chat", lambda one: one["state"] == "error")
        assert (now["restarts"], now["last_exit"]["reason"]) == (0, "invalid_arguments")
        assert "did you mean hf-overrides?" in now["last_exit"]["message"]


async def test_an_unknown_option_is_refused_before_anything_is_started(tmp_path: Path, port_start: int) -> None:
    """Where this vLLM has told its options once, to whichever daemon."""
    command = vllm_that_tells_its_options(tmp_path / "vllm")
    async with beside_a_neighbour(tmp_path, port_start, chat(f"command = {command}")) as running:
        await running.all_ready()
        while not list((running.state_dir / "options").glob("*.json")):
            await running.get("/health")
    before = (tmp_path / "vllm/starts").read_text()
    async with beside_a_neighbour(tmp_path, port_start, chat(f"command = {command}", hf_overide="x")) as running:
        status = (await running.eventually("/models/chat", lambda model: model["status"]["state"] == "error"))["status"]
        assert status["reason"] == "invalid_arguments"
        assert "args.hf_overide: unknown option; did you mean hf_overrides?" in status["message"]
    assert (tmp_path / "vllm/starts").read_text() == before


async def test_whoever_takes_an_engines_port_first_gets_neither_its_credential_nor_a_request(
    tmp_path: Path, port_start: int
) -> None:
    """Port and own name stand on a command line that every user can read: who knows both is not believed."""
    gate = tmp_path / "go"
    asked: list[str] = []
    async with beside_a_neighbour(tmp_path, port_start, chat(fake_phase_until=f"import={gate}")) as running:
        now = await running.once("chat", lambda one: one["pid"] is not None and one["port"] is not None)
        words = Path(f"/proc/{now['pid']}/cmdline").read_text().split("\0")

        async def answer(request: web.Request) -> web.Response:
            asked.append(f"{request.path} {request.headers.get('Authorization')}")
            return web.json_response({"data": [{"id": word} for word in words]})

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        async with TestServer(app, host="127.0.0.1", port=now["port"]):
            async with asyncio.timeout(60):
                while len(asked) < 10:
                    await asyncio.sleep(0)
            assert (await running.instance("chat"))["state"] == "loading"
            gate.touch()
            now = await running.once("chat", lambda one: exits(one, "port_in_use"))
        assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        assert set(asked) == {"/health None"}
        await running.logged("what answers on an engine's port is not provably the engine", 1)


# While it serves


async def test_an_engine_that_exits_with_0_in_mid_stream_is_a_crash(tmp_path: Path, port_start: int) -> None:
    """The reader gets one last event that says so, and no `[DONE]`; the engine is started again."""
    async with beside_a_neighbour(tmp_path, port_start, chat()) as running:
        body = ASK | {"stream": True, "fake": {"chunks": 5, "die": 2}}
        async with running.session.post("/v1/chat/completions", json=body) as answer:
            text = (await answer.read()).decode()
        assert '"code":"engine_failed"' in text
        assert "[DONE]" not in text
        now = await running.once("chat", lambda one: exits(one, "crashed"))
        assert now["last_exit"]["code"] == 0


@pytest.mark.parametrize("which", ["server", "core"])
async def test_a_killed_process_of_an_engine_takes_its_whole_session_along(
    tmp_path: Path, port_start: int, which: str
) -> None:
    """Whether the API server or the engine core dies: the rest is ended before the next one starts."""
    async with beside_a_neighbour(tmp_path, port_start, chat(fake_grandchildren=2)) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        assert len(session_of(pid)) == 4
        if which == "server":
            os.kill(pid, signal.SIGKILL)
        else:
            await control(running, "lose-core")
        now = await running.once("chat", lambda one: one["state"] == "ready" and one["restarts"] == 1)
        assert now["last_exit"]["signal"] == (9 if which == "server" else None)
        assert session_of(pid) == set()


async def test_an_engine_that_hangs_while_its_health_is_good_is_found_and_restarted(
    tmp_path: Path, port_start: int
) -> None:
    """A request waits, no byte comes and no counter moves for `stall_timeout`: it ends honestly, the engine is new."""
    async with beside_a_neighbour(tmp_path, port_start, chat('stall_timeout = "1s"')) as running:
        await running.all_ready()
        await control(running, "freeze")
        error = (await running.post("/v1/chat/completions", ASK, 502))["error"]
        assert error["code"] == "engine_failed"
        now = await running.once("chat", lambda one: exits(one, "stalled"))
        assert "stall_timeout" in now["last_exit"]["message"]
        assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"


async def test_a_busy_engine_is_not_taken_for_a_hanging_one(tmp_path: Path, port_start: int) -> None:
    """Its counters move while a long answer that is not streamed is made: it is left alone."""
    gate = tmp_path / "go"
    async with beside_a_neighbour(tmp_path, port_start, chat('stall_timeout = "500ms"')) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        await control(running, "busy")
        answer = asyncio.create_task(running.post("/v1/chat/completions", ASK | {"fake": {"hold": str(gate)}}))
        for _ in range(3):  # three beats of the watch are more than the timeout
            await running.counters_read(5)
        assert await running.pids("chat") == [pid]
        gate.touch()
        await control(running, "thaw")
        assert (await answer)["object"] == "chat.completion"


async def test_an_engine_whose_health_stays_bad_is_restarted(tmp_path: Path, port_start: int) -> None:
    """Without any request: `/health` failing for `stall_timeout` is enough."""
    async with beside_a_neighbour(tmp_path, port_start, chat('stall_timeout = "1s"')) as running:
        await running.all_ready()
        await control(running, "sick")
        now = await running.once("chat", lambda one: exits(one, "stalled"))
        assert "/health" in now["last_exit"]["message"]


async def test_an_engine_that_floods_its_log_is_served_and_its_log_stays_short(tmp_path: Path, port_start: int) -> None:
    """A hundred megabytes: the file is cut at 64 MiB, requests are answered, and the daemon's memory stays small."""
    async with beside_a_neighbour(tmp_path, port_start, chat(fake_flood=100_000_000)) as running:
        await running.all_ready()
        file = running.state_dir / "logs" / "chat%2F0.log"
        async with asyncio.timeout(60):
            while "flood ended" not in last_words(running):
                assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        assert file.stat().st_size < 64 * 2**20


def last_words(running: Daemon) -> str:
    """The end of what the daemon logged."""
    with (running.folder / "daemon.log").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 5000))
        return file.read().decode()


async def test_garbage_in_a_log_is_shown_as_text(tmp_path: Path, port_start: int) -> None:
    """Half lines, NULs, colours and bytes that are no UTF-8 break neither the log stream nor the resource."""
    async with beside_a_neighbour(tmp_path, port_start, chat(fake_garbage_log=True)) as running:
        await running.all_ready()
        async with running.admin.get("/models/chat/logs?lines=10000") as answer:
            text = await answer.text()
        assert answer.status == 200
        assert not any(ord(char) < 32 and char not in "\n\t" for char in text)
        (pid,) = await running.pids("chat")
        os.kill(pid, signal.SIGKILL)
        await running.once("chat", lambda one: one["restarts"] == 1 and one["state"] == "ready")


DUMP = """
import os, signal, sys
line = "INFO 11-24 03:10:00 [core.py:1] dump: " + "{'prompt_token_ids': [1234, 5678], 'hub': huggingface.co " * 150
out = sys.stdout
out.write("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has\\n")
out.write("".join(line + "\\n" for _ in range(400)) + "\\n" * 4_000_000)
out.flush()
os._exit(1)
"""


async def test_a_huge_log_at_a_crash_holds_up_nobody(tmp_path: Path, port_start: int) -> None:
    """Megabytes of dumps, then of blank lines: the reason is found; a callback that took long fails this test."""
    (tmp_path / "dump.py").write_text(DUMP)
    command = [sys.executable, str(tmp_path / "dump.py")]
    table = chat(f"command = {command}", "restart = { max_failures = 2, backoff = 0.01 }")
    async with beside_a_neighbour(tmp_path, port_start, table) as running:
        now = await running.once("chat", lambda one: one["state"] == "error")
        assert now["last_exit"]["reason"] == "out_of_memory"
        async with running.admin.get("/models/chat/logs?lines=10000") as answer:
            assert len((await answer.text()).splitlines()) > 400


async def test_a_dead_engines_log_that_goes_on_growing_holds_up_nobody(tmp_path: Path, port_start: int) -> None:
    """What has escaped writes on for ever: the engine is ended all the same, and the others are served."""
    async with beside_a_neighbour(tmp_path, port_start, chat()) as running:
        await running.all_ready()
        file = running.state_dir / "logs" / "chat%2F0.log"
        script = f"exec >>{file}; echo escaped; while :; do echo and goes on, and on, and on; done"
        escaped = await asyncio.create_subprocess_exec("sh", "-c", script)
        try:
            while "and goes on" not in running.log():
                await running.get("/health")
            await running.post("/models/chat/stop", {}, 202)
            await running.once("chat", lambda one: one["state"] == "stopped")
            assert escaped.returncode is None
        finally:
            escaped.kill()
            await escaped.wait()


# While it stops


@pytest.mark.parametrize(
    "fault",
    [{"fake_ignore_sigterm": True}, {"fake_stubborn_core": True, "fake_grandchildren": 3}],
    ids=["ignores-sigterm", "leaves-grandchildren"],
)
async def test_an_engine_that_does_not_go_is_killed_to_its_last_process(
    tmp_path: Path, port_start: int, fault: dict[str, object]
) -> None:
    """`stop_timeout` after SIGTERM every process of its session gets SIGKILL, those that ignore SIGTERM too."""
    async with beside_a_neighbour(tmp_path, port_start, chat(**fault)) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        await running.post("/models/chat/stop", {}, 202)
        await running.eventually("/models/chat", lambda found: found["status"]["state"] == "stopped")
        assert session_of(pid) == set()


def is_new(old: int, found: Any) -> bool:  # noqa: ANN401 - JSON
    """Whether an instance serves with another process."""
    return bool(found["state"] == "ready" and found["pid"] != old)


def commands_of(pid: int) -> bytes:
    """A process's command line; empty where it is gone, and for a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def processes() -> list[Process]:
    """All of them."""
    found = (look_up(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [process for process in found if process]


async def test_what_left_an_engines_session_ends_with_it_and_nothing_stays_a_zombie(
    tmp_path: Path, port_start: int
) -> None:
    """Children with a session of their own, orphaned or not; one that ended by itself meanwhile is reaped as well."""
    forever = f"1000.{port_start}"
    script = f'setsid sleep {forever} & (setsid sleep {forever} & setsid true &) & exec "$@"'
    command = ["sh", "-c", script, "sh", sys.executable, "-S", str(FAKE), "serve"]

    def escaped() -> list[int]:
        return [one.pid for one in processes() if commands_of(one.pid) == f"sleep\0{forever}\0".encode()]

    async def zombies() -> list[int]:
        return [one.pid for one in processes() if one.parent == running.process.pid and not one.alive]

    async with beside_a_neighbour(tmp_path, port_start, chat(f"command = {command}")) as running:
        for _ in range(3):
            await running.all_ready()
            assert len(escaped()) == 2
            (pid,) = await running.pids("chat")
            assert await until(zombies, lambda found: not found) == []
            os.kill(pid, signal.SIGKILL)
            await running.once("chat", partial(is_new, pid))
        await running.post("/models/chat/stop", {}, 202)
        await running.eventually("/models/chat", lambda found: found["status"]["state"] == "stopped")
        assert escaped() == []
        assert await until(zombies, lambda found: not found) == []


async def test_shared_memory_of_a_killed_engine_is_removed(tmp_path: Path, port_start: int) -> None:
    """What it had in /dev/shm would otherwise fill that until no engine can start."""
    async with beside_a_neighbour(tmp_path, port_start, chat(fake_shm=True)) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        record = await segments_on_record(running)
        assert record
        assert all(Path(name).exists() for name in record)
        os.kill(pid, signal.SIGKILL)
        await running.once("chat", lambda one: one["restarts"] == 1 and one["state"] == "ready")
        assert not any(Path(name).exists() for name in record)


async def segments_on_record(running: Daemon) -> list[str]:
    """The shared memory that the daemon knows of."""
    async with asyncio.timeout(30):
        while True:
            lines = (running.state_dir / "engines.toml").read_text().splitlines()
            found = [line.strip(' ",') for line in lines if "/dev/shm/" in line]
            if found:
                return found
            await asyncio.sleep(0)


# What surrounds engines


async def test_a_disk_that_is_full_costs_the_record_and_no_engine(tmp_path: Path, port_start: int) -> None:
    """The state cannot be written: that is shown, and every model serves; once it can be, the next daemon finds all."""
    file = tmp_path / "state" / "engines.toml"
    file.mkdir(parents=True)  # what a full disk does to a write
    async with beside_a_neighbour(tmp_path, port_start, chat()) as running:
        assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        await running.logged("the state cannot be written")
        health = await running.get("/health")
        assert (health["error"], health["state"]["error"]) == (True, f"cannot write {file}: Is a directory")
        assert f"the record of engines: cannot write {file}" in (await vllm_proxy(running.folder, "status"))[1]
        file.rmdir()
        health = await running.eventually("/health", lambda found: found["state"]["error"] is None)
        assert not health["error"]
        assert {entry["instance"] for entry in tomllib.loads(file.read_text())["engines"]} >= {"chat/0"}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("engines.toml", "the record of engines cannot be read"),
        ("engines.toml.unreadable", "temporary folders cannot be looked at"),
        ("logs/chat%2F0.log", "an engine's output is passed on alone"),
        ("usage.sqlite", "what keys have used cannot be written"),
    ],
)
async def test_a_fifo_in_the_state_directory_holds_up_no_start(
    tmp_path: Path, port_start: int, file: str, words: str
) -> None:
    """Nobody writes to it, so who opens it as a file waits for ever: it is told, and every model serves."""
    (tmp_path / "state" / "logs").mkdir(parents=True)
    os.mkfifo(tmp_path / "state" / file)
    async with beside_a_neighbour(tmp_path, port_start, chat() + "[keys.anonymous]\nscopes = ['admin']\n") as running:
        assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        await running.logged(words)
