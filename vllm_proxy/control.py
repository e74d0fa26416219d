"""Commands that act on a running daemon, through its control socket. Its one rule: they end with what became of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from vllm_proxy.domain.plan import Action
from vllm_proxy.engine.process import adopt_orphans
from vllm_proxy.engine.reconciler import end_left
from vllm_proxy.engine.state import StateDirectory
from vllm_proxy.errors import VllmProxyError
from vllm_proxy.settings import Settings, short_name

_POLL_SECONDS = 0.2
_SYSTEM_SOCKET = Path("/run/vllm-proxy/control.sock")  # of the unit, for a shell that has not its environment

type Say = Callable[[str], None]
type Resource = dict[str, Any]


class NoDaemonError(VllmProxyError):
    """No daemon listens."""


class CommandError(VllmProxyError):
    """The daemon refused, or could not do it."""


class RefusedError(CommandError):
    """The daemon refuses its configuration file; `problems` as REST has them."""

    def __init__(self, message: str, problems: Sequence[Resource]) -> None:
        super().__init__(message)
        self.problems = problems


class Connection:
    """A running daemon."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def ask(self, method: str, path: str, toml: bytes | None = None) -> Any:  # noqa: ANN401 - JSON
        """The JSON answer to a request, without a body or with one in TOML.

        Raises:
            CommandError: with the daemon's own words; a `RefusedError` where it lists problems.

        """
        headers = {"Content-Type": "application/toml"} if toml is not None else {}
        async with self._session.request(method, path, data=toml, headers=headers) as answer:
            found = await answer.json()
            if answer.status >= 400:
                error = found["error"]
                raise (
                    RefusedError(error["message"], error["problems"])
                    if error.get("problems")
                    else CommandError(error["message"])
                )
            return found

    async def stream(self, path: str) -> AsyncIterator[bytes]:
        """The lines of a text answer, as they come.

        Raises:
            CommandError: with the daemon's own words.

        """
        async with self._session.get(path, timeout=aiohttp.ClientTimeout(total=None)) as answer:
            if answer.status >= 400:
                raise CommandError((await answer.json())["error"]["message"])
            async for line in answer.content:
                yield line


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Connection]:
    """The daemon of these settings.

    Raises:
        NoDaemonError: when none listens.

    """
    places = [settings.control_socket, settings.state_dir / "control.sock", _SYSTEM_SOCKET]
    for place in dict.fromkeys(places):
        if not place.is_socket():
            continue
        with short_name(place) as name:
            connector = aiohttp.UnixConnector(name)
            async with aiohttp.ClientSession("http://localhost", connector=connector) as session:
                try:
                    async with session.get("/health"):
                        pass
                except aiohttp.ClientConnectorError:
                    continue  # left by a daemon that was killed
                yield Connection(session)
                return
    msg = f"cannot reach a daemon: none listens on {settings.control_socket}; is --state-dir the daemon's?"
    raise NoDaemonError(msg)


async def act(settings: Settings, action: str, model_id: str, say: Say) -> Resource:
    """`start`, `stop` or `restart` a model and wait until it has come to rest; returns its resource.

    Raises:
        NoDaemonError: when none listens.
        CommandError: when the daemon refuses.

    """
    path = f"/models/{quote(model_id, safe='')}"
    async with connected(settings) as daemon:
        before = _engines(await daemon.ask("GET", path))
        resource = await daemon.ask("POST", f"{path}/{action}")
        said = ""
        while not _at_rest(resource, action, before):
            now = f"{model_id}: {_sentence(resource)}"
            if now != said:
                say(now)
            said = now
            await asyncio.sleep(_POLL_SECONDS)
            resource = await daemon.ask("GET", path)
        say(f"{model_id}: {_sentence(resource)}")
        return dict(resource)


async def planned(settings: Settings, toml: bytes) -> list[Resource]:
    """What the running daemon would change for a configuration file with these bytes.

    Raises:
        NoDaemonError: when none listens.
        CommandError: when the daemon refuses.

    """
    async with connected(settings) as daemon:
        return list((await daemon.ask("POST", "/config/plan", toml))["changes"])


def shown(actions: Sequence[Action]) -> list[Resource]:
    """A plan as REST shows it."""
    return [{"model": action.model, "action": str(action.kind), "reason": action.reason} for action in actions]


async def reload(settings: Settings) -> list[Resource]:
    """Have the daemon read its file; returns what changed.

    Raises:
        NoDaemonError: when none listens.
        RefusedError: when the file is invalid.

    """
    async with connected(settings) as daemon:
        return list((await daemon.ask("POST", "/config/reload"))["changes"])


async def stop_all(settings: Settings, say: Say) -> bool:
    """Stop every model of the running daemon; without one, end what an earlier daemon left. True when all of it ended.

    Raises:
        StartupError: when the state directory is in use by a daemon that does not answer.

    """
    try:
        async with connected(settings) as daemon:
            models = (await daemon.ask("GET", "/models"))["models"]
    except NoDaemonError:
        return await _end_left(settings, say)
    enabled = [model["id"] for model in models if model["effective"]["enabled"]]
    await asyncio.gather(*(act(settings, "stop", model_id, say) for model_id in enabled))
    return True


async def _end_left(settings: Settings, say: Say) -> bool:
    if not settings.state_dir.exists():
        say("no daemon runs, and none has left engines here")
        return True
    with StateDirectory(settings.state_dir) as state:
        left = state.left_behind()
        adopt_orphans()
        for record in left:
            say(f"ending {record.instance}, process {record.pid}")
        ended = await end_left(left, state)
    say(f"no daemon runs; engines that one had left: {len(left)}{'' if ended else ', not all of them could be ended'}")
    return ended


async def print_logs(settings: Settings, model_id: str, lines: int, say: Say, *, follow: bool) -> None:
    """Engine output, line by line; with `follow` until the daemon stops.

    Raises:
        NoDaemonError: when none listens.
        CommandError: when there is no such model.

    """
    path = f"/models/{quote(model_id, safe='')}/logs?lines={lines}{'&follow=1' if follow else ''}"
    async with connected(settings) as daemon:
        async for raw in daemon.stream(path):
            line = raw.decode(errors="replace").rstrip("\n")
            if not follow:
                say(line)
            elif line.startswith("data: "):
                say(line.removeprefix("data: "))


def failed(resource: Resource) -> bool:
    """Whether the model rests in error."""
    return bool(resource["status"]["state"] == "error")


def _engines(resource: Resource) -> list[tuple[int | None, str | None]]:
    """Which engines a model has: process id and start of each."""
    return [(one["pid"], one["started_at"]) for one in resource["status"]["instances"]]


def _at_rest(resource: Resource, action: str, before: Sequence[tuple[int | None, str | None]]) -> bool:
    states = {one["state"] for one in resource["status"]["instances"]}
    if action == "stop":
        return states <= {"stopped"}
    if not states <= {"ready", "error"}:
        return False
    return action == "start" or "error" in states or not set(before) & set(_engines(resource))


def _sentence(resource: Resource) -> str:
    status = resource["status"]
    phases = {one["phase"] for one in status["instances"] if one["phase"]} - {"serving"}
    text = f"{status['state']}{f' ({", ".join(sorted(phases))})' if phases else ''}"
    return f"{text}: {status['message']}" if status["message"] else str(text)
