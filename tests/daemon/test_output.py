"""The daemon's own output: to a stderr that nobody reads, that cannot be written, or that is not there at all."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests import slow_turns
from tests.forks import Run, shared
from tests.harness import WATCHED, Daemon, Notes, clean_environment, fake_engines, free_port

ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"
MODEL = '[models.chat]\nmodel = "org/chat"\n'
PIPE_BYTES = 64 * 1024


@contextlib.asynccontextmanager
async def noted() -> AsyncIterator[tuple[Notes, str]]:
    """What a daemon tells systemd, and the path of the socket that takes it."""
    with tempfile.TemporaryDirectory() as short:
        notes = Notes()
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: notes, family=socket.AF_UNIX, local_addr=f"{short}/notify"
        )
        try:
            yield notes, f"{short}/notify"
        finally:
            transport.close()


@contextlib.asynccontextmanager
async def writing_to(stderr: int, folder: Path, config: str, *flags: str) -> AsyncIterator[Daemon]:
    """The daemon with this stderr, ready; it ends with exit status 0 when the block does."""
    (folder / "models.toml").write_text(config)
    port, slow = free_port(), folder / "slow_turns.txt"
    async with noted() as (notes, socket_path):
        arguments = ("serve", "--port", str(port), "--state-dir", str(folder / "state"), *flags)
        env = {**clean_environment(), "NOTIFY_SOCKET": socket_path, slow_turns.FILE: str(slow)}
        nowhere = os.open(os.devnull, os.O_WRONLY)
        process = shared().start(Run(arguments, str(folder), env, watched=True), nowhere, stderr)
        os.close(nowhere)
        running = Daemon(process, port, folder, notes)
        try:
            await running.until("READY=1")
            yield running
            assert await running.stop() == 0
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
                await process.wait()
            await running.close()
    assert not slow.exists(), slow.read_text()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that is full; the end to read from first."""
    out, into = os.pipe()
    os.write(into, b"y" * PIPE_BYTES)
    yield out, into
    for end in (out, into):
        with contextlib.suppress(OSError):
            os.close(end)


async def serves(running: Daemon, dropped: int = 0) -> None:
    """It answers requests and administration, starts and stops models, whatever became of its log.

    So many lines of that are `dropped` before, of an engine that says much.
    """
    await running.all_ready()
    for _ in range(20):
        assert (await running.post(CHAT, ASK))["object"] == "chat.completion"
    await running.post("/models/chat/restart", {}, 202)
    await running.once("chat", lambda one: one["state"] == "ready")
    await running.write("PATCH", "/models/chat", {"aliases": ["talk"]})
    assert (await running.post(CHAT, ASK | {"model": "talk"}))["object"] == "chat.completion"
    file = running.state_dir / "logs" / "chat%2F0.log"
    while (await running.metrics())["vllm_proxy_log_lines_dropped_total"] < dropped:
        with file.open("ab") as log:
            log.write(b"one of very many lines\n" * 10_000)


async def test_a_stderr_that_nobody_reads_holds_up_nothing(
    tmp_path: Path, port_start: int, pipe: tuple[int, int]
) -> None:
    """A full pipe, a stalled journal: it serves on and stops in order; what finds no room is counted."""
    config = fake_engines(port_start) + MODEL
    async with writing_to(pipe[1], tmp_path, config) as running:
        await serves(running, dropped=1000)


async def test_a_reader_that_comes_back_is_told_what_it_missed(
    tmp_path: Path, port_start: int, pipe: tuple[int, int]
) -> None:
    """One line in the form of the log says how many are missing; the log goes on behind it."""
    config = fake_engines(port_start) + MODEL
    async with writing_to(pipe[1], tmp_path, config, "--log-format", "json") as running:
        await serves(running, dropped=1000)
        os.close(pipe[1])
        reading = asyncio.create_task(asyncio.to_thread(read_all, pipe[0]))
        await running.stop()
    entries = [json.loads(line) for line in (await reading).lstrip("y").splitlines()]
    missing = [entry["lines"] for entry in entries if entry["event"] == "lines of this log are missing here"]
    assert sum(missing) > 1000
    assert entries[-1]["event"] == "stopped"


def read_all(descriptor: int) -> str:
    """Up to the end."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read().decode()


async def test_a_stderr_that_cannot_be_written_harms_nobody(tmp_path: Path, port_start: int) -> None:
    """A full disk raises nothing in handlers, in supervisors, in the stop; each line is counted."""
    full = os.open("/dev/full", os.O_WRONLY)
    async with writing_to(full, tmp_path, fake_engines(port_start) + MODEL) as running:
        os.close(full)
        await serves(running, dropped=20)


async def test_a_reader_that_goes_away_harms_nobody(tmp_path: Path, port_start: int, pipe: tuple[int, int]) -> None:
    """EPIPE from one moment to the next."""
    async with writing_to(pipe[1], tmp_path, fake_engines(port_start) + MODEL) as running:
        await running.all_ready()
        os.close(pipe[0])
        await serves(running, dropped=20)


async def test_a_closed_stderr_is_never_taken_for_another_file(tmp_path: Path, port_start: int) -> None:
    """No socket gets its number, so nobody is sent the log; and the daemon serves."""
    (tmp_path / "models.toml").write_text(fake_engines(port_start) + MODEL)
    port, env = free_port(), {**clean_environment(), slow_turns.FILE: str(tmp_path / "slow")}
    async with noted() as (notes, socket_path):
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *WATCHED, "serve", "--port", str(port),
            "--state-dir", str(tmp_path / "state"), env=env | {"NOTIFY_SOCKET": socket_path}, cwd=tmp_path,
        )  # fmt: skip
        running = Daemon(process, port, tmp_path, notes)
        try:
            await running.until("READY=1")
            await serves(running)
            taken = {str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in (0, 1, 2)}
            assert taken == {"/dev/null"}
        finally:
            await running.close()
            assert await running.stop() == 0


@pytest.mark.parametrize(("config", "status"), [("[models.chat]\n", 78), (MODEL, 1)], ids=["invalid", "port taken"])
@pytest.mark.parametrize("stderr", ["full pipe", "full disk"])
def test_a_daemon_that_cannot_start_says_so_or_not_and_ends(
    tmp_path: Path, pipe: tuple[int, int], config: str, status: int, stderr: str
) -> None:
    """Exit status 78 and 1 are told though nobody reads the reason, or it cannot be written."""
    (tmp_path / "models.toml").write_text(config)
    with socket.create_server(("127.0.0.1", 0)) as taken, Path("/dev/full").open("wb") as full:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*WATCHED, "serve", "--port", str(port), "--state-dir", str(tmp_path / "state")],
            env={**clean_environment(), slow_turns.FILE: str(tmp_path / "slow")}, cwd=tmp_path, check=False,
            stderr=full if stderr == "full disk" else pipe[1], timeout=60,
        )  # fmt: skip
    assert done.returncode == status


@pytest.mark.parametrize("form", ["text", "json", "journal"])
def test_a_daemon_that_cannot_start_says_why(tmp_path: Path, form: str) -> None:
    """Though it ends in the next moment; in the journal as an error, where `-p err` looks for it."""
    (tmp_path / "models.toml").write_text("[models.chat]\n")
    done = subprocess.run(
        [*WATCHED, "serve", "--state-dir", str(tmp_path / "state"), "--log-format", form],
        env={**clean_environment(), slow_turns.FILE: str(tmp_path / "slow")},
        cwd=tmp_path, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 78
    mark = "<3>" if form == "journal" else ""
    assert re.fullmatch(rf"{mark}/.*models.toml:1: models.chat.model: missing: .*\n", done.stderr)
