"""What has happened: changes of instances, of models and of the file, the last 1,000, also while nobody listens.

Each has an id, `BOOT-N`: readers of `/events` who come back name the last one that they know, and get what came after
it. Each is kept as the bytes that readers get, once for all of them: what a file changes of hundreds of models takes a
fifth of what its values would, and all that is kept is bounded by that. Where they are large, fewer are kept.
"""

import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, cast

import msgspec

from vllm_proxy.api.models import rfc3339
from vllm_proxy.domain import resources
from vllm_proxy.domain.feed_resources import Happening, ResetEvent
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.errors import ConfigError
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.outcome import Outcome, Written
from vllm_proxy.runtime.background import notify

KEPT = 1000
_MOST_BYTES = 4 * 2**20  # of all that are kept; the last one always is
_ALL = "0"  # as `since`: everything that is kept
_ID = re.compile(r"([0-9a-f]{8})-(\d{1,18})")

_NOTHING = State.STOPPED, None, None

type _Shown = tuple[State, Reason | None, datetime | None]  # and when its engine last ended by itself


class Entry:
    """One happening. `happened`: its event; `plain`: those of `/events` without `fleet` that tell of it, if any."""

    __slots__ = ("happened", "id", "number", "plain")

    def __init__(self, boot: str, number: int, fields: dict[str, Any]) -> None:
        self.number = number
        self.id = f"{boot}-{number}"  # as readers name it
        value = cast("Happening", {"id": self.id, "at": rfc3339(datetime.now(UTC)), **fields})
        self.happened = event("happened", value, self.id)
        self.plain = b""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.happened) + len(self.plain)


class Happenings:
    """Of one daemon. `listen` for those to come."""

    def __init__(self, knows: Callable[[str], bool]) -> None:
        """`knows`: whether there is a model of this id, one that drains for the last time included."""
        self.boot = secrets.token_hex(4)
        self._knows = knows
        self._number = 0
        self._kept: deque[Entry] = deque()
        self._bytes = 0  # of those
        self._shown: dict[str, _Shown] = {}  # as last told, by model and by instance
        self._listeners: list[Callable[[Entry], None]] = []

    def listen(self, listener: Callable[[Entry], None]) -> None:
        """Call `listener` with each one, once it is kept."""
        self._listeners.append(listener)

    def since(self, known: str) -> tuple[bytes, list[Entry]]:
        """(the event `reset` where what follows `known` is not kept, else nothing; what came after it, or all)."""
        if known == _ALL:
            return b"", list(self._kept)
        found = _ID.fullmatch(known)
        first = self._number - len(self._kept)  # the number in front of the oldest one
        if found is None or found[1] != self.boot or not first <= int(found[2]) <= self._number:
            reset: ResetEvent = {"boot": self.boot}
            return event("reset", reset), list(self._kept)
        return b"", [entry for entry in self._kept if entry.number > int(found[2])]

    def of_model(self, model: Model) -> Entry | None:
        """What a model shows has changed: keep what is new; returns the last of that."""
        new: Entry | None = None
        for fields in self._changes(model):
            new = self.add(fields)
        return new

    def of_file(self, outcome: Outcome | Written | ConfigError) -> Entry:
        """Somebody changed the file or commanded something, or a file was accepted or refused."""
        if isinstance(outcome, Written):
            author = outcome.author
            written: resources.WriteEvent = {
                "who": author.who, "what": author.what, "before": outcome.before, "after": outcome.after,
            }  # fmt: skip
            return self.add({"kind": "write", **written}, ("write", written))
        if isinstance(outcome, ConfigError):
            problems = resources.problems_of(outcome.problems)
            rejected: resources.ConfigRejected = {"result": "rejected", "problems": problems}
            return self.add({"kind": "rejected", "problems": problems}, ("config", rejected))
        revision, changes = outcome.revision, resources.changes_of(outcome.changes)
        accepted: resources.ConfigAccepted = {"result": "accepted", "revision": revision, "keys": outcome.keys}
        planned: resources.PlanEvent = {"revision": revision, "changes": changes}
        plan: list[tuple[str, object]] = [("plan", planned)] if changes else []
        fields = {"kind": "accepted", "revision": revision, "changes": changes, "keys": outcome.keys}
        return self.add(fields, ("config", accepted), *plan)

    def add(self, fields: dict[str, Any], *plain: tuple[str, object]) -> Entry:
        """One more."""
        self._number += 1
        entry = Entry(self.boot, self._number, fields)
        self._kept.append(entry)
        self._bytes += entry.size
        self.tell(entry, *plain)
        notify(self._listeners, entry)
        return entry

    def tell(self, entry: Entry, *plain: tuple[str, object]) -> None:
        """The events that tell of it where `fleet` is not asked for, by name. It is the last one, and has none yet."""
        entry.plain = b"".join(event(kind, value, entry.id) for kind, value in plain)
        self._bytes += len(entry.plain)
        while len(self._kept) > KEPT or (self._bytes > _MOST_BYTES and len(self._kept) > 1):
            self._bytes -= self._kept.popleft().size

    def _changes(self, model: Model) -> Iterator[dict[str, Any]]:
        name, diagnosis = model.spec.id, model.diagnosis
        is_there = self._knows(name)
        state = model.state if is_there else State.STOPPED
        of_model = state, diagnosis.reason if diagnosis else None, None
        is_new = self._shown.get(name, _NOTHING) != of_model
        told = False
        for one in model.instances:
            reason = one.diagnosis.reason if one.diagnosis else None
            shown = one.state, reason, one.last_exit.at if one.last_exit else None
            if self._shown.get(one.name, _NOTHING) != shown:
                self._shown[one.name], told = shown, True
                yield {
                    "kind": "instance", "model": name, "instance": one.name, "state": one.state, "phase": one.phase,
                    "reason": reason, "message": one.diagnosis.message if one.diagnosis else None,
                }  # fmt: skip
        self._shown[name] = of_model
        if is_new and not told:
            yield {
                "kind": "model", "model": name, "instance": None, "state": state, "phase": None,
                "reason": of_model[1], "message": model.message,
            }  # fmt: skip
        if not is_there:
            for gone in [shown for shown in self._shown if shown == name or shown.rpartition("/")[0] == name]:
                del self._shown[gone]


def event(kind: str, value: object, number: str = "") -> bytes:
    """A server-sent event."""
    head = b"id: %s\n" % number.encode() if number else b""
    return b"%sevent: %s\ndata: %s\n\n" % (head, kind.encode(), msgspec.json.encode(value))
