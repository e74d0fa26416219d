"""The command line: parses the arguments, and imports and runs the one command that they name.

The arguments are in `arguments`; what a command does is `run` of its module in `commands`, which nothing else imports:
a command that only asks the daemon is not to wait for what the daemon is made of.
"""

import importlib
from collections.abc import Sequence

from vllm_proxy.arguments import parse
from vllm_proxy.commands.outcome import FAILED, outcome_of
from vllm_proxy.commands.output import complain, unwritable


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status, as docs/commands.md lists them."""
    try:
        options = parse(arguments)
    except BrokenPipeError:
        return FAILED
    except OSError as error:
        complain(str(unwritable(error.errno)))
        return FAILED
    return outcome_of(importlib.import_module(f"vllm_proxy.commands.{options.command}").run, options)
