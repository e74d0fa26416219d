"""Commands that act on a running daemon through its control socket: start, stop, sleep, plan, reload, logs and others.

Each returns when its outcome is known, not when it was requested: the model is ready, stopped, failed, or cannot be
ended. Without a daemon, `stop --all` ends the orphans that one left. Arguments and exit statuses are in `cli`.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

from vllm_proxy.connection import CommandError, NoDaemonError, connected
from vllm_proxy.domain.keys import KeyChanges
from vllm_proxy.domain.resources import Change, Model
from vllm_proxy.engine.process import become_subreaper
from vllm_proxy.engine.state import StateDirectory
from vllm_proxy.fleet.orphans import end_orphans
from vllm_proxy.runtime.files import become_owner
from vllm_proxy.settings import Settings

_POLL_SECONDS = 0.2
_OFTEN = 5  # polls in a row
# States in which one is done; an engine that cannot be put to sleep is ended.
_ENDS = {"stop": frozenset({"stopped"}), "sleep": frozenset({"stopped", "sleeping"})}

type Report = Callable[[str], None]


class OrphanedEngine(TypedDict):
    """An engine that a daemon had left."""

    instance: str
    pid: int


class Stopped(TypedDict):
    """What became of `stop --all`."""

    models: list[Model]
    engines: list[OrphanedEngine]
    ended: bool  # all of it


async def act(settings: Settings, action: str, model_id: str, report: Report) -> Model:
    """`start`, `stop`, `restart`, `sleep` or `wake` a model and wait until it has come to rest; returns its resource.

    Raises:
        NoDaemonError: when none listens.
        CommandError: when the daemon refuses, or does not answer.
        LostError: when it ends meanwhile.

    """
    path = _path(model_id)
    async with connected(settings) as daemon:
        before = _engines(await daemon.request("GET", path))
        resource: Model = await daemon.request("POST", f"{path}/{action}")
        reported, against = "", 0  # polls in a row in which it moved away from the requested state
        while not (_at_rest(resource, action, before) or _is_stuck(resource) or against >= _OFTEN):
            now = f"{model_id}: {_summary(resource)}"
            if now != reported:
                report(now)
            reported = now
            await asyncio.sleep(_POLL_SECONDS)
            resource = await daemon.request("GET", path)
            against = against + 1 if _is_diverging(resource, action) else 0
        report(f"{model_id}: {_summary(resource)}")
        return resource


async def planned(settings: Settings, toml: bytes) -> list[Change]:
    """What the running daemon would change for a configuration file with these bytes.

    Raises:
        NoDaemonError: when none listens.
        CommandError: when the daemon refuses, or does not answer.
        LostError: when it ends meanwhile.

    """
    async with connected(settings) as daemon:
        return list((await daemon.request("POST", "/config/plan", toml))["changes"])


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload did. `certificate_error`: why the certificate on disk is not in force, None where it is."""

    changes: list[Change]
    keys: KeyChanges
    certificate_error: str | None


async def reload(settings: Settings) -> Reloaded:
    """Have the daemon read its file, and its certificate.

    Raises:
        NoDaemonError: when none listens.
        CommandError: when it does not answer; a `RefusedError` when the file is invalid.
        LostError: when it ends meanwhile.

    """
    async with connected(settings) as daemon:
        done = await daemon.request("POST", "/config/reload")
        health = await daemon.request("GET", "/health")
        return Reloaded(done["changes"], done["keys"], health["config"]["certificate_error"])


async def stop_all(settings: Settings, report: Report) -> Stopped:
    """Stop every model of the running daemon; without one, end what an earlier daemon left.

    Root becomes the state directory's owner first: nothing that user wrote is acted on with root's rights.

    Raises:
        CommandError: when the daemon refuses, or does not answer.
        LostError: when it ends meanwhile.
        StartupError: when the state directory cannot be used, is not to be trusted, or is in use by a daemon that does
            not listen.

    """
    become_owner(settings.state_dir)
    try:
        async with connected(settings) as daemon:
            models: list[Model] = (await daemon.request("GET", "/models"))["models"]
    except NoDaemonError:
        return await _end_orphans(settings, report)
    enabled = [model["id"] for model in models if model["effective"]["enabled"]]
    found = await asyncio.gather(
        *(act(settings, "stop", model_id, report) for model_id in enabled), return_exceptions=True
    )
    for error in found:
        if isinstance(error, BaseException) and not isinstance(error, CommandError):
            raise error
    if errors := list(dict.fromkeys(str(error) for error in found if isinstance(error, CommandError))):
        raise CommandError("; ".join(errors))
    resources = [resource for resource in found if not isinstance(resource, BaseException)]
    return {"models": resources, "engines": [], "ended": not any(failed(one, "stop") for one in resources)}


async def _end_orphans(settings: Settings, report: Report) -> Stopped:
    if not _is_there(settings.state_dir):
        report("no daemon runs, and none has left engines here")
        return {"models": [], "engines": [], "ended": True}
    with StateDirectory(settings.state_dir, settings.scratch) as state:
        left = state.orphans()
        become_subreaper()
        for record in left:
            report(f"ending {record.instance}, process {record.pid}")
        ended = await end_orphans(left, state)
        unusable = state.unusable
    if unusable:
        report(f"{unusable} of its records cannot be used, so that engines may be left: see the messages above")
        ended = False
    report(
        f"no daemon runs; engines that one had left: {len(left)}{'' if ended else ', not all of them could be ended'}"
    )
    engines: list[OrphanedEngine] = [{"instance": record.instance, "pid": record.pid} for record in left]
    return {"models": [], "engines": engines, "ended": ended}


def _is_there(state_dir: Path) -> bool:
    with contextlib.suppress(PermissionError):
        if not state_dir.exists():
            return False
    if not os.access(state_dir, os.R_OK | os.X_OK):
        msg = f"permission denied: cannot look for engines in {state_dir}, which another user has; run it with sudo"
        raise CommandError(msg)
    return True


async def print_logs(settings: Settings, model_id: str, lines: int, report: Report, *, follow: bool) -> None:
    """Engine output, line by line; with `follow` until the daemon stops.

    Raises:
        NoDaemonError: when none listens.
        CommandError: when there is no such model, or the daemon does not answer.
        LostError: when it ends otherwise than in order.

    """
    path = f"{_path(model_id)}/logs?lines={lines}{'&follow=1' if follow else ''}"
    async with connected(settings) as daemon:
        async for raw in daemon.lines(path):
            line = raw.decode(errors="replace")
            if not follow:
                report(line)
            elif line.startswith("data: "):
                report(line.removeprefix("data: "))


def _path(model_id: str) -> str:
    """The path of a model; the id may hold any bytes."""
    return f"/models/{quote(model_id, safe='', errors='surrogateescape')}"


def failed(resource: Model, action: str) -> bool:
    """Whether the action failed; a model has not that was unloaded, or slept, again because it was idle or gave way."""
    state, effective = resource["status"]["state"], resource["effective"]
    if state == "error" or _is_stuck(resource):
        return True
    if action == "stop":
        return bool(state != "stopped")
    if action == "sleep":
        return _states(resource) != {"sleeping"}
    by_itself = resource["status"]["reason"] in {None, "gave_way"}
    unloaded = effective["start"] != "always" and effective["enabled"] and by_itself
    return state in {"stopped", "sleeping"} and not unloaded


def advice(resource: Model, action: str) -> str | None:
    """Where one that failed is explained."""
    if reason := resource["status"]["reason"]:
        return f"`vllm-proxy help {reason}` says what to look at, and what to do"
    if action == "sleep":
        return "nothing of it ran, or it had to be ended: `vllm-proxy help sleep_failed` says what to look at"
    return None


def _is_diverging(resource: Model, action: str) -> bool:
    """Whether somebody else may have changed it; a model that is restarted is stopped for a moment."""
    states = _states(resource)
    return bool(states & {"loading", "ready"}) if action in _ENDS else states <= {"stopped", "sleeping"}


def _states(resource: Model) -> set[str]:
    return {one["state"] for one in resource["status"]["instances"]}


def _is_stuck(resource: Model) -> bool:
    """Whether it waits for an engine that could not be ended, or for room that nobody will make, maybe for ever."""
    return resource["status"]["reason"] in {"not_ended", "does_not_fit"}


def _engines(resource: Model) -> list[tuple[int | None, str | None]]:
    """Which engines a model has: process id and start of each."""
    return [(one["pid"], one["started_at"]) for one in resource["status"]["instances"]]


def _at_rest(resource: Model, action: str, before: Sequence[tuple[int | None, str | None]]) -> bool:
    states = _states(resource)
    if action in _ENDS:
        return states <= _ENDS[action]
    if not states <= {"ready", "error"}:
        return False
    return action != "restart" or "error" in states or not set(before) & set(_engines(resource))


def _summary(resource: Model) -> str:
    status = resource["status"]
    phases = {one["phase"] for one in status["instances"] if one["phase"]} - {"serving"}
    text = f"{status['state']}{f' ({", ".join(sorted(phases))})' if phases else ''}"
    return f"{text}: {status['message']}" if status["message"] else str(text)
