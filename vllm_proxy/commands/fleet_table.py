"""The fleet as a table for people: problems first, then what moves, then the order of the file; and what to do next.

Made of what the daemon tells, by values alone: `status` asks and prints.
"""

import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vllm_proxy.commands.screen import BOLD, DIM, GREEN, PLAIN, RED, YELLOW, Cell, Columns, Screen

if TYPE_CHECKING:
    from vllm_proxy.domain.feed_resources import Brief, Replica
    from vllm_proxy.domain.resources import Health

_LOOKS = {  # shape and colour of a state
    "ready": ("✓", GREEN),
    "loading": ("◐", YELLOW),
    "unloading": ("↓", YELLOW),
    "error": ("✗", RED),
    "sleeping": ("☾", DIM),
    "stopped": ("·", DIM),
}
_PROBLEM, _MOVING, _OTHER = range(3)  # in which order
_NO_PROBLEM = {"stopped_by_hand", "gave_way", "sleeping", None}  # reasons that somebody wanted
_HEAD = ("", "MODEL", "STATE", "READY", "RUN", "WAIT", "REQ/S", "TOK/S", "MEMORY", "UP", "")
_COLUMNS = Columns(
    _HEAD,
    right=frozenset({"READY", "RUN", "WAIT", "REQ/S", "TOK/S", "MEMORY", "UP"}),
    names=frozenset({"MODEL"}),
    less=("TOK/S", "REQ/S", "UP", "MEMORY", "READY"),
)
_UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class Row:
    """A model. None: not known."""

    id: str
    state: str  # in a word: a state, `disabled`, `on demand`
    rank: int
    ready: int
    replicas: int
    running: int
    waiting: int
    requests: float | None  # a second
    tokens: float | None  # a second
    memory: int | None  # bytes
    since: datetime | None  # when the first of those that are ready became so
    note: str
    reason: str | None  # of a problem
    message: str | None
    change: str | None = None  # what of its table would do


def row_of(model: "Brief") -> Row:
    """A model as `GET /events?fleet=1` has it."""
    replicas = model["replicas"]
    since = [each["since"] for each in replicas if each["since"]]
    memory = [each["memory"] for each in replicas if each["memory"] is not None]
    reason = model["reason"] or next((each["reason"] for each in replicas if each["reason"]), None)
    problem = reason not in _NO_PROBLEM or model["state"] == "error"
    moving = any(each["state"] in {"loading", "unloading"} for each in replicas)
    return Row(
        id=model["id"],
        state=_word(model),
        rank=_PROBLEM if problem else _MOVING if moving else _OTHER,
        ready=sum(each["state"] == "ready" for each in replicas),
        replicas=len(replicas),
        running=model["in_flight"],
        waiting=model["queued"],
        requests=model["rps"],
        tokens=model["tps"],
        memory=sum(memory) if memory else None,
        since=min(map(datetime.fromisoformat, since), default=None),
        note=_note(replicas) or (str(reason) if reason and not problem else "") or _unasked(replicas),
        reason=str(reason or "error") if problem else None,
        message=model["message"] or next((each["message"] for each in replicas if each["message"]), None),
        change=f"{change['key']} = {json.dumps(change['value'])}" if (change := model.get("change")) else None,
    )


def _word(model: "Brief") -> str:
    if model["state"] != "stopped":
        return model["state"]
    if not model["enabled"]:
        return "disabled"
    by_hand = model["reason"] == "stopped_by_hand"
    return "on demand" if model["start"] == "on-demand" and not by_hand else "stopped"


def _unasked(replicas: "Sequence[Replica]") -> str:
    """What one says of itself though nothing is wrong with it, as that its output cannot be kept."""
    return next((each["message"] for each in replicas if each["message"] and not each["reason"]), "")


def _note(replicas: "Sequence[Replica]") -> str:
    """How far it is that moves: its phase, how much of that is done, how long it may take."""
    busy = next((each for each in replicas if each["state"] in {"loading", "unloading"} and each["phase"]), None)
    if busy is None:
        return ""
    text = str(busy["phase"]).replace("_", " ")
    if busy["progress"] is not None:
        text += f" {busy['progress']:.0%}"
    return f"{text}, about {short_duration(busy['left'])} left" if busy["left"] else text


def lines_of(
    rows: Iterable[Row], missing: Collection[str], health: "Health", screen: Screen, now: datetime | None = None
) -> list[str]:
    """All of it: a head, the table, and what is wrong with the next commands.

    `missing`: the models that are wanted and not ready, as `GET /ready` has them.
    """
    shown = sorted(rows, key=lambda row: row.rank)
    whole = replace(screen, width=None)
    lines = [whole.line(*_head(shown, missing, health, screen.dot))]
    if shown:
        lines += ["", *_table(shown, screen, now or datetime.now(UTC))]
    for row in shown:
        if row.reason is not None:
            lines += ["", *_problem(row, screen)]
        elif row.rank == _MOVING and row.message:
            lines += ["", whole.line((f"{row.id}:", YELLOW), f"  {row.message}")]
    for text, remedy in _of_the_daemon(health):
        lines += ["", whole.line((text, RED))]
        lines.append(screen.line((f"  {remedy}", DIM)))
    return lines


def _head(rows: Sequence[Row], missing: Collection[str], health: "Health", dot: str) -> Iterator[Cell]:
    """How many are ready of those that are wanted, and of others while they are; what the rest is; what all do."""
    ready = sum(1 for row in rows if row.state == "ready")
    wanted = sum(1 for row in rows if row.state == "ready" or row.id in missing)
    others = Counter(row.state for row in rows if row.state != "ready" and row.id not in missing)
    config = health.get("config")
    yield f"{ready} of {wanted} models ready", BOLD
    for fact in (
        *(f"{count} {state}" for state, count in others.items()),
        f"{sum(row.running for row in rows)} in flight",
        f"{sum(row.waiting for row in rows)} waiting",
        *([f"revision {config['revision'][:8]}"] if config else []),
    ):
        yield dot + fact


def _table(rows: Sequence[Row], screen: Screen, now: datetime) -> list[str]:
    first = 0 if screen.shapes else 1
    return screen.table(replace(_COLUMNS, titles=_HEAD[first:]), [_cells(row, now)[first:] for row in rows])


def _cells(row: Row, now: datetime) -> list[Cell]:
    state = {"disabled": "stopped", "on demand": "stopped"}.get(row.state, row.state)
    shape, colour = _LOOKS.get(state, ("?", PLAIN))
    colour = RED if row.reason is not None else colour
    note = (row.reason, RED) if row.reason is not None and not row.note else (row.note, YELLOW)
    if row.reason is not None and row.note:
        note = (f"{row.note}: {row.reason}", RED)
    return [
        (shape, colour), (row.id, BOLD), (row.state, colour), f"{row.ready}/{row.replicas}",
        str(row.running), str(row.waiting), _rate(row.requests), _rate(row.tokens),
        _UNKNOWN if row.memory is None else short_size(row.memory),
        _UNKNOWN if row.since is None else short_duration((now - row.since).total_seconds()),
        note,
    ]  # fmt: skip


def _problem(row: Row, screen: Screen) -> list[str]:
    """The sentence, whole, and what to type next."""
    about = f"  {row.message}" if row.message else ""
    whole = replace(screen, width=None)
    return [
        whole.line((f"{row.id}: {row.reason}", RED), about),
        *([whole.line((f"  {row.change} would do", DIM))] if row.change else []),
        whole.line((f"  vllm-proxy logs {row.id}", DIM), (f"{screen.dot}vllm-proxy help {row.reason}", DIM)),
    ]


def _of_the_daemon(health: "Health") -> Iterable[tuple[str, str]]:
    """What concerns no single model, and what to type next."""
    config = health.get("config")
    if config and config["error"]:
        yield config["error"], f"vllm-proxy check -c {shlex.quote(config['file'])}"
    if config and config["certificate_error"]:
        yield f"the certificate is rejected: {config['certificate_error']}", "vllm-proxy reload"
    if config and config["pending_restart"]:
        yield f"waits for a restart of the daemon: {', '.join(config['pending_restart'])}", "vllm-proxy help changes"
    for instance in health.get("not_ended", ()):
        yield f"{instance}: an engine could not be ended", "vllm-proxy help not_ended"
    if (devices := health.get("devices")) and devices["problem"]:
        yield f"devices: {devices['problem']}", "vllm-proxy help scheduling"
    if (usage := health.get("usage")) and usage["error"]:
        yield f"usage: {usage['error']}", "vllm-proxy help limits"
    if (state := health.get("state")) and state["error"]:
        yield f"the record of engines: {state['error']}", "vllm-proxy help operating"


def _rate(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def short_size(size: int) -> str:
    """In GiB, or in MiB where that is less than one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def short_duration(seconds: float) -> str:
    """In its two largest units: "3d 4h", "12m", "40s"."""
    whole = max(round(seconds), 0)
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {whole % 60}s" if minutes and minutes < 10 else f"{minutes}m" if minutes else f"{whole}s"
