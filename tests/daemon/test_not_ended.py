"""Engines that cannot be ended: nothing says that they are gone, nothing starts beside them, it is tried again.

Real ones: engines of another user below a daemon that may not signal them, a /proc that hides processes, a daemon
without descriptors.
"""

import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import FAKE, Client, Daemon, connected, daemon, fake_engines, session_of, vllm_proxy
from vllm_proxy.engine.proc import look_up

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")

MAY_NOT_KILL = ("setpriv", "--bounding-set=-kill")
SOMEBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
            "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # fmt: skip
HIDDEN = ("unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=1 proc /proc && exec "$@"', "sh",
          "setpriv", "--regid=65534", "--clear-groups", "--bounding-set=-sys_ptrace")  # fmt: skip
QUICK = '[defaults]\nstop_timeout = "300ms"\nrestart = { backoff = "10ms", max_backoff = "10ms" }\n'
CHAT = '[models.chat]\nmodel = "org/chat"\n'
OTHER = '[models.other]\nmodel = "org/other"\n'


def of_somebody_else(port_start: int) -> str:
    """An `[engine]` table whose engines belong to a user that is not the daemon's."""
    command = [*SOMEBODY, sys.executable, "-S", str(FAKE), "serve"]
    return f"[engine]\ncommand = {command!r}\nport_start = {port_start}\nport_end = {port_start + 199}\n"


@pytest.fixture
def kill(tmp_path: Path) -> Iterator[list[int]]:
    """Sessions that nobody else can end; whatever a test does, they do not outlive it, nor does what followed them."""
    sessions: list[int] = []
    yield sessions
    for session in [*sessions, *working_in(tmp_path)]:
        end(session)


def working_in(folder: Path) -> list[int]:
    """The processes whose working directory is this one: engines that a daemon started when nobody looked any more."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if entry.readlink() == folder:
                found.append(int(entry.parent.name))
    return found


def end(session: int) -> None:
    """End every process of a session."""
    for pid in session_of(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stuck(found: Any) -> bool:  # noqa: ANN401 - JSON
    """Whether a model says that its engine could not be ended."""
    return bool(found["status"]["reason"] == "not_ended")


async def test_an_engine_that_may_not_be_signalled_is_told_retried_and_blocks_its_model_alone(
    tmp_path: Path, port_start: int, kill: list[int]
) -> None:
    """It is unloading with a reason wherever one looks, no other engine of its starts, and goes on once it is gone."""
    config = of_somebody_else(port_start) + QUICK + CHAT
    async with daemon(config, tmp_path, below=MAY_NOT_KILL) as running:
        one = await running.once("chat", lambda one: one["state"] == "ready")
        kill.append(one["pid"])
        await running.post("/models/chat/stop", {}, 202)
        status = (await running.eventually("/models/chat", stuck))["status"]
        assert (status["state"], status["instances"][0]["phase"]) == ("unloading", "stopping")
        assert status["instances"][0]["reason"] == "not_ended"
        assert str(one["pid"]) in status["message"]
        assert "not permitted" in status["message"]
        assert (await running.get("/health"))["not_ended"] == ["chat/0"]
        series = await running.metrics()
        assert series['vllm_proxy_instance_state{model="chat",replica="0",state="unloading"}'] == 1
        assert series["vllm_proxy_engines_not_ended"] == 1
        await running.until(lambda status: "not ended: chat/0" in status)
        for command in (["stop", "chat"], ["start", "chat"], ["stop", "--all"]):
            code, out, _ = await vllm_proxy(tmp_path, *command)
            assert (code, "cannot end its engine" in out) == (1, True), (
                "whoever waits for it is told, and waits no more"
            )
        await running.post("/models/chat/start", {}, 202)
        assert (await running.instance("chat"))["state"] == "unloading"
        await running.logged("an engine cannot be ended", 1)  # told once, though tried again
        end(one["pid"])
        now = await running.once("chat", lambda one: one["state"] == "ready")
        kill.append(now["pid"])
        assert now["pid"] != one["pid"]
        assert (await running.get("/health"))["not_ended"] == []
        end(now["pid"])


async def test_a_crashed_engine_whose_rest_cannot_be_ended_is_not_started_again(
    tmp_path: Path, port_start: int, kill: list[int]
) -> None:
    """The core holds the GPU: the instance loads in phase stopping, with the reason, until it is gone."""
    config = of_somebody_else(port_start) + QUICK + CHAT
    async with daemon(config, tmp_path, below=MAY_NOT_KILL) as running:
        one = await running.once("chat", lambda one: one["state"] == "ready")
        kill.append(one["pid"])
        os.kill(one["pid"], signal.SIGKILL)
        status = (await running.eventually("/models/chat", stuck))["status"]
        assert (status["state"], status["instances"][0]["phase"]) == ("loading", "stopping")
        assert session_of(one["pid"])
        end(one["pid"])
        now = await running.once("chat", lambda one: one["state"] == "ready")
        kill.append(now["pid"])
        assert (now["restarts"], now["last_exit"]["reason"]) == (1, "killed")
        end(now["pid"])


async def test_a_stop_of_the_daemon_gives_up_says_so_and_the_next_one_goes_on(
    tmp_path: Path, port_start: int, kill: list[int]
) -> None:
    """It ends with status 1, names the pids, leaves the record; the next daemon starts nothing beside what lives."""
    config = of_somebody_else(port_start) + QUICK + CHAT
    async with daemon(config, tmp_path, below=MAY_NOT_KILL) as first:
        one = await first.once("chat", lambda one: one["state"] == "ready")
        kill.append(one["pid"])
        assert await first.stop() == 1
        assert f"cannot end chat/0: processes {one['pid']}, " in " ".join(first.log().split())
        assert look_up(one["pid"]) is not None
        assert str(one["pid"]) in (first.state_dir / "engines.toml").read_text()
    first.file.write_text("")
    changed = fake_engines(port_start) + QUICK + CHAT.replace("org/chat", "org/other") + OTHER
    async with daemon(changed, tmp_path, below=MAY_NOT_KILL) as second:
        await second.once("other", lambda one: one["state"] == "ready")
        status = (await second.eventually("/models/chat", stuck))["status"]
        assert (status["state"], status["instances"][0]["phase"], status["instances"][0]["pid"]) == (
            "loading", "queued", None
        )  # fmt: skip
        await second.until(lambda status: "not ended: chat/0" in status)
        end(one["pid"])
        assert (await second.once("chat", lambda one: one["state"] == "ready"))["pid"] != one["pid"]


async def test_nothing_is_called_stopped_that_lives_where_processes_are_hidden(
    tmp_path: Path, port_start: int, kill: list[int]
) -> None:
    """`/proc` with hidepid=1: the engine is ended, or the model says that it is not; never is it left in silence."""
    async with daemon(fake_engines(port_start) + QUICK + CHAT, tmp_path, below=HIDDEN) as running:
        one = await running.once("chat", lambda one: one["state"] == "ready")
        kill.append(one["pid"])
        await running.post("/models/chat/stop", {}, 202)
        found = await running.eventually(
            "/models/chat", lambda found: stuck(found) or found["status"]["state"] == "stopped"
        )
        assert stuck(found) or session_of(one["pid"]) == set()


@contextlib.asynccontextmanager
async def crowd(running: Daemon, count: int) -> AsyncIterator[list[Client]]:
    """Clients that connect and say nothing."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connected(running.port)) for _ in range(count)]


async def test_an_engine_is_ended_though_clients_have_taken_all_descriptors(
    tmp_path: Path, port_start: int, kill: list[int]
) -> None:
    """Some are kept for the daemon's own work: the model is stopped, its engine is gone, the record says so."""
    config = fake_engines(port_start) + QUICK + CHAT
    async with daemon(config, tmp_path, below=("prlimit", "--nofile=200:200")) as running:
        one = await running.once("chat", lambda one: one["state"] == "ready")
        kill.append(one["pid"])
        async with crowd(running, 300):
            await running.post("/models/chat/stop", {}, 202)  # on a connection that was there before
            await running.eventually("/models/chat", lambda found: found["status"]["state"] == "stopped")
            assert session_of(one["pid"]) == set()
            assert str(one["pid"]) not in (running.state_dir / "engines.toml").read_text()
            await running.post("/models/chat/start", {}, 202)
            await running.eventually("/models/chat", lambda found: found["status"]["instances"][0]["pid"] is not None)


async def test_engines_get_the_soft_limit_of_open_files_that_the_daemon_was_given(
    tmp_path: Path, port_start: int
) -> None:
    """The daemon raises its own; a program that still uses `select` fails beyond 1,024."""
    config = fake_engines(port_start) + CHAT
    async with daemon(config, tmp_path, below=("prlimit", "--nofile=777:4000")) as running:
        one = await running.once("chat", lambda one: one["state"] == "ready")
        assert open_files(one["pid"]) == ("777", "4000")
        assert int(open_files(running.process.pid)[0]) > 3000


def open_files(pid: int) -> tuple[str, str]:
    """The soft and the hard limit of a process."""
    limits = Path(f"/proc/{pid}/limits").read_text()
    soft, hard = next(line for line in limits.splitlines() if "open files" in line).split()[3:5]
    return soft, hard
