"""`requests`: prints the requests in flight and the last ones that have ended, or those that end, as they do."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from vllm_proxy import places
from vllm_proxy.commands.fleet_table import short_duration
from vllm_proxy.commands.outcome import OK
from vllm_proxy.commands.output import write
from vllm_proxy.commands.screen import BOLD, DIM, GREEN, PLAIN, RED, YELLOW, Cell, Columns, Screen
from vllm_proxy.connection import Connection, connected
from vllm_proxy.errors import CommandError

if TYPE_CHECKING:
    from vllm_proxy.domain.feed_resources import Request, Requests

_POLL_SECONDS = 1.0
_MOST = 1000  # that the daemon keeps
_NUMBERS = frozenset({"FOR", "BYTES", "QUEUE", "FIRST", "WHOLE", "IN", "OUT", "TOK/S"})
_NAMES = frozenset({"MODEL", "ROUTE", "CLIENT", "KEY"})
_ACTIVE = Columns(
    ("FOR", "MODEL", "STATE", "BYTES", "ROUTE", "CLIENT", "KEY", "ID"),
    _NUMBERS,
    _NAMES,
    less=("ROUTE", "CLIENT", "BYTES", "KEY"),
)
_ENDED = Columns(
    ("AT", "MODEL", "STATUS", "QUEUE", "FIRST", "WHOLE", "IN", "OUT", "TOK/S", "ROUTE", "KEY", "ID"),
    _NUMBERS,
    _NAMES,
    less=("ROUTE", "QUEUE", "TOK/S", "KEY", "IN", "OUT", "FIRST"),
)
_MODEL = 2  # its place in a line, with what stands between
_UNKNOWN = "-"


def run(options: argparse.Namespace) -> int:
    """With --follow until the daemon stops."""
    if options.lines < 0:
        raise CommandError(f"cannot print {options.lines} requests: expected a number from 0")
    screen = Screen.of_stdout()
    with connected(places.find(os.environ, vars(options))) as daemon:
        found = _ask(daemon, options)
        ended = found["recent"][: options.lines]
        if options.follow:
            _follow(daemon, options, found["recent"], screen)
        elif options.json:
            write(json.dumps({"active": found["active"], "recent": ended}))
        else:
            write("\n".join(lines_of(found["active"], ended, screen)))
    return OK


def _ask(daemon: Connection, options: argparse.Namespace) -> "Requests":
    asked = {"limit": str(_MOST), **({} if options.model is None else {"model": options.model})}
    found: Requests = daemon.request("GET", f"/requests?{urlencode(asked)}")
    return found


def _follow(daemon: Connection, options: argparse.Namespace, recent: "list[Request]", screen: Screen) -> None:
    """The last ones, then each that ends: a line of its own."""
    known: set[str] = {one["engine_id"] for one in recent[options.lines :]}
    while True:
        new = [one for one in reversed(recent) if one["engine_id"] not in known]
        known = {one["engine_id"] for one in recent}
        for one in new:
            write(json.dumps(one) if options.json else screen.named_line(_spaced(_ended(one)), _MODEL))
        time.sleep(_POLL_SECONDS)
        recent = _ask(daemon, options)["recent"]


def _spaced(cells: Sequence[Cell]) -> list[Cell]:
    return [part for cell in cells for part in ("  ", cell)][1:]


def lines_of(active: "Sequence[Request]", ended: "Sequence[Request]", screen: Screen) -> list[str]:
    """Both lists as tables, the newest of those that have ended first."""
    lines = [screen.line((f"{len(active)} in flight", BOLD))]
    if active:
        lines += screen.table(_ACTIVE, [_active(one) for one in active])
    if ended:
        lines += ["", *screen.table(_ENDED, [_ended(one) for one in ended])]
    return lines


def _where(one: "Request") -> str:
    model = one["model"] or _UNKNOWN
    return model if one["replica"] is None else f"{model}/{one['replica']}"


def _active(one: "Request") -> list[Cell]:
    state = (str(one["state"]), GREEN if one["state"] == "streaming" else YELLOW)
    return [
        short_duration(one["seconds"]), (_where(one), BOLD), state, _count(one["bytes"]), one["route"],
        one["client"] or _UNKNOWN, one["key"] or _UNKNOWN, (one["id"], DIM),
    ]  # fmt: skip


def _ended(one: "Request") -> list[Cell]:
    status, code = one["status"], one["code"]
    good = status is not None and status < 400 and code is None
    out, first = one["completion_tokens"], one["first_byte"]
    streamed = one["seconds"] - first if first is not None else 0.0
    rate = f"{out / streamed:.0f}" if out and streamed > 0.01 else _UNKNOWN
    at = datetime.fromisoformat(one["since"]).astimezone()
    return [
        f"{at:%H:%M:%S}", (_where(one), BOLD),
        (" ".join(str(part) for part in (status, code) if part is not None) or _UNKNOWN, PLAIN if good else RED),
        _seconds(one["queue_seconds"]), _seconds(first), _seconds(one["seconds"]),
        _count(one["prompt_tokens"]), _count(out), rate, one["route"], one["key"] or _UNKNOWN, (one["id"], DIM),
    ]  # fmt: skip


def _seconds(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value * 1000:.0f}ms" if value < 1 else f"{value:.1f}s" if value < 100 else short_duration(value)


def _count(value: int | None) -> str:
    return _UNKNOWN if value is None else str(value)
