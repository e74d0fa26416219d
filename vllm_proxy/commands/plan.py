"""`plan`: says what applying a file would do to the running daemon, or from nothing where none runs."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_proxy import places
from vllm_proxy.commands.changes import lines_of
from vllm_proxy.commands.outcome import CHANGES, OK
from vllm_proxy.commands.output import complain, write
from vllm_proxy.commands.screen import Screen
from vllm_proxy.connection import Connection, connected, file_of
from vllm_proxy.errors import ConfigError, NoDaemonError, RefusedError

if TYPE_CHECKING:
    from vllm_proxy.domain.resources import Plan


def run(options: argparse.Namespace) -> int:
    """The daemon is asked, which knows what runs; nothing is applied. Of its own file, where no other one is named."""
    where = places.find(os.environ, vars(options))
    is_named = options.config is not None or places.NAMES_FILE in where.environment
    found: Plan
    try:
        toml = places.read_config_file(where.config_file) if is_named else None
        with connected(where) as daemon:
            found = _asked(daemon, toml, where.config_file)
    except NoDaemonError:
        from vllm_proxy.commands import plan_alone  # noqa: PLC0415 - imports all that checks a file

        complain("no daemon runs: this is what its start would do")
        found = plan_alone.plan_of(options)
    restart = found["pending_restart"]
    write(json.dumps(found) if options.json else "\n".join(lines_of(found, Screen.of_stdout(), restart)))
    return CHANGES if any((found["changes"], restart, *found["keys"].values(), found["settings"])) else OK


def _asked(daemon: Connection, toml: bytes | None, file: Path) -> "Plan":
    """`toml`: the text of `file`; None: what the daemon's own has on disk."""
    try:
        found: Plan = daemon.request("POST", "/config/plan", toml)
    except RefusedError as error:
        raise ConfigError(str(file) if toml is not None else file_of(daemon), error.problems) from None
    return found
