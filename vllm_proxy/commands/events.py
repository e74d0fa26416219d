"""`events`: prints what has happened, the last of it or as it comes; the daemon keeps a thousand."""

import argparse
import json
import os
from collections import deque
from datetime import datetime
from typing import TYPE_CHECKING

from vllm_proxy import places
from vllm_proxy.commands.outcome import OK
from vllm_proxy.commands.output import write
from vllm_proxy.commands.screen import BOLD, DIM, GREEN, PLAIN, RED, YELLOW, Cell, Screen
from vllm_proxy.commands.stream import events_of
from vllm_proxy.connection import connected
from vllm_proxy.errors import CommandError

if TYPE_CHECKING:
    from vllm_proxy.domain.feed_resources import Happening

_COLOURS = {"ready": GREEN, "loading": YELLOW, "unloading": YELLOW, "error": RED}
_ABOUT = 1  # the place of what it is about, in a line
_ALL = "/events?fleet=1&since=0"


def run(options: argparse.Namespace) -> int:
    """With --follow until the daemon stops."""
    if options.lines < 0:
        raise CommandError(f"cannot print {options.lines} lines: expected a number from 0")
    screen = Screen.of_stdout()

    def tell(happening: "Happening") -> None:
        write(json.dumps(happening) if options.json else screen.named_line(line_of(happening), _ABOUT))

    with connected(places.find(os.environ, vars(options))) as daemon:
        earlier: deque[Happening] | None = deque(maxlen=options.lines)  # until all that were kept have come
        for kind, told in events_of(daemon, _ALL):
            if kind == "happened" and earlier is not None:
                earlier.append(told)
            elif kind == "happened":
                tell(told)
            elif kind == "config" and earlier is not None:
                for happening in earlier:
                    tell(happening)
                earlier = None
                if not options.follow:
                    break
    return OK


def line_of(happening: "Happening") -> list[Cell]:
    """When, what, and what became of it."""
    at = datetime.fromisoformat(happening["at"]).astimezone()
    today = datetime.now().astimezone().date() == at.date()
    time: Cell = (f"{at:%H:%M:%S}  " if today else f"{at:%Y-%m-%d %H:%M:%S}  ", DIM)
    kind = happening["kind"]
    if kind in {"instance", "model"}:
        state = str(happening["state"])
        about = happening.get("instance") or happening["model"]
        phase, reason = happening.get("phase"), happening.get("reason")
        shown = f" ({str(phase).replace('_', ' ')})" if phase and phase != "serving" else ""
        why = f"  {reason}: {happening.get('message') or ''}".rstrip(": ") if reason else ""
        return [time, (about, BOLD), "  ", (state + shown, _COLOURS.get(state, PLAIN)), (why, RED if reason else PLAIN)]
    if kind == "accepted":
        changes = ", ".join(f"{one['action']} {one['model']}" for one in happening["changes"])
        return [time, ("file accepted", GREEN), f" {happening['revision'][:8]}", f": {changes}" if changes else ""]
    if kind == "rejected":
        problems = happening["problems"]
        first = f"{problems[0]['path']}: {problems[0]['message']}" if problems else ""
        more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
        return [time, ("file refused", RED), f" {first}{more}; vllm-proxy check"]
    return [time, f"{happening['who']}: {happening['what']}"]
