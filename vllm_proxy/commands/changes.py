"""A plan as lines for people: what would be done to which model, why, and what would become of it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_proxy.commands.screen import BOLD, CYAN, DIM, GREEN, PLAIN, RED, YELLOW, Cell, Screen
from vllm_proxy.domain.keys import told

if TYPE_CHECKING:
    from vllm_proxy.domain.resources import Applied, Change, Plan


_COLOURS = {"start": GREEN, "replace": YELLOW, "update": CYAN, "scale": CYAN, "stop": RED}


def lines_of(found: "Applied | Plan", screen: Screen, restart: Sequence[str] = ()) -> list[str]:
    """One of each change, one of the keys where they change, and what is to be warned of. None is cut: all matters.

    `restart`: keys that wait for a restart of the daemon.
    """
    keys = told(found["keys"])
    whole = replace(screen, width=None)
    lines = [whole.line(*_parts(change)) for change in found["changes"]]
    lines += [f"keys: {keys}"] if keys else []
    lines += [f"live: {setting}" for setting in found["settings"]]
    lines += [f"with the next start of the daemon: {', '.join(restart)}"] if restart else []
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    return lines or ["nothing to do"]


def _parts(change: "Change") -> Iterator[Cell]:
    yield change["action"], _COLOURS.get(change["action"], PLAIN)
    yield " "
    yield change["model"], BOLD
    yield f": {change['reason']}"
    yield _prospect(change), RED if "misfit" in change else DIM


def _prospect(change: "Change") -> str:
    """What would become of it."""
    if "misfit" in change:
        return f"; it can never run on this machine: {change['misfit']}"
    place = change.get("place")
    return f"; on device{'s' if len(place) > 1 else ''} {', '.join(place)}" if place else ""
