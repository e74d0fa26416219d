"""The command `usage`: what keys have used, as a table, as CSV or as JSON, from the running daemon.

Without a daemon there is nothing to ask. Exit statuses are in `cli`.
"""

import argparse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

from vllm_proxy.connection import CommandError, connected
from vllm_proxy.domain.units import parse_duration, show, show_time
from vllm_proxy.domain.usage import BY_DEFAULT, DAY, as_csv, columns
from vllm_proxy.domain.usage_resources import Usage, UsageRow
from vllm_proxy.settings import Settings

_TITLES = {
    "prompt_tokens": "prompt",
    "completion_tokens": "completion",
    "cached_tokens": "cached",
    "estimated_tokens": "estimated",
}
_NAMES = {"key", "model", "day", "hour"}  # columns that are no numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes, but for --json."""
    parser.add_argument("--by", metavar="NAMES", default=",".join(BY_DEFAULT),
                        help="some of key, model, and day or hour (default: key,model)")  # fmt: skip
    parser.add_argument("--since", type=_since, metavar="WHEN", default="24h",
                        help="30d, 12h, …, or a time such as 2026-11-01T00:00:00Z (default: 24h)")  # fmt: skip
    parser.add_argument("--key", metavar="NAME", help="of this key alone")
    parser.add_argument("--csv", action="store_true", help="print CSV")


async def run(settings: Settings, options: argparse.Namespace) -> Usage:
    """What was used.

    Raises:
        NoDaemonError: when none listens.
        CommandError: when it cannot be reported, or the daemon does not answer.
        LostError: when it ends meanwhile.

    """
    by = [name.strip() for name in options.by.split(",") if name.strip()]
    if options.key is not None and "key" not in by:
        by.append("key")
    asked = {"from": options.since, "by": ",".join(by)}
    async with connected(settings) as daemon:
        found: Usage = await daemon.request("GET", f"/usage?{urlencode(asked)}")
        if options.key is not None:
            await _check(options.key, found, [key["name"] for key in (await daemon.request("GET", "/keys"))["keys"]])
    if options.key is not None:
        found["rows"] = [row for row in found["rows"] if row["key"] == options.key]
    return found


async def _check(key: str, found: Usage, known: Sequence[str]) -> None:
    """A name that is mistyped has not used nothing."""
    if key not in known and not any(row["key"] == key for row in found["rows"]):
        raise CommandError(f"cannot find key {show(key)}: `vllm-proxy keys list` lists them")


def shown(found: Usage, *, as_table: bool) -> str:
    """A report in columns, or as CSV."""
    if not as_table:
        return as_csv(found["by"], found["rows"]).rstrip("\r\n")
    since = f"since {found['from']}"
    if not found["rows"]:
        return f"nothing was used {since}"
    names = [name for name in columns(found["by"]) if name not in _NAMES or name in found["by"]]
    table = [
        [_TITLES.get(name, name) for name in names],
        *([_cell(row, name) for name in names] for row in found["rows"]),
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(names))]
    lines = (
        "  ".join(
            cell.ljust(wide) if name in _NAMES else cell.rjust(wide)
            for name, cell, wide in zip(names, row, widths, strict=True)
        ).rstrip()
        for row in table
    )
    return "\n".join((*lines, "", f"{since}, UTC; prompt, completion, cached and estimated are tokens"))


def _cell(row: UsageRow, name: str) -> str:
    values: Mapping[str, object] = {**row}
    return str(values[name])


def _since(text: str) -> str:
    """When a time began, as the route takes it."""
    if text[4:5] == "-":
        return text  # the daemon says what is wrong with it
    try:
        days = text[-1:] == "d" and text[:-1].isascii() and text[:-1].isdigit()
        seconds = float(int(text[:-1]) * DAY) if days else parse_duration(text)
        return show_time((datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=seconds)).timestamp())
    except (ValueError, OverflowError):
        msg = f"expected how long, such as 30d or 12h, or a time such as 2026-11-01T00:00:00Z, got {show(text)}"
        raise argparse.ArgumentTypeError(msg) from None
