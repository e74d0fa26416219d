"""`start`, `stop`, `restart`, `sleep`, `wake`: act on a model of the running daemon, and wait for what becomes of it.

Each returns when its outcome is known, not when it was requested: the model is ready, stopped, failed, or cannot be
ended. Without a daemon, `stop --all` ends the orphans that one left (`leftovers`).
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm_proxy import places
from vllm_proxy.commands.outcome import FAILED, OK
from vllm_proxy.commands.output import complain, discard, write
from vllm_proxy.connection import Connection, connected, path_of
from vllm_proxy.errors import CommandError, NoDaemonError
from vllm_proxy.places import Places

if TYPE_CHECKING:
    from vllm_proxy.domain.resources import Model

_POLL_SECONDS = 0.2
_OFTEN = 5  # polls in a row
# States in which one is done; an engine that cannot be put to sleep is ended.
_ENDS = {"stop": frozenset({"stopped"}), "sleep": frozenset({"stopped", "sleeping"})}

type Report = Callable[[str], None]


def run(options: argparse.Namespace) -> int:
    """Say how far it is, and what became of it; `failed` makes the exit status."""
    where = places.find(os.environ, vars(options))
    report = discard if options.json else write
    if getattr(options, "all", False):
        outcome = _stop_all(where, report)
        if options.json:
            write(json.dumps(outcome))
        return OK if outcome["ended"] else FAILED
    with connected(where) as daemon:
        (resource,) = _act(daemon, options.action, [options.model], report)
    if options.json:
        write(json.dumps(resource))
    if not failed(resource, options.action):
        return OK
    if not options.json and (advised := advice(resource, options.action)):
        complain(advised)
    return FAILED


class _Action:
    """One model, from the command until it has come to rest."""

    def __init__(self, daemon: Connection, action: str, model_id: str, report: Report) -> None:
        self._daemon, self._action, self._id, self._report = daemon, action, model_id, report
        self._before = _engines(daemon.request("GET", path_of(model_id)))
        self.resource: Model = daemon.request("POST", f"{path_of(model_id)}/{action}")
        self._reported, self._against = "", 0  # polls in a row in which it moved away from the requested state

    def is_done(self) -> bool:
        """Whether there is nothing to wait for any more; says how far it is."""
        action = self._action
        done = _at_rest(self.resource, action, self._before) or _is_stuck(self.resource) or self._against >= _OFTEN
        now = f"{self._id}: {_summary(self.resource)}"
        if done or now != self._reported:
            self._report(now)
        self._reported = now
        return done

    def look(self) -> None:
        """Ask the daemon how it is."""
        self.resource = self._daemon.request("GET", path_of(self._id))
        self._against = self._against + 1 if _is_diverging(self.resource, self._action) else 0


def _act(daemon: Connection, action: str, model_ids: Sequence[str], report: Report) -> "list[Model]":
    """All of them at once. What the daemon refuses is raised once the others have come to rest."""
    actions, errors = list[_Action](), list[str]()
    for model_id in model_ids:
        try:
            actions.append(_Action(daemon, action, model_id, report))
        except CommandError as error:
            errors.append(str(error))
    waiting = list(actions)
    while waiting := [one for one in waiting if not one.is_done()]:
        time.sleep(_POLL_SECONDS)
        for one in list(waiting):
            try:
                one.look()
            except CommandError as error:
                errors.append(str(error))
                waiting.remove(one)
    if errors:
        raise CommandError("; ".join(dict.fromkeys(errors)))
    return [one.resource for one in actions]


def _stop_all(where: Places, report: Report) -> dict[str, Any]:
    """Stop every model of the running daemon; without one, end what an earlier daemon left.

    Root becomes the state directory's owner first: nothing that user wrote is acted on with root's rights.
    """
    from vllm_proxy.commands import leftovers  # noqa: PLC0415 - imports engines

    leftovers.become_owner(where.state_dir)
    try:
        with connected(where) as daemon:
            models: list[Model] = daemon.request("GET", "/models")["models"]
            enabled = [model["id"] for model in models if model["effective"]["enabled"]]
            resources = _act(daemon, "stop", enabled, report)
    except NoDaemonError:
        return leftovers.end(where, report)
    return {"models": resources, "engines": [], "ended": not any(failed(one, "stop") for one in resources)}


def failed(resource: "Model", action: str) -> bool:
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


def advice(resource: "Model", action: str) -> str | None:
    """Where one that failed is explained."""
    if reason := resource["status"]["reason"]:
        return f"`vllm-proxy help {reason}` says what to look at, and what to do"
    if action == "sleep":
        return "nothing of it ran, or it had to be ended: `vllm-proxy help sleep_failed` says what to look at"
    return None


def _is_diverging(resource: "Model", action: str) -> bool:
    """Whether somebody else may have changed it; a model that is restarted is stopped for a moment."""
    states = _states(resource)
    return bool(states & {"loading", "ready"}) if action in _ENDS else states <= {"stopped", "sleeping"}


def _states(resource: "Model") -> set[str]:
    return {one["state"] for one in resource["status"]["instances"]}


def _is_stuck(resource: "Model") -> bool:
    """Whether it waits for an engine that could not be ended, or for room that nobody will make, maybe for ever."""
    return resource["status"]["reason"] in {"not_ended", "does_not_fit"}


def _engines(resource: "Model") -> list[tuple[int | None, str | None]]:
    """Which engines a model has: process id and start of each."""
    return [(one["pid"], one["started_at"]) for one in resource["status"]["instances"]]


def _at_rest(resource: "Model", action: str, before: Sequence[tuple[int | None, str | None]]) -> bool:
    states = _states(resource)
    if action in _ENDS:
        return states <= _ENDS[action]
    if not states <= {"ready", "error"}:
        return False
    return action != "restart" or "error" in states or not set(before) & set(_engines(resource))


def _summary(resource: "Model") -> str:
    """The state and how far it is; behind it how far instances are that are in another one."""
    status = resource["status"]
    moving = sorted(
        {(one["state"], one["phase"]) for one in status["instances"] if one["phase"] not in {None, "serving"}}
    )
    own = ", ".join(str(phase) for state, phase in moving if state == status["state"])
    others = (f"; another instance: {state} ({phase})" for state, phase in moving if state != status["state"])
    text = f"{status['state']}{f' ({own})' if own else ''}{''.join(others)}"
    return f"{text}: {status['message']}" if status["message"] else text
