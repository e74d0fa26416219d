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

Form = Literal["text", "json", "journal"]
Level = Literal["debug", "info", "warning", "error", "critical"]

PRIORITIES: Mapping[str, int] = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # syslog's


def head(form: Form, level: Level) -> str:
    """What a line for people begins with: in the journal its priority, else the time and the level."""
    if form == "journal":
        return f"<{PRIORITIES[level]}>"
    return _head(int(time.time()), level)


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
