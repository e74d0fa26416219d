"""`status`: prints the models of the running daemon, once or as they change.

Exit status 0: all that are wanted are ready, which is what `GET /ready` waits for; 1: they are not; 3: no daemon.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from vllm_proxy import places
from vllm_proxy.commands.fleet_table import lines_of, row_of
from vllm_proxy.commands.outcome import FAILED, OK
from vllm_proxy.commands.output import write
from vllm_proxy.commands.screen import Screen, rows_of
from vllm_proxy.commands.stream import events_of
from vllm_proxy.connection import Connection, connected, path_of

if TYPE_CHECKING:
    from vllm_proxy.domain.feed_resources import Brief
    from vllm_proxy.domain.resources import Health

_NOT_READY = 503
_OTHER_SCREEN, _FIRST_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # without a cursor; and as it was
_COLUMNS, _ROWS = 80, 24
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"


def run(options: argparse.Namespace) -> int:
    """With --watch until the daemon stops, or Ctrl-C."""
    with connected(places.find(os.environ, vars(options))) as daemon:
        if options.model is not None:
            daemon.request("GET", path_of(options.model))  # there is one
        if options.watch:
            return _watch(daemon, options)
        models = _only(next(_fleets(daemon)), options.model)
        health: Health = daemon.request("GET", "/health")
        missing = _missing(daemon, models)
    if options.json:
        write(json.dumps({"ready": not missing, "not_ready": missing, "models": models, "health": health}))
    else:
        write("\n".join(lines_of(map(row_of, models), missing, health, Screen.of_stdout())))
    return FAILED if missing else OK


def _fleets(daemon: Connection) -> "Iterator[list[Brief]]":
    """All models, in the file's order: at first, and whenever some of them have changed."""
    known: dict[str, Brief] = {}
    order: list[str] = []
    for kind, told in events_of(daemon, "/events?fleet=1"):
        if kind == "fleet":
            known |= {model["id"]: model for model in told["models"]}
            order = told["order"] if told["order"] is not None else order
        if kind in {"fleet", "config"}:
            yield [known[name] for name in order if name in known]


def _only(models: "Sequence[Brief]", model_id: str | None) -> "list[Brief]":
    return [model for model in models if model_id in {None, model["id"]}]


def _missing(daemon: Connection, models: "Sequence[Brief]") -> dict[str, str]:
    """Which of them are wanted and not ready, with their states."""
    found: dict[str, str] = daemon.request("GET", "/ready", expected=_NOT_READY)["not_ready"]
    shown = {model["id"] for model in models}
    return {model_id: state for model_id, state in found.items() if model_id in shown}


def _watch(daemon: Connection, options: argparse.Namespace) -> int:
    screen = Screen.of_stdout()
    models: list[Brief] = []
    with contextlib.suppress(KeyboardInterrupt), _other_screen(is_there=screen.width is not None and not options.json):
        before: list[Brief] = []
        for fleet in _fleets(daemon):
            models = _only(fleet, options.model)
            if options.json:
                write(json.dumps({"models": models}))
            elif screen.width is None:
                _tell([model for model in models if model not in before], screen)
            else:
                missing, health = _missing(daemon, models), daemon.request("GET", "/health")
                _draw(lines_of(map(row_of, models), missing, health, Screen.of_stdout()))
            before = models
    return FAILED if _missing(daemon, models) else OK


def _tell(changed: "Sequence[Brief]", screen: Screen) -> None:
    """A line for each model that has changed, where lines are kept."""
    now = f"{datetime.now().astimezone():%H:%M:%S}"
    for row in map(row_of, changed):
        about = " ".join(part for part in (row.note, row.reason or "", row.message or "") if part)
        busy = f"{row.running} in flight, {row.waiting} waiting"
        text = f"{now} {row.id} {row.state} {row.ready}/{row.replicas}, {busy}"
        write(screen.line(text, f": {about}" if about else ""))


@contextlib.contextmanager
def _other_screen(*, is_there: bool) -> Iterator[None]:
    """What stood on the terminal comes back at the end, however that comes."""
    if not is_there:
        yield
        return
    sys.stdout.write(_OTHER_SCREEN)
    try:
        yield
    finally:
        sys.stdout.write(_FIRST_SCREEN)
        sys.stdout.flush()


def _draw(lines: Sequence[str]) -> None:
    """In the place of what was drawn before, in one write: nothing flickers. What does not fit is left out."""
    size = os.get_terminal_size(sys.stdout.fileno())  # of zeros, where the terminal does not know it
    rows = [row for line in lines for row in rows_of(line, size.columns or _COLUMNS)]
    most = (size.lines or _ROWS) - 1  # the cursor stands below
    if len(rows) > most:
        rows[most - 1 :] = [f"… {len(rows) - most + 1} lines more"]
    # Before a row, since behind one as wide as the terminal its last character would be erased.
    write(_HOME + "".join(f"{_REST_OF_LINE}{row}\n" for row in rows[:-1]) + _REST + rows[-1])
