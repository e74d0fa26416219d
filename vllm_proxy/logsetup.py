"""How the daemon's log looks: text for people, JSON for collectors, prefixed lines for the systemd journal."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Format = Literal["auto", "text", "json", "journal"]
Form = Literal["text", "json", "journal"]
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def resolve(chosen: Format, environ: Mapping[str, str]) -> Form:
    """What `auto` means here: journal where stderr is the journal, else text."""
    if chosen == "auto":
        return "journal" if _is_journal(environ) else "text"
    return chosen


def set_up(level: str, form: Form) -> None:
    """Configure structlog; everything goes to stderr."""
    processors: list[Processor] = [structlog.processors.add_log_level, structlog.processors.StackInfoRenderer()]
    if form == "json":
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ]
    elif form == "journal":
        processors += [structlog.processors.format_exc_info, _journal]
    else:
        processors += [
            structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%SZ", utc=True),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def engine_output(form: Form | None) -> Callable[[str, Sequence[str]], None]:
    """What passes an engine's lines on: to stderr, each with its instance in front; nowhere for no form."""

    def pass_on(instance: str, lines: Sequence[str]) -> None:
        if form is None:
            return
        if form == "json":
            time = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
            fields = {"event": "engine output", "level": "info", "timestamp": time, "instance": instance}
            text = "".join(json.dumps({**fields, "line": line}) + "\n" for line in lines)
        else:
            head = f"{'<6>' if form == 'journal' else ''}{instance} | "
            text = "".join(f"{head}{line}\n" for line in lines)
        with contextlib.suppress(OSError, ValueError):  # a log that cannot be written must not end models
            sys.stderr.write(text)
            sys.stderr.flush()

    return pass_on


def _is_journal(environ: Mapping[str, str]) -> bool:
    """systemd names device and inode of the stream it connected."""
    try:
        stat = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def _plain(value: object) -> object:
    """A name out of an enumeration is shown as the word that it is."""
    return value.value if isinstance(value, Enum) else value


def _journal(_logger: WrappedLogger, _name: str, event: EventDict) -> str:
    """sd-daemon's "<N>" on every line: the journal takes each line of a traceback for an entry of its own."""
    prefix = f"<{_PRIORITIES.get(event.pop('level', 'info'), 6)}>"
    trace = event.pop("exception", "")
    message = str(event.pop("event"))
    fields = " ".join(f"{key}={_plain(value)!r}" for key, value in event.items())
    lines = " ".join(part for part in (message, fields) if part).splitlines() + str(trace).splitlines()
    return "\n".join(prefix + line for line in lines)
