"""`keys new`, `add`, `list`, `rotate`, `revoke`: through the running daemon, else on the files (`key_files`).

Either way the same edits are made and the same resources come back. A key is told once, on stdout alone.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from vllm_proxy import places
from vllm_proxy.commands.outcome import OK, refused_by_daemon
from vllm_proxy.commands.output import complain, complain_lines, ensure_output, write
from vllm_proxy.commands.screen import Columns, Screen
from vllm_proxy.connection import connected
from vllm_proxy.domain.keys import Scope, hash_of, name_problem, own_key_problem
from vllm_proxy.domain.units import parse_time, show
from vllm_proxy.errors import CommandError, NoDaemonError, OutputError, RefusedError, VllmProxyError

if TYPE_CHECKING:
    from vllm_proxy.domain import key_resources

type Key = key_resources.Key
type NewKey = key_resources.NewKey
type Keys = key_resources.Keys

_NAMES = frozenset({"name", "scopes", "models", "limits"})
_COLUMNS = Columns(("name", "id", "scopes", "models", "limits", "state"), names=_NAMES, room=32)
_LONGEST_KEY = 4096  # characters
_IN_FORCE = "in force"


@dataclass(frozen=True, slots=True)
class Done:
    """What a command has done. `told`: for stdout; `words`: about it, for stderr; `resource`: all of it, as JSON.

    `untold`: of a key that was made, what to say where it cannot be written.
    """

    resource: NewKey | Key | Keys
    told: str
    words: str = ""
    untold: str = ""


def run(options: argparse.Namespace) -> int:
    """A key that was made goes to stdout, once; words about it to stderr."""
    if options.work == "new" or (options.work == "rotate" and not options.finish):
        ensure_output()
    try:
        done = _WORK[options.work](options)
    except RefusedError as error:
        return refused_by_daemon(error, options, places.find(os.environ, vars(options)).config_file)
    try:
        write(json.dumps(done.resource) if options.json else done.told)
    except (OutputError, BrokenPipeError):
        if done.untold:
            complain(done.untold)
        raise
    if done.words and not options.json:
        complain_lines([done.words])
    return OK


def _new(options: argparse.Namespace) -> Done:
    found, where = _create(options, {})
    words = f"{_described(found)}: {where}. The key is told this once: its hash is kept"
    untold = f"key {show(options.name)} {_untold(where)}: vllm-proxy keys revoke {options.name}"
    return Done(found, str(found["key"]), words + _of_the_first(options, found), untold)


def _untold(where: str) -> str:
    """`is in force, but could not be told`, or in which file it is."""
    return f"is {where.partition(':')[0]}, but could not be told"


def _add(options: argparse.Namespace) -> Done:
    if sys.stdin is None:  # closed
        msg = f"cannot add key {show(options.name)}: stdin is closed, and the key is read there"
        raise CommandError(msg)
    key = sys.stdin.buffer.readline(_LONGEST_KEY + 1).decode(errors="replace").strip()
    if problem := own_key_problem(key):
        msg = f"cannot add key {show(options.name)}: {problem}"
        raise CommandError(msg)
    found, where = _create(options, {"hash": hash_of(key)})
    return Done(found, f"{_described(found)}: {where}" + _of_the_first(options, found))


def _of_the_first(options: argparse.Namespace, made: Key) -> str:
    """What a first key changes for those who have none, and a first one with limits for engines: it may surprise."""
    try:
        others = [key for key in _all(options)["keys"] if key["name"] != made["name"]]
    except (VllmProxyError, OSError):  # the key is made, and has to be told
        return ""
    first = "" if others else _FIRST
    return first if not _limits(made) or any(map(_limits, others)) else first + _FIRST_WITH_LIMITS


_FIRST = (
    "\nIt is the first key: who sends none may do nothing from now on, on this machine neither."
    ' [keys.anonymous] with scopes = ["inference"] leaves inference open'
)
_FIRST_WITH_LIMITS = (
    "\nIt is the first key with limits: engines take requests in the order of their keys, which replaces all of them"
    " unless server.fair = true has done so before"
)


def _create(options: argparse.Namespace, table: dict[str, Any]) -> tuple[NewKey, str]:
    if problem := name_problem(options.name):
        msg = f"cannot make key {show(options.name)}: {problem}"
        raise CommandError(msg)
    table["scopes"] = options.scopes or [str(Scope.INFERENCE)]
    if options.models:
        table["models"] = options.models
    if options.rpm:
        table["requests_per_minute"] = options.rpm
    if options.tpm:
        table["tokens_per_minute"] = options.tpm
    if options.expires:
        table["expires_at"] = options.expires
    try:
        with connected(places.find(os.environ, vars(options))) as daemon:
            return daemon.request("POST", "/keys", body={"name": options.name, **table}), _IN_FORCE
    except NoDaemonError:
        made: tuple[NewKey, str] = _without_daemon().create(options, table)
        return made


def _all(options: argparse.Namespace) -> Keys:
    found: Keys
    try:
        with connected(places.find(os.environ, vars(options))) as daemon:
            found = daemon.request("GET", "/keys")
    except NoDaemonError:
        found = _without_daemon().every(options)
    return found


def _list(options: argparse.Namespace) -> Done:
    found = _all(options)
    lines = Screen.of_stdout().table(_COLUMNS, [_row(key) for key in found["keys"]])
    return Done(found, "\n".join(lines) if found["keys"] else "no keys; `vllm-proxy keys new` makes one")


def _rotate(options: argparse.Namespace) -> Done:
    found: NewKey
    try:
        with connected(places.find(os.environ, vars(options))) as daemon:
            path = f"{_path(options.name)}/rotate"
            found, where = daemon.request("POST", path, body={"finish": options.finish}), _IN_FORCE
    except NoDaemonError:
        found, where = _without_daemon().rotate(options)
    if options.finish:
        return Done(found, f"{_described(found)}: {where}, and no older key for it")
    until = f"older ones are good until `vllm-proxy keys rotate {options.name} --finish`"
    again = f"vllm-proxy keys rotate {options.name} makes another one, and --finish then disables this one"
    untold = f"the new key of {show(options.name)} {_untold(where)}: {again}"
    return Done(found, str(found["key"]), f"{_described(found)}: {where}. The key is told this once; {until}", untold)


# What surprises who wants to be without keys again.
_STAYS = "its table stays in the file; while one does, loopback needs a key too (see `vllm-proxy help security`)"


def _revoke(options: argparse.Namespace) -> Done:
    change = {"enabled": False}
    found: Key
    try:
        with connected(places.find(os.environ, vars(options))) as daemon:
            found, where = daemon.request("PATCH", _path(options.name), body=change), _IN_FORCE
    except NoDaemonError:
        found, where = _without_daemon().patch(options, change)
    return Done(found, f"{_described(found)}: {where}\n{_STAYS}")


def _without_daemon() -> ModuleType:
    from vllm_proxy.commands import key_files  # noqa: PLC0415 - imports all that edits and checks a file

    return key_files


def _path(name: str) -> str:
    return f"/keys/{quote(name, safe='', errors='surrogateescape')}"


def _described(key: Key) -> str:
    """`key "ci", id 1f2e3d4c, inference`."""
    state = _state(key)
    about = [f"key {show(key['name'])}", f"id {key['id']}" if key["id"] else "", ", ".join(key["scopes"]) or "no scope",
             *_limits(key), f"until {key['expires_at']}" if key["expires_at"] else "",
             "" if state == "good" else state]  # fmt: skip
    return ", ".join(part for part in about if part)


_WHEN = {"good": "until", "expired": "since"}  # of a revoked key it does not matter


def _row(key: Key) -> tuple[str, ...]:
    state = _state(key)
    until = f" {_WHEN[state]} {key['expires_at']}" if key["expires_at"] and state in _WHEN else ""
    more = f", {key['hashes']} keys: being rotated" if key["hashes"] > 1 else ""
    models, limits = ",".join(key["models"]), ", ".join(_limits(key)) or "-"
    return key["name"], key["id"] or "-", ",".join(key["scopes"]), models, limits, state + until + more


def _limits(key: Key) -> list[str]:
    """`20000 tokens/min`, `4 at once`, …: what it may use, and how it shares."""
    amounts = [(key["requests_per_minute"], "requests/min"), (key["tokens_per_minute"], "tokens/min"),
               (key["tokens_per_day"], "tokens/day"), (key["tokens_per_month"], "tokens/month"),
               (key["max_in_flight"], "at once"), (key["max_output_tokens"], "an answer")]  # fmt: skip
    found = [f"{amount} {of}" for amount, of in amounts if amount]
    found += [f"priority {key['priority']}"] if key["priority"] else []
    found += [f"weight {key['weight']:g}"] if key["weight"] != 1 else []
    return found + [f"more of {glob}" for glob in key["limits"]]


def _state(key: Key) -> str:
    if not key["enabled"]:
        return "revoked"
    expires_at = key["expires_at"]
    return "expired" if expires_at and parse_time(expires_at) <= datetime.now(UTC) else "good"


_WORK: Mapping[str, Callable[[argparse.Namespace], Done]] = {
    "new": _new, "add": _add, "list": _list, "rotate": _rotate, "revoke": _revoke,
}  # fmt: skip
