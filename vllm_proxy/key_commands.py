"""The commands `keys new`, `add`, `list`, `rotate`, `revoke`: through the running daemon, else on the files themselves.

Either way the same edits are made (`domain/file/edit_keys.py`) and the same resources come back. A key is told once, on
stdout alone. Exit statuses are in `cli`.
"""

import argparse
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TextIO
from urllib.parse import quote

from vllm_proxy.connection import CommandError, NoDaemonError, connected
from vllm_proxy.domain import key_resources
from vllm_proxy.domain.file import edit_keys
from vllm_proxy.domain.key_resources import key_of
from vllm_proxy.domain.keys import RANDOM_BYTES, Scope, hash_of, name_problem, new_key, own_key_problem
from vllm_proxy.domain.units import parse_duration, parse_time, show, show_time
from vllm_proxy.errors import VllmProxyError
from vllm_proxy.fleet.changes import KeyEdit, KeyFiles
from vllm_proxy.fleet.store import Store
from vllm_proxy.settings import Settings

_DAY_SECONDS = 24 * 3600
_LONGEST_KEY = 4096  # characters


@dataclass(frozen=True, slots=True)
class Done:
    """What a command has done. `told`: for stdout; `words`: about it, for stderr; `resource`: all of it, as JSON."""

    resource: key_resources.NewKey | key_resources.Key | key_resources.Keys
    told: str
    words: str = ""


def add_parsers(keys: argparse.ArgumentParser, parents: Sequence[argparse.ArgumentParser]) -> None:
    """The commands below `keys`. Each leaves in the options as `work` what does it."""
    commands = keys.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, work: Callable[..., Awaitable[Done]], explanation: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=parents, help=explanation, description=explanation)
        sub.set_defaults(work=work)
        return sub

    new = add("new", _new, "make a key and print it, this once")
    own = add("add", _add, "take a key that you bring along, from stdin")
    add("list", _list, "list the keys, without their hashes")
    rotate = add("rotate", _rotate, "make one more key for a name and print it; the old one is good until --finish")
    revoke = add("revoke", _revoke, "disable a key: its next request is refused, its running streams end")
    for command in (new, own, rotate, revoke):
        command.add_argument("name", metavar="NAME")
    own.add_argument("--stdin", action="store_true", required=True,
                     help="read the key there: one line of at least 32 characters")  # fmt: skip
    for command in (new, own):
        command.add_argument("--scope", action="append", choices=[*map(str, Scope)], dest="scopes",
                             help="what it may do, repeatable (default: inference)")  # fmt: skip
        command.add_argument("--models", action="append", metavar="GLOB",
                             help="ids and aliases that it may use, repeatable (default: all)")  # fmt: skip
        command.add_argument(
            "--rpm",
            type=_amount,
            metavar="N",
            help="requests in any minute (default: no limit); the first limit replaces all engines",
        )
        command.add_argument(
            "--tpm", type=_amount, metavar="N", help="tokens in any minute (default: no limit); as above"
        )
        command.add_argument("--expires", type=_expiry, metavar="WHEN",
                             help="after 90d, 12h, …, or at 2027-01-01T00:00:00Z (default: never)")  # fmt: skip
    rotate.add_argument("--finish", action="store_true", help="keep only the newest key")


async def run(settings: Settings, options: argparse.Namespace, stdin: TextIO | None) -> Done:
    """Do what the options say.

    Raises:
        CommandError: when it cannot be done; a `RefusedError` where the daemon lists problems.
        ConfigError: without a daemon, when a file is invalid, or would be.
        RequestError: without a daemon, when it cannot be done.
        LostError: when the daemon ends meanwhile.

    """
    options.input = stdin
    done: Done = await options.work(settings, options)
    return done


async def _new(settings: Settings, options: argparse.Namespace) -> Done:
    found, where = await _create(settings, options, {})
    words = f"{_described(found)}: {where}. The key is told this once: its hash is kept"
    return Done(found, str(found["key"]), words + await _of_the_first(settings, found))


async def _add(settings: Settings, options: argparse.Namespace) -> Done:
    if options.input is None:  # closed
        msg = f"cannot add key {show(options.name)}: stdin is closed, and the key is read there"
        raise CommandError(msg)
    key = options.input.buffer.readline(_LONGEST_KEY + 1).decode(errors="replace").strip()
    if problem := own_key_problem(key):
        msg = f"cannot add key {show(options.name)}: {problem}"
        raise CommandError(msg)
    found, where = await _create(settings, options, {"hash": hash_of(key)})
    return Done(found, f"{_described(found)}: {where}" + await _of_the_first(settings, found))


async def _of_the_first(settings: Settings, made: key_resources.Key) -> str:
    """What a first key changes for those who have none, and a first one with limits for engines: it may surprise."""
    try:
        others = [key for key in (await _all(settings))["keys"] if key["name"] != made["name"]]
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


async def _create(
    settings: Settings, options: argparse.Namespace, table: dict[str, Any]
) -> tuple[key_resources.NewKey, str]:
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
        async with connected(settings) as daemon:
            return await daemon.request("POST", "/keys", json={"name": options.name, **table}), _IN_FORCE
    except NoDaemonError:
        key, written = edit_keys.issued(options.name, table, secrets.token_bytes(RANDOM_BYTES))
        found, where = _on_files(settings, options.name, partial(edit_keys.create, name=options.name, keys=written))
        return {**found, "key": key}, where


async def _all(settings: Settings) -> key_resources.Keys:
    found: key_resources.Keys
    try:
        async with connected(settings) as daemon:
            found = await daemon.request("GET", "/keys")
    except NoDaemonError:
        config = _files(settings).change(lambda texts: texts).config
        found = {"revision": config.keys_revision, "keys": [key_of(key) for key in config.keys.values()]}
    return found


async def _list(settings: Settings, _options: argparse.Namespace) -> Done:
    found = await _all(settings)
    rows = [("name", "id", "scopes", "models", "limits", "state"), *map(_row, found["keys"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)).rstrip() for row in rows)
    return Done(found, "\n".join(lines) if found["keys"] else "no keys; `vllm-proxy keys new` makes one")


async def _rotate(settings: Settings, options: argparse.Namespace) -> Done:
    found: key_resources.NewKey
    try:
        async with connected(settings) as daemon:
            path = f"{_path(options.name)}/rotate"
            found, where = await daemon.request("POST", path, json={"finish": options.finish}), _IN_FORCE
    except NoDaemonError:
        key = None if options.finish else new_key(secrets.token_bytes(RANDOM_BYTES))
        change = edit_keys.finish if key is None else partial(edit_keys.rotate, new=hash_of(key))
        shown, where = _on_files(settings, options.name, partial(change, name=options.name))
        found = {**shown, "key": key}
    if options.finish:
        return Done(found, f"{_described(found)}: {where}, and no older key for it")
    until = f"older ones are good until `vllm-proxy keys rotate {options.name} --finish`"
    return Done(found, str(found["key"]), f"{_described(found)}: {where}. The key is told this once; {until}")


async def _revoke(settings: Settings, options: argparse.Namespace) -> Done:
    change = {"enabled": False}
    found: key_resources.Key
    try:
        async with connected(settings) as daemon:
            found, where = await daemon.request("PATCH", _path(options.name), json=change), _IN_FORCE
    except NoDaemonError:
        edit = partial(edit_keys.patch, name=options.name, change=change)
        found, where = _on_files(settings, options.name, edit)
    return Done(found, f"{_described(found)}: {where}")


_IN_FORCE = "in force"


def _files(settings: Settings) -> KeyFiles:
    return KeyFiles(Store(settings.config_file), settings.parse, settings.files, settings.keys_file)


def _on_files(settings: Settings, name: str, edit: KeyEdit) -> tuple[key_resources.Key, str]:
    """Where no daemon runs; the resource, and where that is written."""
    change = _files(settings).change(edit)
    change.write()
    return key_of(
        change.config.keys[name]
    ), f"in {change.store.file}: no daemon answers here, and one that follows this file takes it over"


def _path(name: str) -> str:
    return f"/keys/{quote(name, safe='', errors='surrogateescape')}"


def _described(key: key_resources.Key) -> str:
    """`key "ci", id 1f2e3d4c, inference`."""
    state = _state(key)
    about = [f"key {show(key['name'])}", f"id {key['id']}" if key["id"] else "", ", ".join(key["scopes"]) or "no scope",
             *_limits(key), f"until {key['expires_at']}" if key["expires_at"] else "",
             "" if state == "good" else state]  # fmt: skip
    return ", ".join(part for part in about if part)


def _row(key: key_resources.Key) -> tuple[str, ...]:
    until = f" until {key['expires_at']}" if key["expires_at"] else ""
    more = f", {key['hashes']} keys: being rotated" if key["hashes"] > 1 else ""
    state = _state(key) + until + more
    models = ",".join(key["models"])
    return key["name"], key["id"] or "-", ",".join(key["scopes"]), models, ", ".join(_limits(key)) or "-", state


def _limits(key: key_resources.Key) -> list[str]:
    """`20000 tokens/min`, `4 at once`, …: what it may use, and how it shares."""
    amounts = [(key["requests_per_minute"], "requests/min"), (key["tokens_per_minute"], "tokens/min"),
               (key["tokens_per_day"], "tokens/day"), (key["tokens_per_month"], "tokens/month"),
               (key["max_in_flight"], "at once"), (key["max_output_tokens"], "an answer")]  # fmt: skip
    found = [f"{amount} {of}" for amount, of in amounts if amount]
    found += [f"priority {key['priority']}"] if key["priority"] else []
    found += [f"weight {key['weight']:g}"] if key["weight"] != 1 else []
    return found + [f"more of {glob}" for glob in key["limits"]]


def _state(key: key_resources.Key) -> str:
    if not key["enabled"]:
        return "revoked"
    expires_at = key["expires_at"]
    return "expired" if expires_at and parse_time(expires_at) <= datetime.now(UTC) else "good"


def _amount(text: str) -> int:
    if text.isascii() and text.isdigit() and (amount := int(text)):
        return amount
    msg = f"expected a whole number above 0, got {show(text)}"
    raise argparse.ArgumentTypeError(msg)


def _expiry(text: str) -> str:
    """A moment as RFC 3339, from one, or from how long it is until then."""
    try:
        if text[-1:] == "d" and text[:-1].isascii() and text[:-1].isdigit():
            seconds = float(int(text[:-1]) * _DAY_SECONDS)
        elif text[4:5] == "-":
            return show_time(parse_time(text).timestamp())
        else:
            seconds = parse_duration(text)
        return show_time((datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds)).timestamp())
    except (ValueError, OverflowError):
        msg = f"expected how long, such as 90d or 12h, or a time such as 2027-01-01T00:00:00Z, got {show(text)}"
        raise argparse.ArgumentTypeError(msg) from None
