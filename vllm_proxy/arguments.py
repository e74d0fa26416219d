"""The arguments of every command, for `cli`, for the completions of shells and for the pages of the manual.

Imports next to nothing: what a command does lies in its own module of `commands`, named by `options.command`, which is
imported once it is known which one it is.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from vllm_proxy.domain.units import parse_duration, parse_time, show, show_time

SCOPES = ("inference", "metrics", "read", "operate", "admin")  # `domain.keys.Scope`, which takes a while to import
SHELLS = ("bash", "zsh", "fish")
_DAY_SECONDS = 24 * 3600
_BEFORE_THE_COMMAND = ("-h", "--help", "--version")
_TABLE = (
    "a model is a table of models.toml, as `vllm-proxy init` writes a first one; the running daemon follows the file"
)
# Commands of other servers, by what is done here instead.
_OTHERS_WORDS = {
    **dict.fromkeys(("ps", "list", "ls"), "`vllm-proxy status` shows every model and what it does"),
    "show": "`vllm-proxy status ID` shows one model, `vllm-proxy plan` what the file would change",
    **dict.fromkeys(("pull", "run", "create", "add"), _TABLE),
    **dict.fromkeys(
        ("rm", "remove", "delete"), "take its table out of models.toml; the running daemon follows the file"
    ),
    **dict.fromkeys(("unload", "load"), '`vllm-proxy stop ID` and `start ID`, or `start = "on-demand"` in its table'),
    "version": "it is `vllm-proxy --version`",
}
_BY = "key,model"  # what usage is told by


class _Version(argparse.Action):
    """`--version`; looked up only where somebody asks."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: object) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from vllm_proxy import __version__  # noqa: PLC0415 - see above

        print(f"vllm-proxy {__version__}", flush=True)
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Raises an `OSError` where stdout cannot be written, of which argparse would take no notice."""

    def _print_message(self, message: str, file: Any = None) -> None:  # noqa: ANN401 - the signature is given
        if file is sys.stdout:
            print(message, end="", flush=True)
        else:
            super()._print_message(message, file)


class _Parents:
    """Options that several commands share, as parsers to inherit from."""

    def __init__(self) -> None:
        self.config = argparse.ArgumentParser(add_help=False)
        self.config.add_argument(
            "-c",
            "--config",
            metavar="FILE",
            help="default: $VLLM_PROXY_CONFIG, ./models.toml, /etc/vllm-proxy/models.toml",
        )
        self.as_json = argparse.ArgumentParser(add_help=False)
        self.as_json.add_argument("--json", action="store_true", help="print JSON")
        self.place = argparse.ArgumentParser(add_help=False)
        self.place.add_argument("--state-dir", metavar="DIR", help="where logs and the record of engines are kept")
        self.running = argparse.ArgumentParser(add_help=False)
        self.running.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
        self.running.add_argument("--port", type=int, help="port to listen on (default: 8000)")
        self.running.add_argument(
            "--log-level",
            default="info",
            choices=["debug", "info", "warning", "error"],
            help="what is logged; info: requests and engine output too (default: info)",
        )
        self.running.add_argument(
            "--log-format",
            default="auto",
            choices=["auto", "text", "json", "journal"],
            help="auto: journal where stderr is the journal, else text (default: auto)",
        )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, as `parser` leaves them; one that cannot be parsed exits with status 2.

    Raises:
        OSError: the help or the version cannot be written.

    """
    whole = parser()
    first = arguments[0].partition("=")[0] if arguments else ""
    if hint := _OTHERS_WORDS.get(first):
        whole.error(f"there is no command {first}: {hint}")
    if first.startswith("-") and first.strip("-") and not any(known.startswith(first) for known in _BEFORE_THE_COMMAND):
        whole.error(f"options follow the command: vllm-proxy COMMAND {first} ...")
    return whole.parse_args(arguments)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. It leaves in the options as `action` the command's name, and as `command`
    the module of `commands` that runs it.
    """  # noqa: D205 - one sentence
    whole: argparse.ArgumentParser = _Parser(
        prog="vllm-proxy",
        description="One OpenAI-compatible address in front of many vLLM processes.",
        epilog="`vllm-proxy help` lists the pages of the manual, `vllm-proxy help CODE` explains an error.",
    )
    whole.add_argument("--version", action=_Version)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, parents: list[argparse.ArgumentParser], explanation: str | None, module: str | None = None
    ) -> argparse.ArgumentParser:
        if explanation is None:
            sub = commands.add_parser(name, parents=parents)
        else:
            sub = commands.add_parser(name, parents=parents, help=explanation, description=explanation)
        sub.set_defaults(command=module or name, action=name)
        return sub

    shared = _Parents()
    _add_files(add, shared)
    _add_acting(add, shared)
    _add_showing(add, shared)
    keys = add("keys", [], "make, list, rotate and revoke API keys, with or without a running daemon")
    _add_keys(keys, [shared.config, shared.place, shared.as_json])
    _add_usage(add("usage", [shared.place], "print what keys have used"))
    _add_offline(add, shared)
    add("demo", [shared.place, shared.running], "run the daemon with two small real models on this machine's CPU")
    return whole


type _Add = Callable[..., argparse.ArgumentParser]


def _add_files(add: _Add, shared: _Parents) -> None:
    """The daemon, and what is about its file."""
    add("serve", [shared.config, shared.place, shared.running], "run the daemon in the foreground")
    add("check", [shared.config, shared.as_json], "validate the configuration and print every problem")
    add("init", [shared.config, shared.as_json], "write a first configuration with comments")
    add("plan", [shared.config, shared.place, shared.as_json],
        "say what applying a file, else its own as it is on disk, would do to the running daemon")  # fmt: skip
    again = add("reload", [shared.place, shared.as_json],
                "have the running daemon read its file again, and say what changed")  # fmt: skip
    again.add_argument("--wait", action="store_true", help="until every model is as the file asks, or say why not")
    again.add_argument("--timeout", type=_duration, metavar="TIME", default="30m",
                       help="how long at most, such as 90s or 10m (default: 30m)")  # fmt: skip


def _add_acting(add: _Add, shared: _Parents) -> None:
    """What acts on a model."""
    parents = [shared.place, shared.as_json]
    start = add("start", parents, "start a model of the running daemon, and wait until it is ready", "act")
    stop = add("stop", parents, "stop a model of the running daemon, and wait until it has stopped", "act")
    restart = add("restart", parents, "restart a model, one engine after another", "act")
    sleep = add("sleep", parents, "put a model to sleep until a request comes, and wait until it sleeps", "act")
    wake = add("wake", parents, "wake a model that sleeps, or start it, and wait until it is ready", "act")
    for command in (start, restart, sleep, wake):
        command.add_argument("model", metavar="ID")
    # Python 3.13 writes it as if both were optional.
    stop.usage = "%(prog)s [-h] [--state-dir DIR] [--json] (ID | --all)"
    which = stop.add_mutually_exclusive_group(required=True)
    which.add_argument("model", metavar="ID", nargs="?")
    which.add_argument("--all", action="store_true", help="all of them, and what a daemon that runs no more has left")


def _add_showing(add: _Add, shared: _Parents) -> None:
    """What tells how things are."""
    parents = [shared.place, shared.as_json]
    status = add("status", parents, "print the models: what state, how busy, what is wrong and what to do")
    status.add_argument("model", metavar="ID", nargs="?", help="this one alone")
    status.add_argument("-w", "--watch", action="store_true", help="go on as things change")
    events = add("events", parents, "print what has happened: states of models, changes of the file")
    _add_following(events, 50, "how many back")
    requests = add("requests", parents, "print the requests in flight, and the last ones that have ended")
    requests.add_argument("model", metavar="ID", nargs="?", help="of this model alone")
    _add_following(requests, 20, "how many that have ended")
    logs = add("logs", parents, "print the output of a model's engines")
    logs.add_argument("model", metavar="ID")
    _add_following(logs, 100, "how many lines back")
    add("ids", [shared.place], None)  # for completion: not listed


def _add_following(command: argparse.ArgumentParser, lines: int, explanation: str) -> None:
    command.add_argument("-f", "--follow", action="store_true", help="go on as more comes")
    command.add_argument("-n", "--lines", type=int, default=lines, metavar="N",
                         help=f"{explanation} (default: {lines})")  # fmt: skip


def _add_offline(add: _Add, shared: _Parents) -> None:
    """What needs no daemon."""
    topic = add(
        "help",
        [shared.as_json],
        "print a page of the manual, a section of one, what an error code means, or which sections have some words",
    )
    topic.add_argument("topic", nargs="*", metavar="TOPIC", help="a page, a heading, a code; default: lists the pages")
    completion = add("completion", [], "print what makes a shell complete commands, options and ids")
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    schema = add("schema", [shared.config], "print the JSON schema of the configuration, for editors")
    schema.add_argument("-o", "--output", metavar="OUT", help="write it there")
    schema.add_argument("--vllm", action="store_true", help="with the options of the vLLM that would run")


def _add_keys(keys: argparse.ArgumentParser, parents: Sequence[argparse.ArgumentParser]) -> None:
    """The commands below `keys`; their names are left as `work`."""
    commands = keys.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, explanation: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=parents, help=explanation, description=explanation)
        sub.set_defaults(work=name)
        return sub

    new = add("new", "make a key and print it, this once")
    own = add("add", "take a key that you bring along, from stdin")
    add("list", "list the keys, without their hashes")
    rotate = add("rotate", "make one more key for a name and print it; the old one is good until --finish")
    revoke = add("revoke", "disable a key: its next request is refused, its running streams end")
    for command in (new, own, rotate, revoke):
        command.add_argument("name", metavar="NAME")
    own.add_argument("--stdin", action="store_true", required=True,
                     help="read the key there: one line of at least 32 characters")  # fmt: skip
    for command in (new, own):
        command.add_argument("--scope", action="append", choices=SCOPES, dest="scopes",
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


def _add_usage(usage: argparse.ArgumentParser) -> None:
    usage.add_argument("--by", metavar="NAMES", default=_BY,
                       help=f"some of key, model, and day or hour (default: {_BY})")  # fmt: skip
    usage.add_argument("--since", type=_since, metavar="WHEN", default="24h",
                       help="30d, 12h, …, or a time such as 2026-11-01T00:00:00Z (default: 24h)")  # fmt: skip
    usage.add_argument("--key", metavar="NAME", help="of this key alone")
    form = usage.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV")
    form.add_argument("--json", action="store_true", help="print JSON")


def _amount(text: str) -> int:
    if text.isascii() and text.isdigit() and (amount := int(text)):
        return amount
    msg = f"expected a whole number above 0, got {show(text)}"
    raise argparse.ArgumentTypeError(msg)


def _seconds(text: str) -> float:
    """How long: as durations are written, or a number of days."""
    if text[-1:] == "d" and text[:-1].isascii() and text[:-1].isdigit():
        return float(int(text[:-1]) * _DAY_SECONDS)
    return parse_duration(text)


def _duration(text: str) -> str:
    """How long, as the daemon takes it."""
    try:
        parse_duration(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _expiry(text: str) -> str:
    """A moment as RFC 3339, from one, or from how long it is until then."""
    try:
        now = datetime.now(UTC).replace(microsecond=0)
        until = parse_time(text) if text[4:5] == "-" else now + timedelta(seconds=_seconds(text))
        if until <= now:
            msg = f"expected a time to come, got {show(text)}"
            raise argparse.ArgumentTypeError(msg)
        return show_time(until.timestamp())
    except (ValueError, OverflowError):
        msg = f"expected how long, such as 90d or 12h, or a time such as 2027-01-01T00:00:00Z, got {show(text)}"
        raise argparse.ArgumentTypeError(msg) from None


def _since(text: str) -> str:
    """When a time began, as the route takes it."""
    if text[4:5] == "-":
        return text  # the daemon says what is wrong with it
    try:
        return show_time((datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=_seconds(text))).timestamp())
    except (ValueError, OverflowError):
        msg = f"expected how long, such as 30d or 12h, or a time such as 2026-11-01T00:00:00Z, got {show(text)}"
        raise argparse.ArgumentTypeError(msg) from None
