"""Configures the daemon's log: text for people, JSON for collectors, prefixed lines for the systemd journal.

Everything that Python itself would write to stderr (warnings, unhandled exceptions, asyncio's complaints) goes through
the same writer, `runtime/logwriter.py`. A traceback never shows the values of variables: they may be prompts or keys.
"""

import logging
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Literal, TextIO, cast

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from vllm_proxy.runtime import journal, logline
from vllm_proxy.runtime.logline import PRIORITIES, Form
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.runtime.masking import Masking

Format = Literal["auto", "text", "json", "journal"]


def resolve(chosen: Format, environ: Mapping[str, str]) -> Form:
    """What `auto` means here: journal where stderr is the journal, else text."""
    if chosen == "auto":
        return "journal" if _is_journal(environ) else "text"
    return chosen


@dataclass(frozen=True, slots=True)
class Output:
    """Where a daemon's own lines go: its log, its access log where `requests`, its engines' output where `engines`."""

    writer: LogWriter
    form: Form
    requests: bool
    engines: bool
    masking: Masking = field(default_factory=Masking)  # what the writer hides

    def pass_on(self, instance: str, lines: Sequence[str]) -> None:
        """An engine's lines, each with its instance in front."""
        if not self.engines:
            return
        if self.form == "native":
            fields = {"MODEL": logline.model_of(instance), "INSTANCE": instance}
            text = "".join(logline.entry(_priority(line), f"{instance} | {line}", fields) for line in lines)
        elif self.form == "json":
            entries = ({"instance": instance, "line": line} for line in lines)
            text = "".join(logline.as_json("engine output", "info", fields) for fields in entries)
        else:
            heads = (f"<{_priority(line)}>" if self.form == "journal" else "" for line in lines)
            text = "".join(f"{head}{instance} | {line}\n" for head, line in zip(heads, lines, strict=True))
        self.writer.write(text)
        self.writer.flush()


_LEVEL = re.compile(r"(?:\([^)]{1,80}\) )?(ERROR|CRITICAL|WARNING)\b")  # as vLLM writes it, behind the process's name
_OF_ENGINES: Mapping[str, logline.Level] = {"ERROR": "error", "CRITICAL": "critical", "WARNING": "warning"}


def _priority(line: str) -> int:
    """How serious an engine says that a line is."""
    found = _LEVEL.match(line)
    return PRIORITIES[_OF_ENGINES[found[1]] if found else "info"]


def with_fields(form: Form, writer: LogWriter, environ: Mapping[str, str]) -> Form:
    """The form of a daemon's log: where stderr is the journal, entries with fields are sent to the journal itself."""
    if form != "journal" or not _is_journal(environ) or not journal.takes_entries():
        return form
    writer.deliver = journal.Journal().send
    return "native"


def set_up(level: str, form: Form, output: LogWriter | None = None) -> None:
    """Configure structlog, to write to `output`, else to stderr.

    Of exceptions the frames are shown, never what is in their variables: prompts and keys.
    """
    processors: list[Processor] = [structlog.processors.add_log_level, structlog.processors.StackInfoRenderer()]
    if form == "json":
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ]
    elif form == "journal":
        processors += [structlog.processors.format_exc_info, _journal]
    elif form == "native":
        where = structlog.processors.CallsiteParameter
        places = structlog.processors.CallsiteParameterAdder([where.PATHNAME, where.LINENO, where.FUNC_NAME])
        processors += [structlog.processors.format_exc_info, places, _native]
    else:
        processors += [
            structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%SZ", utc=True),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", output or sys.stderr)),
        cache_logger_on_first_use=True,
    )


def capture(writer: LogWriter, form: Form) -> None:
    """Have everything that Python itself would write to stderr written by `writer`, in the form of the log."""
    writer.notice = partial(_missing, form)
    logging.captureWarnings(capture=True)
    logging.basicConfig(handlers=[_Handler()], level=logging.WARNING, force=True)
    sys.unraisablehook = _unraisable
    threading.excepthook = _thread_failed


class _Handler(logging.Handler):
    """Entries of Python's own logging: asyncio's about tasks that failed, aiohttp's, warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = min(max(record.levelno, logging.WARNING), logging.CRITICAL)
            structlog.get_logger().log(level, record.getMessage(), logger=record.name, exc_info=record.exc_info)
        except Exception:  # noqa: BLE001, S110 - nowhere is left to report it
            pass


def _unraisable(failure: "sys.UnraisableHookArgs") -> None:
    where = type(failure.object).__name__  # its representation may hold anything
    structlog.get_logger().error(
        "an exception could not be raised", message=failure.err_msg, object=where, exc_info=failure.exc_value
    )


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    name = failure.thread.name if failure.thread else None
    structlog.get_logger().error("a thread failed", thread=name, exc_info=failure.exc_value)


def _missing(form: Form, lines: int) -> str:
    """The line that says how many are missing in its place. Made without structlog, which would have it queued."""
    event = "lines of this log are missing here"
    if form == "json":
        return logline.as_json(event, "warning", {"lines": lines})
    if form == "native":
        return logline.entry(PRIORITIES["warning"], f"{event} lines={lines}", {})
    return f"{logline.head(form, 'warning')}{event} lines={lines}\n"


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
    prefix = f"<{PRIORITIES.get(event.pop('level', 'info'), 6)}>"
    return "\n".join(prefix + line for line in _lines(event))


def _native(_logger: WrappedLogger, _name: str, event: EventDict) -> str:
    """One entry, its traceback included, which can be found by what it is about and by where it was logged."""
    priority = PRIORITIES.get(event.pop("level", "info"), 6)
    instance, model = event.get("instance"), event.get("model")
    fields = {
        "MODEL": str(model or (logline.model_of(str(instance)) if instance else "")),
        "INSTANCE": str(instance or ""),
        "REQUEST_ID": str(event.get("request_id") or ""),
        "CODE_FILE": str(event.pop("pathname", "")),
        "CODE_LINE": str(event.pop("lineno", "")),
        "CODE_FUNC": str(event.pop("func_name", "")),
    }
    return logline.entry(priority, "\n".join(_lines(event)), fields).removesuffix("\n")


def _lines(event: EventDict) -> list[str]:
    """The sentence with its facts, and a traceback below it."""
    trace = event.pop("exception", "")
    message = str(event.pop("event"))
    fields = " ".join(f"{key}={_plain(value)!r}" for key, value in event.items())
    return " ".join(part for part in (message, fields) if part).splitlines() + str(trace).splitlines()
