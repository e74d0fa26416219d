"""`plan`: says what applying a file would do to the running daemon, or from nothing where none runs."""

import argparse
import json
import os
from typing import TYPE_CHECKING

from vllm_proxy import places
from vllm_proxy.commands.changes import lines_of
from vllm_proxy.commands.outcome import CHANGES, OK
from vllm_proxy.commands.output import write
from vllm_proxy.commands.screen import Screen
from vllm_proxy.connection import connected
from vllm_proxy.errors import ConfigError, NoDaemonError, RefusedError

if TYPE_CHECKING:
    from vllm_proxy.domain.resources import Change


def run(options: argparse.Namespace) -> int:
    """The daemon is asked, which knows what runs; nothing is applied."""
    where = places.find(os.environ, vars(options))
    toml = places.read_config_file(where.config_file)
    changes: list[Change]
    try:
        with connected(where) as daemon:
            changes = daemon.request("POST", "/config/plan", toml)["changes"]
    except RefusedError as error:
        raise ConfigError(str(where.config_file), error.problems) from None
    except NoDaemonError:
        from vllm_proxy.commands import plan_alone  # noqa: PLC0415 - imports all that checks a file

        changes = plan_alone.changes(options)
    write(json.dumps({"changes": changes}) if options.json else "\n".join(lines_of(changes, Screen.of_stdout())))
    return CHANGES if changes else OK
