"""The exit statuses, and which one an error of a command becomes; docs/commands.md and docs/errors.md list them."""

import argparse
import json
import os
from collections.abc import Callable

from vllm_proxy.commands.output import complain, complain_lines, write
from vllm_proxy.errors import ConfigError, LostError, NoDaemonError, RefusedError, VllmProxyError, as_json

OK, FAILED, CHANGES, NO_DAEMON, CONFIG_INVALID = 0, 1, 2, 3, os.EX_CONFIG
WRONG_USAGE = 2  # argparse's own
_ABOUT_A_FILE = {"serve", "check", "plan", "keys", "demo"}  # for others a file that cannot be used is a failure


def outcome_of(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; its own status, or that of the error that it ends with, which is told."""
    try:
        try:
            return run(options)
        except ConfigError as error:
            return _refused(error, options)
    except (NoDaemonError, LostError) as error:
        complain(str(error))
        return NO_DAEMON
    except VllmProxyError as error:
        complain(str(error), _mark(options))
        return FAILED
    except (KeyboardInterrupt, BrokenPipeError):
        return FAILED
    except (OSError, UnicodeError) as error:  # no better message exists
        if getattr(options, "log_level", "") == "debug":
            raise
        complain(f"cannot {options.action}: {_why(error)}", _mark(options))
        return FAILED


def _mark(options: argparse.Namespace) -> str:
    """What begins a line of a daemon that cannot start: the journal's priority `err`, where its log has one."""
    if not hasattr(options, "log_format"):
        return ""
    from vllm_proxy.logsetup import resolve  # noqa: PLC0415 - only the daemon has it imported already

    return "<3>" if resolve(options.log_format, os.environ) == "journal" else ""


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is None:  # of getcwd(2)
        return "the working directory is gone; cd into one that is there"
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror


def _refused(error: ConfigError, options: argparse.Namespace) -> int:
    """The result of `check` goes to stdout; the reason why another command fails goes to stderr."""
    if getattr(options, "json", False):
        write(json.dumps({"file": error.file, "problems": [as_json(problem) for problem in error.problems]}))
    elif options.action == "check":
        write("\n".join(error.lines()))
    else:
        complain_lines([_mark(options) + line for line in error.lines()])
    return CONFIG_INVALID if options.action in _ABOUT_A_FILE else FAILED


def refused_by_daemon(error: RefusedError, options: argparse.Namespace, file: object) -> int:
    """As above, where it was the daemon that found the problems. `file`: which one it has, as far as is known here."""
    if options.json:
        write(json.dumps({"problems": [as_json(problem) for problem in error.problems]}))
    else:
        complain_lines([problem.render(str(file)) for problem in error.problems])
    return CONFIG_INVALID
