"""A disk that is full or read-only, and folders that are gone: models stay, and what is lost is said."""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_faults import ASK, QUICK
from tests.engine.test_ports import kernel_tells
from tests.harness import daemon, fake_engines, free_port, session_of, until, vllm_proxy

CHAT = '[models.chat]\nmodel = "org/chat"\n'


@contextlib.contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[None]:
    """Something is mounted inside the block."""
    subprocess.run(["mount", *arguments, str(at)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def turn_read_only(folder: Path) -> None:
    """As the kernel does with a file system that has errors; once nobody writes there in that moment."""
    command = ["mount", "-o", "remount,bind,ro", str(folder)]
    for _ in range(200):
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        if "busy" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


def fill(folder: Path) -> None:
    """Write until nothing more goes there."""
    with contextlib.suppress(OSError), (folder / "ballast").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def ready(one: Any) -> bool:  # noqa: ANN401 - JSON
    """Whether an instance serves."""
    return bool(one["state"] == "ready")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_an_engine_starts_and_serves_though_the_disk_of_its_log_is_full(tmp_path: Path, port_start: int) -> None:
    """Its output goes to the daemon's own and to the API, and the model says that it is not kept."""
    state = tmp_path / "state"
    state.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=2m", "tmpfs", at=state):
        fill(state)
        async with daemon(fake_engines(port_start) + QUICK + CHAT, tmp_path) as running:
            one = await running.once("chat", ready)
            assert one["restarts"] == 0
            assert "No space left on device" in one["message"]
            assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
            await running.logged("chat/0 | ")
            async with running.admin.get("/models/chat/logs") as answer:
                assert "Application startup complete" in await answer.text()
            assert await running.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("is_full_at_first", [True, False])
async def test_an_engine_is_kept_only_where_the_next_daemon_would_find_it(
    tmp_path: Path, port_start: int, *, is_full_at_first: bool
) -> None:
    """One that could never be put on record is ended, and the log says so; one on record is kept all the same."""
    state = tmp_path / "state"
    state.mkdir()
    text = '[server]\non_exit = "keep"\n' + fake_engines(port_start) + QUICK + CHAT
    with mounted("-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", at=state):
        if is_full_at_first:
            fill(state)
        async with daemon(text, tmp_path) as running:
            pid = (await running.once("chat", ready))["pid"]
            fill(state)
            assert await running.stop() == 0
            assert bool(session_of(pid)) != is_full_at_first
            assert ("no daemon would find it again" in running.log()) == is_full_at_first
        (state / "ballast").unlink()
        assert (await vllm_proxy(tmp_path, "stop", "--all"))[0] == 0
        assert not session_of(pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_an_engine_that_dies_of_its_full_log_says_so_and_comes_back(tmp_path: Path, port_start: int) -> None:
    """What it could not write, nobody can read: the reason names the disk. The next engine writes elsewhere."""
    state = tmp_path / "state"
    state.mkdir()
    go = tmp_path / "go"
    table = CHAT + f'args = {{ fake_load_until = "{go}" }}\n'
    with mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", at=state):
        async with daemon(fake_engines(port_start) + QUICK + table, tmp_path) as running:
            await running.once("chat", lambda one: one["phase"] == "loading_weights" or one["pid"] is not None)
            fill(state)
            log_file = state / "logs" / "chat%2F0.log"
            with contextlib.suppress(OSError), log_file.open("ab", buffering=0) as file:
                while True:
                    file.write(b"\n")  # what is left of its last block
            go.touch()
            one = await running.once("chat", lambda one: ready(one) and one["last_exit"] is not None)
            assert "No space left on device" in one["last_exit"]["message"]
            assert await running.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_a_state_directory_that_turns_read_only_takes_no_model_away(tmp_path: Path, port_start: int) -> None:
    """What runs serves on, what crashes comes back; the daemon's log and the model say what is not kept."""
    async with daemon(fake_engines(port_start) + QUICK + CHAT, tmp_path) as running:
        first = await running.once("chat", ready)
        state = running.state_dir
        with mounted("--bind", str(state), at=state):
            turn_read_only(state)
            await running.post("/models/chat/restart", {}, 202)
            one = await running.once("chat", lambda one: ready(one) and one["pid"] != first["pid"])
            assert "Read-only file system" in one["message"]
            await running.logged("the state cannot be written")
            assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        assert await running.stop() == 0


async def test_a_logs_folder_that_was_removed_is_made_anew_by_the_next_engine(tmp_path: Path, port_start: int) -> None:
    """And the engine that has its log in there is followed on."""
    async with daemon(fake_engines(port_start) + QUICK + CHAT, tmp_path) as running:
        first = await running.once("chat", ready)
        shutil.rmtree(running.state_dir / "logs")
        assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        await running.post("/models/chat/restart", {}, 202)
        one = await running.once("chat", lambda one: ready(one) and one["pid"] != first["pid"])
        assert one["message"] is None
        assert (running.state_dir / "logs" / "chat%2F0.log").is_file()


async def test_the_old_log_of_a_model_that_is_gone_is_removed_at_a_start(tmp_path: Path, port_start: int) -> None:
    """That of a model of the file stays, and goes on."""
    logs = tmp_path / "state" / "logs"
    logs.mkdir(parents=True, mode=0o700)
    for name in ("gone%2F0.log", "chat%2F0.log"):
        (logs / name).write_text("an old line\n")
        os.utime(logs / name, (0, 0))
    (logs / "other%2F0.log").touch()
    async with daemon(fake_engines(port_start) + QUICK + CHAT, tmp_path) as running:
        await running.once("chat", ready)
        await until(lambda: asyncio.to_thread((logs / "gone%2F0.log").exists), lambda there: not there)
        assert (logs / "other%2F0.log").exists()
        assert "an old line" in (logs / "chat%2F0.log").read_text()


@pytest.mark.skipif(not kernel_tells(free_port()), reason="before Linux 6.8 the start waits for a minute")
async def test_one_instance_with_one_port_comes_back_after_a_crash(tmp_path: Path) -> None:
    """Its last connections keep the port in TIME_WAIT for a minute, which hinders no vLLM."""
    port = free_port()
    config = fake_engines(port).replace(f"port_end = {port + 199}", f"port_end = {port}") + QUICK + CHAT
    async with daemon(config, tmp_path) as running:
        first = await running.once("chat", ready)
        assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        async with running.session.get(f"http://127.0.0.1:{port}/fake/die") as answer:
            await answer.read()
        one = await running.once("chat", lambda one: ready(one) and one["pid"] != first["pid"])
        assert (one["port"], one["restarts"]) == (port, 1)
