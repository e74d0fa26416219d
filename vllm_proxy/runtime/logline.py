"""Formats log lines without structlog, which is too slow for a line per request.

For the access log, the output of engines, and notices about lost lines. The format is the one that `logsetup`
configures structlog to write; change both together.
"""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal

import msgspec

Form = Literal["text", "json", "journal", "native"]  # native: to the journal, in its own protocol
Level = Literal["debug", "info", "warning", "error", "critical"]

PRIORITIES: Mapping[str, int] = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # syslog's

BETWEEN, END_OF_FIELDS, BREAK = "\x1f", "\x1d", "\x1e"  # in a line for the journal's own protocol: `entry`
_UNPRINTABLE = str.maketrans(dict.fromkeys([*map(chr, range(0x20)), "\x7f"], "?"))


def head(form: Form, level: Level) -> str:
    """What a line for people begins with: in the journal its priority, else the time and the level."""
    if form in {"journal", "native"}:
        return f"<{PRIORITIES[level]}>"
    return _head(int(time.time()), level)


def entry(priority: int, message: str, fields: Mapping[str, str]) -> str:
    """An entry for the journal's own protocol as one line: `runtime/journal.py` makes a datagram of it.

    A mark in the message that this line is made with is harmless: what comes before the last one are the fields, and
    none is left in a message.
    """
    shown = BETWEEN.join(f"{name}={value.translate(_UNPRINTABLE)}" for name, value in fields.items() if value)
    message = message.replace(END_OF_FIELDS, "?").replace("\n", BREAK)
    return f"<{priority}>{shown}{END_OF_FIELDS}{message}\n"


def marked(instance: str | None, model: str | None, request_id: str) -> str:
    """The fields of an entry about a request, in front of its message: names that hold no control character."""
    text = f"REQUEST_ID={request_id}"
    text += f"{BETWEEN}MODEL={model}" if model else ""
    return f"{text}{BETWEEN}INSTANCE={instance}{END_OF_FIELDS}" if instance else text + END_OF_FIELDS


def model_of(instance: str) -> str:
    """The model of an instance's name."""
    return instance.rpartition("/")[0]


def as_json(event: str, level: Level, fields: Mapping[str, object]) -> str:
    """A line for collectors."""
    second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    now = f"{_as_text(second)}.{nanoseconds // 1000:06}Z"
    return msgspec.json.encode({"event": event, "level": level, "timestamp": now, **fields}).decode() + "\n"


@lru_cache(maxsize=4)
def _head(second: int, level: Level) -> str:
    return f"{_as_text(second)}Z [{level:<9}] "


@lru_cache(maxsize=4)
def _as_text(second: int) -> str:
    """A time without its zone: cached for a second, since it costs as much as the rest of a line."""
    return f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%S}"
