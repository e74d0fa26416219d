"""What happens to a fleet: random faults, the same row of them for the same seed, as far as time allows."""

import asyncio
import contextlib
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

from tests.harness import Daemon, fake_engines, free_port, running_command, session_of
from vllm_proxy.engine.proc import look_up

PAUSE_SECONDS = (0.05, 1.0)  # between two faults
MODELS = """
[server]
on_exit = "keep"
shutdown_timeout = "2s"
[defaults]
stall_timeout = "2s"
startup_timeout = "10s"
stop_timeout = "500ms"
drain_timeout = "2s"
queue_timeout = "20s"
args = { fake_shm = true, fake_grandchildren = 1 }
[defaults.restart]
backoff = "50ms"
max_backoff = "200ms"
max_failures = 1000
[models.a]
model = "x"
replicas = 2
balance = "prefix"
[models.b]
model = "x"
[models.rare]
model = "x"
start = "on-demand"
idle_timeout = "1s"
"""


MODELS_SERVED = ("a", "b", "rare")


class Fleet:
    """A daemon that is killed and started again, at one address."""

    def __init__(self, folder: Path, port_start: int) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._ports = range(port_start, port_start + 200)
        self._stack = contextlib.AsyncExitStack()
        self._daemon: Daemon | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run").mkdir(exist_ok=True)
        (folder / "models.toml").write_text(fake_engines(port_start) + MODELS, encoding="utf-8")

    @property
    def places(self) -> dict[str, str]:
        """What tells a daemon, and a command, where sockets and temporary folders are."""
        return {"RUNTIME_DIRECTORY": str(self.folder / "run")}

    @property
    def daemon(self) -> Daemon:
        """The one that runs."""
        assert self._daemon is not None
        return self._daemon

    async def start(self) -> None:
        """A new daemon, once it listens."""
        flags = ("--config", str(self.folder / "models.toml"), "--log-level", "warning")
        running = running_command(self.folder, "serve", *flags, env=self.places, port=self.port)
        self._daemon = await self._stack.enter_async_context(running)

    async def end(self, number: signal.Signals) -> None:
        """End the daemon by a signal; its engines live on."""
        await self.daemon.stop(number)
        await self._stack.aclose()

    def strays(self, owned: set[int]) -> list[int]:
        """Processes of engines that belong to none of those whose first processes are `owned`."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        names = {_engine_name(pid) for pid in owned}
        return [pid for pid in pids if _engine_port(pid) in self._ports and _engine_name(pid) not in names]


def _engine_name(pid: int) -> str:
    """What the daemon calls the engine of a process, whatever session that is in."""
    try:
        found = re.search(r"(?:^|\0)ENGINE_INSTANCE=([^\0]+)\0", Path(f"/proc/{pid}/environ").read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _engine_port(pid: int) -> int:
    process = look_up(pid)
    try:
        found = re.search(r"\0--port=(\d+)\0", Path(f"/proc/{pid}/cmdline").read_text())
    except OSError:
        return 0
    return int(found[1]) if found and process and process.alive else 0


class Trouble:
    """One fault after another."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        self._choose = random.Random(seed)
        self.made: Counter[str] = Counter()
        self._faults = [fault for fault, weight in self.kinds().items() for _ in range(weight)]

    def kinds(self) -> dict[Callable[[], Awaitable[None]], int]:
        """What happens, and how often."""
        return {
            self.kill_server: 5, self.kill_core: 5, self.stop_core: 3, self.rest_and_start: 2, self.restart: 2,
            self.kill_daemon: 2, self.end_daemon: 1,
        }  # fmt: skip

    async def make(self, enough: Callable[[], bool]) -> None:
        """Go on until it is enough."""
        while not enough():
            await asyncio.sleep(self._choose.uniform(*PAUSE_SECONDS))
            fault = self._choose.choice(self._faults)
            await fault()
            self.made[fault.__name__] += 1

    async def kill_server(self) -> None:
        """SIGKILL to the first process of an engine."""
        for pid in await self._some_engine():
            _signal(pid, signal.SIGKILL)

    async def kill_core(self) -> None:
        """SIGKILL to another process of an engine."""
        for pid in await self._some_core():
            _signal(pid, signal.SIGKILL)

    async def stop_core(self) -> None:
        """An engine hangs, and its health is good."""
        for pid in await self._some_core():
            _signal(pid, signal.SIGSTOP)

    async def rest_and_start(self) -> None:
        """Somebody stops a model by hand, and starts it again."""
        model = self._choose.choice(["a", "b", "rare"])
        await self._fleet.daemon.post(f"/models/{model}/stop", {}, 202)
        await asyncio.sleep(self._choose.random())
        await self._fleet.daemon.post(f"/models/{model}/start", {}, 202)

    async def restart(self) -> None:
        """Somebody restarts a model."""
        await self._fleet.daemon.post(f"/models/{self._choose.choice('ab')}/restart", {}, 202)

    async def kill_daemon(self) -> None:
        """SIGKILL to the daemon, and a new one."""
        await self._fleet.end(signal.SIGKILL)
        await self._fleet.start()

    async def end_daemon(self) -> None:
        """An upgrade: the daemon stops in order, keeps its engines, and another one comes."""
        await self._fleet.end(signal.SIGTERM)
        await self._fleet.start()

    async def _some_engine(self) -> list[int]:
        models = (await self._fleet.daemon.get("/models"))["models"]
        pids = [one["pid"] for model in models for one in model["status"]["instances"] if one["pid"]]
        return [self._choose.choice(pids)] if pids else []

    async def _some_core(self) -> list[int]:
        others = [sorted(session_of(pid) - {pid}) for pid in await self._some_engine()]
        return [self._choose.choice(pids) for pids in others if pids]


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


async def nothing_is_wrong(fleet: Fleet) -> None:
    """At rest: every model serves, no request is counted, and no process is without an owner.

    Raises:
        AssertionError: when something is.

    """
    daemon = fleet.daemon
    # The last of the trouble is over when they serve, which may take longer than a request waits on a busy machine.
    await daemon.eventually("/models", lambda found: all(_serves(model) for model in found["models"]))
    await daemon.post("/models/rare/start", {}, 202)
    for name in MODELS_SERVED:
        await daemon.post("/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "hi"}]})
    await daemon.post("/models/rare/stop", {}, 202)  # else it goes to sleep while it is counted
    listing = await daemon.eventually("/models", lambda found: all(_rests(model) for model in found["models"]))
    engines = {one["pid"] for model in listing["models"] for one in model["status"]["instances"] if one["pid"]}
    await daemon.eventually("/health", lambda _: not fleet.strays(engines))
    await daemon.eventually("/health", lambda _: len(list((fleet.folder / "run").glob("vp-*"))) == len(engines))
    async with aiohttp.ClientSession(daemon.url) as session, session.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    busy = [line for line in lines if line.startswith(("vllm_proxy_in_flight{", "vllm_proxy_queued{"))]
    assert busy
    assert all(line.endswith(" 0") for line in busy), busy
    log = re.sub(r"^\w+/\d+ \| .*$", "", daemon.log(), flags=re.MULTILINE)  # what engines say is theirs
    for fault in ("Traceback", "fault of the daemon"):
        assert fault not in log, log[max(0, log.index(fault) - 500) : log.index(fault) + 3000]


def _serves(model: dict[str, Any]) -> bool:
    state: str = model["status"]["state"]
    return model["id"] == "rare" or state == "ready"


def _rests(model: dict[str, Any]) -> bool:
    status, wanted = model["status"], "stopped" if model["id"] == "rare" else "ready"
    idle = (status["in_flight"], status["queued"]) == (0, 0)
    return idle and all(instance["state"] == wanted for instance in status["instances"])
