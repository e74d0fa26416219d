"""The command line: parses arguments, runs one command and maps its outcome to an exit status.

Results go to stdout, as JSON with `--json`; an error that a user can cause is one sentence on stderr, never a
traceback. What commands do is in `control` (with a running daemon), `daemon` and `help`.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TextIO, cast

import aiohttp
import structlog
import uvloop

from vllm_proxy import __version__, control, daemon, demo, key_commands, logsetup, settings, terminal, usage_command
from vllm_proxy import help as pages
from vllm_proxy.connection import LostError, NoDaemonError, RefusedError
from vllm_proxy.domain.keys import KeyChanges, told
from vllm_proxy.domain.plan import plan
from vllm_proxy.domain.resources import Change, changes_of, problems_of
from vllm_proxy.errors import ConfigError, Problem, StartupError, VllmProxyError
from vllm_proxy.fleet.objections import misfits_here, reasons, warnings_here
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.runtime.regular_file import read_regular_file
from vllm_proxy.runtime.threads import DaemonLoop
from vllm_proxy.settings import Settings

log = structlog.get_logger()

_STDERR = 2
OK, FAILED, CHANGES, NO_DAEMON, CONFIG_INVALID = 0, 1, 2, 3, os.EX_CONFIG
WRONG_USAGE = 2  # argparse's own
_ABOUT_A_FILE = {"serve", "check", "plan", "keys", "demo"}  # for others a file that cannot be used is a failure


class OutputError(VllmProxyError):
    """What is printed cannot be written."""


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status, as docs/commands.md lists them."""
    options = _parser().parse_args(arguments)
    if options.command not in {_serve, _demo}:
        return _run(options)
    _reserve_standard_descriptors()
    with LogWriter(_STDERR) as writer, contextlib.redirect_stderr(cast("TextIO", writer)):
        options.writer = writer
        try:
            return _run(options)
        except Exception:  # not left to Python, which would block on a stderr that nobody reads
            log.exception("the daemon ends by a fault of its own")
            return FAILED


def _run(options: argparse.Namespace) -> int:
    try:
        status: int = options.command(options)
    except ConfigError as error:
        return _refused(error, options)
    except (NoDaemonError, LostError) as error:
        _print_error(str(error))
        return NO_DAEMON
    except VllmProxyError as error:
        _print_error(str(error))
        return FAILED
    except (KeyboardInterrupt, BrokenPipeError):
        return FAILED
    except (OSError, aiohttp.ClientError, UnicodeError) as error:  # no better message exists
        if getattr(options, "log_level", "") == "debug":
            raise
        _print_error(f"cannot {options.action}: {_why(error)}")
        return FAILED
    return status


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is None:  # of getcwd(2)
        return "the working directory is gone; cd into one that is there"
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror


def _reserve_standard_descriptors() -> None:
    """Open closed ones: the next socket would reuse their number, and the log would be written into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(descriptor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-proxy",
        description="One OpenAI-compatible address in front of many vLLM processes.",
        epilog="`vllm-proxy help` lists the pages of the manual, `vllm-proxy help CODE` explains an error.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-proxy {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("-c", "--config", metavar="FILE",
                        help="default: $VLLM_PROXY_CONFIG, ./models.toml, /etc/vllm-proxy/models.toml")  # fmt: skip
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--state-dir", metavar="DIR", help="where logs and the record of engines are kept")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    running.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    running.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"],
                         help="what is logged; info: requests and engine output too (default: info)")  # fmt: skip
    running.add_argument("--log-format", default="auto", choices=["auto", "text", "json", "journal"],
                         help="auto: journal where stderr is the journal, else text (default: auto)")  # fmt: skip

    def add(
        name: str, command: object, parents: list[argparse.ArgumentParser], explanation: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=parents, help=explanation, description=explanation)
        sub.set_defaults(command=command, action=name)
        return sub

    add("serve", _serve, [config, place, running], "run the daemon in the foreground")
    add("check", _check, [config, as_json], "validate the configuration and print every problem")
    add("init", _init, [config, as_json], "write a first configuration with comments")
    add("plan", _plan, [config, place, as_json], "say what applying the configuration would do to the running daemon")
    add("reload", _reload, [place, as_json], "have the running daemon read its file again, and say what changed")
    start = add("start", _act, [place, as_json], "start a model of the running daemon, and wait until it is ready")
    stop = add("stop", _act, [place, as_json], "stop a model of the running daemon, and wait until it has stopped")
    restart = add("restart", _act, [place, as_json], "restart a model, one engine after another")
    sleep = add("sleep", _act, [place, as_json], "put a model to sleep until a request comes, and wait until it sleeps")
    wake = add("wake", _act, [place, as_json], "wake a model that sleeps, or start it, and wait until it is ready")
    for command in (start, restart, sleep, wake):
        command.add_argument("model", metavar="ID")
    # Python 3.13 writes it as if both were optional.
    stop.usage = "%(prog)s [-h] [--state-dir DIR] [--json] (ID | --all)"
    which = stop.add_mutually_exclusive_group(required=True)
    which.add_argument("model", metavar="ID", nargs="?")
    which.add_argument("--all", action="store_true", help="all of them, and what a daemon that runs no more has left")
    logs = add("logs", _logs, [place, as_json], "print the output of a model's engines")
    logs.add_argument("model", metavar="ID")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as more comes")
    logs.add_argument("-n", "--lines", type=int, default=100, metavar="N", help="how many lines back (default: 100)")
    keys = add("keys", _keys, [], "make, list, rotate and revoke API keys, with or without a running daemon")
    key_commands.add_parsers(keys, [config, place, as_json])
    usage_command.add_arguments(add("usage", _usage, [place, as_json], "print what keys have used"))
    topic = add("help", _help, [as_json], "print a page of the manual, a section of one, or what an error code means")
    topic.add_argument("topic", nargs="*", metavar="TOPIC", help="a page, a heading, a code; default: lists the pages")
    add("demo", _demo, [place, running], "run the daemon with two small real models on this machine's CPU")
    return parser


def _load(options: argparse.Namespace) -> Settings:
    names = ("config", "host", "port", "state_dir")
    return settings.load(os.environ, {name: getattr(options, name, None) for name in names})


def _load_outside_service(options: argparse.Namespace) -> Settings:
    """For a command that reads the configuration in a shell, which has none of the service's credentials."""
    loaded = _load(options)
    return replace(loaded, files=loaded.files.outside_service())


def _serve(options: argparse.Namespace) -> int:
    loaded = _load(options)
    config = daemon.read_config(loaded)
    serving = daemon.serve(loaded, config, _set_up_log(options, engines=True))
    uvloop.run(serving, loop_factory=DaemonLoop)
    return OK


def _set_up_log(options: argparse.Namespace, *, engines: bool) -> logsetup.Output:
    """Of a daemon. `engines`: their output is part of it, where the level includes it."""
    form = logsetup.resolve(options.log_format, os.environ)
    logsetup.set_up(options.log_level, form)
    logsetup.capture(options.writer, form)
    talks = options.log_level in {"debug", "info"}
    output = logsetup.Output(options.writer, form, requests=talks, engines=engines and talks)
    options.writer.mask = output.masking.mask
    return output


def _check(options: argparse.Namespace) -> int:
    loaded = _load_outside_service(options)
    config = daemon.read_config(loaded)
    file = str(loaded.config_file)
    logsetup.set_up("error", logsetup.resolve("auto", os.environ))  # warnings are printed
    here = uvloop.run(warnings_here(config, loaded.config_file, loaded.engine_environment))
    warnings = [*config.warnings(), *here]
    if options.json:
        answer = {"file": file, "revision": config.revision, "models": [*config.models], "problems": []}
        _print(json.dumps(answer | {"warnings": warnings}))
    else:
        _print(f"{file}: valid, {len(config.models)} model{'' if len(config.models) == 1 else 's'}")
        for warning in warnings:
            _print_error(f"warning: {warning}")
    return OK


def _init(options: argparse.Namespace) -> int:
    chosen = options.config or os.environ.get("VLLM_PROXY_CONFIG") or "models.toml"
    file = Path(chosen).absolute()
    text = files("vllm_proxy").joinpath("first_models.toml").read_text(encoding="utf-8")
    try:
        _write_new(file, text)
    except FileExistsError:
        msg = f"cannot write {file}: it exists already; choose another place with --config"
        raise StartupError(msg) from None
    except OSError as error:
        msg = f"cannot write {file}: {error.strerror}; choose another place with --config"
        raise StartupError(msg) from error
    _print(json.dumps({"file": str(file)}) if options.json else f"wrote {file}")
    return OK


def _write_new(file: Path, text: str) -> None:
    """All of it or nothing: half a file would be in the way of the next try."""
    with open(file, "x", encoding="utf-8", opener=_readable_by_its_group) as target:
        try:
            target.write(text)
            target.flush()
        except OSError:
            file.unlink()
            raise


def _readable_by_its_group(file: str, flags: int) -> int:
    """It may come to hold keys; umask may narrow it further."""
    return os.open(file, flags, 0o640)


def _act(options: argparse.Namespace) -> int:
    loaded = _load(options)
    report = _discard if options.json else _print
    logsetup.set_up("error", logsetup.resolve("auto", os.environ))  # `report` prints the rest
    if getattr(options, "all", False):
        outcome = uvloop.run(control.stop_all(loaded, report))
        if options.json:
            _print(json.dumps(outcome))
        return OK if outcome["ended"] else FAILED
    resource = uvloop.run(control.act(loaded, options.action, options.model, report))
    if options.json:
        _print(json.dumps(resource))
    if not control.failed(resource, options.action):
        return OK
    if not options.json and (advice := control.advice(resource, options.action)):
        _print_error(advice)
    return FAILED


def _plan(options: argparse.Namespace) -> int:
    loaded = _load_outside_service(options)
    config = daemon.read_config(loaded)
    logsetup.set_up("error", logsetup.resolve("auto", os.environ))
    try:
        changes = uvloop.run(control.planned(loaded, read_regular_file(loaded.config_file)))
    except NoDaemonError:
        actions = plan(config.models, {})
        misfits, _ = uvloop.run(misfits_here(config, loaded.config_file.parent, loaded.engine_environment))
        changes = changes_of(actions, reasons(misfits, actions))
    return _print_changes(options, changes, CHANGES if changes else OK)


def _reload(options: argparse.Namespace) -> int:
    loaded = _load(options)
    try:
        done = uvloop.run(control.reload(loaded))
    except RefusedError as error:
        return _refused_by_daemon(error, options, loaded)
    if done.certificate_error is not None:
        _print_error(f"the certificate before stays in force: {done.certificate_error}")
    status = OK if done.certificate_error is None else CONFIG_INVALID
    return _print_changes(options, done.changes, status, keys=done.keys)


def _refused_by_daemon(error: RefusedError, options: argparse.Namespace, loaded: Settings) -> int:
    if options.json:
        _print(json.dumps({"problems": error.problems}))
    else:
        found = [Problem(**problem) for problem in error.problems]
        _print_error_lines([problem.render(str(loaded.config_file)) for problem in found])
    return CONFIG_INVALID


def _print_changes(
    options: argparse.Namespace, changes: Sequence[Change], status: int, *, keys: KeyChanges | None = None
) -> int:
    if options.json:
        _print(json.dumps({"changes": changes} | ({} if keys is None else {"keys": keys})))
    else:
        lines = [f"{change['action']} {change['model']}: {change['reason']}{_prospect(change)}" for change in changes]
        lines += [f"keys: {told(keys)}"] if keys and told(keys) else []
        _print("\n".join(lines or ["nothing to do"]))
    return status


def _prospect(change: Change) -> str:
    """What would become of it."""
    if "misfit" in change:
        return f"; it can never run on this machine: {change['misfit']}"
    place = change.get("place")
    return f"; on device{'s' if len(place) > 1 else ''} {', '.join(place)}" if place else ""


def _logs(options: argparse.Namespace) -> int:
    def print_json(line: str) -> None:
        _print(json.dumps({"line": line}))

    report = print_json if options.json else _print
    uvloop.run(control.print_logs(_load(options), options.model, options.lines, report, follow=options.follow))
    return OK


def _keys(options: argparse.Namespace) -> int:
    """A key that was made goes to stdout, once; words about it to stderr."""
    loaded = _load_outside_service(options)
    try:
        done = uvloop.run(key_commands.run(loaded, options, sys.stdin))
    except RefusedError as error:
        return _refused_by_daemon(error, options, loaded)
    _print(json.dumps(done.resource) if options.json else done.told)
    if done.words and not options.json:
        _print_error_lines([done.words])
    return OK


def _usage(options: argparse.Namespace) -> int:
    found = uvloop.run(usage_command.run(_load(options), options))
    _print(json.dumps(found) if options.json else usage_command.shown(found, as_table=not options.csv))
    return OK


def _help(options: argparse.Namespace) -> int:
    wanted = " ".join(options.topic)
    try:
        text = pages.about(wanted) if wanted else pages.contents()
    except pages.UnknownTopicError as error:
        _print_error(str(error))
        return WRONG_USAGE
    if options.json:
        listed = {"topics": [{"name": name, "about": about} for name, about in pages.topics()]}
        _print(json.dumps({"topic": wanted, "text": text} if wanted else listed))
    else:
        terminal.show(text, os.environ, _print)
    return OK


def _print(text: str) -> None:
    """Print at once, since whoever reads may go or have no room.

    Raises:
        OutputError: it cannot be written; a `BrokenPipeError` where nobody reads any more.

    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        msg = f"cannot write to the standard output: {error.strerror}"
        raise OutputError(msg) from error


def _print_error(text: str) -> None:
    """Report why a command failed; where stderr cannot be written, the exit status has to do."""
    with contextlib.suppress(OSError):
        print(f"vllm-proxy: {text}", file=sys.stderr, flush=True)


def _discard(_text: str) -> None:
    """With --json the result alone is printed."""


def _demo(options: argparse.Namespace) -> int:
    output = _set_up_log(options, engines=False)
    loaded, config, watch = demo.prepare(os.environ, vars(options))
    uvloop.run(daemon.serve(loaded, config, output, watch), loop_factory=DaemonLoop)
    return OK


def _refused(error: ConfigError, options: argparse.Namespace) -> int:
    """The result of `check` goes to stdout; the reason why another command fails goes to stderr."""
    if getattr(options, "json", False):
        _print(json.dumps({"file": error.file, "problems": problems_of(error.problems)}))
    elif options.command is _check:
        _print("\n".join(error.lines()))
    else:
        _print_error_lines(error.lines())
    return CONFIG_INVALID if options.action in _ABOUT_A_FILE else FAILED


def _print_error_lines(lines: Sequence[str]) -> None:
    """Each as it is: editors jump to `FILE:LINE:`."""
    with contextlib.suppress(OSError):
        print("\n".join(lines), file=sys.stderr, flush=True)
