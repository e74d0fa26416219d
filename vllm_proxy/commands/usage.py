"""`usage`: what keys have used, as a table, as CSV or as JSON, from the running daemon."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from vllm_proxy import places
from vllm_proxy.commands.outcome import OK
from vllm_proxy.commands.output import write
from vllm_proxy.commands.screen import Columns, Screen
from vllm_proxy.connection import Connection, connected
from vllm_proxy.domain.units import show
from vllm_proxy.domain.usage import as_csv, columns
from vllm_proxy.errors import CommandError

if TYPE_CHECKING:
    from vllm_proxy.domain.usage_resources import Usage, UsageRow

_TITLES = {
    "prompt_tokens": "prompt",
    "completion_tokens": "completion",
    "cached_tokens": "cached",
    "estimated_tokens": "estimated",
}
_NAMES = {"key", "model", "day", "hour"}  # columns that are no numbers


def run(options: argparse.Namespace) -> int:
    """Without a daemon there is nothing to ask."""
    with connected(places.find(os.environ, vars(options))) as daemon:
        found = _ask(daemon, options)
    write(json.dumps(found) if options.json else shown(found, Screen.of_stdout(), as_table=not options.csv))
    return OK


def _ask(daemon: Connection, options: argparse.Namespace) -> "Usage":
    by = [name.strip() for name in options.by.split(",") if name.strip()]
    if options.key is not None and "key" not in by:
        by.append("key")
    asked = {"from": options.since, "by": ",".join(by)}
    found: Usage = daemon.request("GET", f"/usage?{urlencode(asked)}")
    if options.key is not None:
        _check(options.key, found, [key["name"] for key in daemon.request("GET", "/keys")["keys"]])
        found["rows"] = [row for row in found["rows"] if row["key"] == options.key]
    return found


def _check(key: str, found: "Usage", known: Sequence[str]) -> None:
    """A name that is mistyped has not used nothing."""
    if key not in known and not any(row["key"] == key for row in found["rows"]):
        raise CommandError(f"cannot find key {show(key)}: `vllm-proxy keys list` lists them")


def shown(found: "Usage", screen: Screen, *, as_table: bool) -> str:
    """A report in columns, or as CSV."""
    if not as_table:
        return as_csv(found["by"], found["rows"]).rstrip("\r\n")
    since = f"since {found['from']}"
    if not found["rows"]:
        return f"nothing was counted {since}; without keys requests are counted with server.usage = true alone"
    names = [name for name in columns(found["by"]) if name not in _NAMES or name in found["by"]]
    titles = [_TITLES.get(name, name) for name in names]
    shape = Columns(titles, frozenset(titles) - _NAMES, frozenset({"key", "model"}), less=("estimated", "cached"))
    lines = screen.table(shape, [[_cell(row, name) for name in names] for row in found["rows"]])
    return "\n".join((*lines, "", f"{since}, UTC; prompt, completion, cached and estimated are tokens"))


def _cell(row: "UsageRow", name: str) -> str:
    values: Mapping[str, object] = {**row}
    return str(values[name])
