"""What the machine does to a daemon: no threads, disks that hang, files that are no files, time that stands still."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    AS_NOBODY,
    NOBODY,
    PLAIN,
    WAIT_SECONDS,
    Daemon,
    clean_environment,
    daemon,
    fake_engines,
    loading_until,
    running_command,
    session_of,
    until,
)
from vllm_proxy.places import short_name

CHAT = '[models.chat]\nmodel = "some/chat"\nargs = { fake_load_seconds = 0.1 }\n'
FROZEN_SECONDS = 5.0


def limit_processes(running: Daemon, most: int) -> None:
    """How many processes and threads the daemon's user may have when the daemon makes another."""
    subprocess.run([*AS_NOBODY, "prlimit", f"--pid={running.process.pid}", f"--nproc={most}:"], check=True)


@contextlib.asynccontextmanager
async def serving(folder: Path, text: str, *before: str, program: Sequence[str] = ()) -> AsyncIterator[Daemon]:
    """A daemon whose file lies in a folder of its own, `conf`. `before`: what runs it."""
    (folder / "conf").mkdir()
    file = folder / "conf" / "models.toml"
    file.write_text(textwrap.dedent(text))
    command = (*before, *(program or PLAIN))
    async with running_command(folder, "serve", "--config", str(file), program=command) as running:
        yield running


def described(text: str) -> Callable[[Any], bool]:
    """Whether a model has this description."""
    return lambda model: model["spec"].get("description") == text


async def test_a_daemon_that_can_make_no_thread_follows_its_file_and_ends_its_engines(
    tmp_path: Path, port_start: int
) -> None:
    """No engine can be started then, and that is said; when there is room again all goes on."""
    async with serving(tmp_path, fake_engines(port_start) + CHAT, *AS_NOBODY) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        limit_processes(running, 1)
        conf = tmp_path / "conf"
        conf.rename(tmp_path / "old")  # what was watched is gone: it must be watched anew
        conf.mkdir()
        text = (tmp_path / "old" / "models.toml").read_text()
        for number in "1", "2", "3":
            (conf / "models.toml").write_text(f'{text}description = "{number}"\n')
            await running.eventually("/models/chat", described(number))
        assert await running.pids("chat") == [pid], "its policy alone has changed"
        os.chown(conf / "models.toml", NOBODY, 0)
        await running.write("PATCH", "/models/chat", {"description": "4"})
        await running.post("/models/chat/restart", {}, status=202)
        await running.once("chat", lambda one: one["phase"] == "backoff")
        assert "cannot start a process" in (await running.get("/models/chat"))["status"]["message"]
        assert not session_of(pid)
        limit_processes(running, 1000)
        await running.all_ready()
        (pid,) = await running.pids("chat")
        limit_processes(running, 1)
        assert await running.stop() == 0
        assert not session_of(pid)
    assert "Traceback" not in running.log()
    assert "panicked" not in running.log()


async def test_an_adapter_whose_folder_may_not_be_looked_at_is_its_own_problem_alone(
    tmp_path: Path, port_start: int
) -> None:
    """The file is followed and written as ever, at a start too; so is one in a folder that is closed to the daemon."""
    name = "x" * 300  # refused by the system in the same way, to root too
    text = fake_engines(port_start) + CHAT + f'[models.chat.adapters.support]\npath = "/srv/{name}/support"\n'
    async with serving(tmp_path, text) as running:
        found = await running.eventually(
            "/models/chat", lambda model: [one["state"] for one in model["status"]["adapters"]] == ["error"]
        )
        assert "File name too long" in found["status"]["adapters"][0]["message"]
        (tmp_path / "conf" / "models.toml").write_text(text.replace('"some/chat"', '"some/chat"\ndescription = "new"'))
        await running.eventually("/models/chat", described("new"))
        await running.write("PATCH", "/models/chat", {"description": "newer"})
        assert (await running.get("/health"))["config"]["error"] is None
    assert "Traceback" not in running.log()


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder"])
async def test_a_file_that_becomes_none_is_rejected_and_what_runs_goes_on(
    tmp_path: Path, port_start: int, kind: str
) -> None:
    """Nobody waits for what never comes: not the watch, not a writer; when there is a file again it is followed."""
    async with serving(tmp_path, fake_engines(port_start) + CHAT) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        file = tmp_path / "conf" / "models.toml"
        text = file.read_text()
        file.unlink()
        with contextlib.ExitStack() as stack:
            if kind == "fifo":
                os.mkfifo(file)
            elif kind == "device":
                file.symlink_to("/dev/zero")
            elif kind == "folder":
                file.mkdir()
            else:
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                with short_name(file) as name:
                    listener.bind(name)
            await running.until(lambda status: "it is a" in status and "regular file" in status)
            for method, path, body in (("PATCH", "/models/chat", {"description": "x"}), ("PUT", "/config", text)):
                error = (await running.write(method, path, body, status=422))["error"]
                assert "expected a regular file" in error["message"]
            assert await running.pids("chat") == [pid]
        file.rmdir() if kind == "folder" else file.unlink()
        file.write_text(f'{text}description = "again"\n')
        await running.eventually("/models/chat", described("again"))
        assert await running.pids("chat") == [pid]


async def test_a_pipe_as_configuration_is_refused_at_the_start(tmp_path: Path) -> None:
    """`serve -c <(generate)` would find nothing at the next look, and stop everything; so it says why, with 78."""
    for command in "serve", "check", "plan":
        line = f'"$0" -m vllm_proxy {command} -c <(echo "[models.x]"; echo "model = \'x\'")'
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", line, sys.executable,
            env={**clean_environment(), "VLLM_PROXY_STATE_DIR": str(tmp_path)}, cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(WAIT_SECONDS):
            out, _ = await process.communicate()
        assert process.returncode == 78
        assert b"cannot read it: it is a pipe or FIFO, which can be read once; expected a regular file" in out
        assert out.count(b"\n") == 1


# A disk that does not come back from a write: opening a FIFO that nobody writes to blocks in the kernel as well.
HANGING = """
import os, sys
os.fsync, fsync = lambda _: os.open(os.environ["HANGS"], os.O_RDONLY), os.fsync
from vllm_proxy import cli, daemon
os.fsync = fsync
sys.exit(cli.run(sys.argv[1:]))
"""


async def test_a_disk_that_hangs_in_a_write_does_not_hold_up_a_stop(
    tmp_path: Path, port_start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests in flight end in peace, engines are ended, the process is gone though its thread never comes back."""
    os.mkfifo(tmp_path / "hangs")
    monkeypatch.setenv("HANGS", str(tmp_path / "hangs"))
    program = (sys.executable, "-c", HANGING)
    async with serving(tmp_path, fake_engines(port_start) + CHAT, program=program) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        write = asyncio.ensure_future(running.admin.patch("/models/chat", json={"description": "x"}))
        await until(lambda: temporary_files(tmp_path), bool)
        body = {"model": "chat", "stream": True, "fake": {"chunks": 20, "interval": 0.05}}
        async with running.session.post("/v1/chat/completions", json=body) as answer:
            await answer.content.readline()
            running.process.send_signal(signal.SIGTERM)
            assert (await answer.read()).decode().endswith("data: [DONE]\n\n")
        assert await running.stop() == 0
        assert not session_of(pid)
        await asyncio.gather(write, return_exceptions=True)
    log = running.log()
    assert "a change of the file has not come to its end: its disk does not answer" in log
    assert "calls that have not come back are left behind" in log
    assert "Traceback" not in log


async def temporary_files(folder: Path) -> list[Path]:
    """What a write has begun."""
    await asyncio.sleep(0)
    return list((folder / "conf").glob(".models.toml.*"))


async def test_a_frozen_machine_calls_nothing_stalled(tmp_path: Path, port_start: int) -> None:
    """Daemon and engine stand still for longer than `stall_timeout` in the middle of a silent request."""
    gate = tmp_path / "go"
    keys = 'stall_timeout = "3s"\nstart = "on-demand"\nidle_timeout = "1s"\n'
    async with serving(tmp_path, fake_engines(port_start) + CHAT + keys) as running:
        body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "fake": {"hold": str(gate)}}
        answer = asyncio.create_task(running.post("/v1/chat/completions", body))
        await running.all_ready()
        await running.counters_read(2)  # the watch for stalls has looked once more, from begin to end
        frozen = [running.process.pid, *session_of((await running.pids("chat"))[0])]
        for process in frozen:
            os.kill(process, signal.SIGSTOP)
        await asyncio.sleep(FROZEN_SECONDS)  # it is time that must pass
        for process in frozen:
            os.kill(process, signal.SIGCONT)
        await running.counters_read(2)  # it is judged
        gate.touch()
        assert (await answer)["object"] == "chat.completion"
        await running.logged("the daemon stood still")
        assert (await running.instance("chat"))["restarts"] == 0
        await running.until("0 of 0 models ready; on demand: chat")  # no request for a second of its own time


async def test_a_clock_that_was_set_back_gives_no_negative_seconds(tmp_path: Path, port_start: int) -> None:
    """An engine that was started an hour from now, as the clock has it, and becomes ready under the next daemon."""
    gate = tmp_path / "go"
    config = loading_until(port_start, gate)
    async with daemon(config, tmp_path) as first:
        before = await first.once("chat", lambda one: one["pid"] and one["phase"] != "importing")
        await first.stop(signal.SIGKILL)
    record = first.state_dir / "engines.toml"
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    record.write_text(re.sub('started_at = ".*"', f'started_at = "{later}"', record.read_text()))
    async with daemon(config, tmp_path) as second:
        await second.once("chat", lambda one: one["pid"])
        gate.touch()
        await second.until("1 of 1 models ready")
        assert await second.pids("chat") == [before["pid"]]
        taken = [float(number) for number in re.findall(r"seconds=(-?[0-9.]+)", second.log().split("engine ready")[1])]
        assert 0 <= taken[0] < 600
        assert (await second.metrics())['vllm_proxy_instance_startup_seconds_sum{model="chat"}'] == taken[0]
        (kept,) = tomllib.loads((second.state_dir / "starts.toml").read_text())["seconds"].values()
        assert kept == taken
