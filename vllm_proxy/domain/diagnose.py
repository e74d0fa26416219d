"""Determines why an engine ended: a stable reason, and a sentence that says what to do.

Works on the exit status and the last lines of the log. Reports the root cause, not errors that follow from it: vLLM's
last lines mostly come from a process that only noticed the death of another. Known causes are in `causes`;
tests/domain/tails has the logs of real failures.
"""

import difflib
import re
import signal
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, replace

from vllm_proxy.domain.causes import CAUSES, Change
from vllm_proxy.domain.lifecycle import Reason

_ARGPARSE_EXIT = 2
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127  # what a shell answers for a command it cannot run
_MOST_CHARACTERS = 400
_MOST_OF_A_LINE = 1000  # characters; vLLM dumps its state when it dies, in lines of 8,000
_MOST_TEXT = 2**20  # characters
_LINES_OF_A_DEATH = 300  # of an engine that served: earlier lines are of its healthy time
_PREFIX = re.compile(
    r"^(?:\([^()]*pid=\d+\) )?(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?"
)
_ERROR = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Failure)\b(?:: |$)|\b[Ff]atal\b")
# Errors of processes that only noticed the death of another one.
_FOLLOW_UP = re.compile(
    r"Engine core initialization failed|EngineDeadError|See root cause above|WorkerProc initialization"
)
_SUCCESS = re.compile(r"(?:INFO|DEBUG)\b")  # as of the requests that it answered
_UNKNOWN = re.compile(r"unrecognized arguments: (?P<options>.*)")
_ARGPARSE = re.compile(r"^[^\n]*?: error: (?P<what>[^\n]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why an engine is not there. `message` is for people.

    `changes`: of its model, each of which would mend it as far as vLLM has said; of two keys that say the same, both.

    `of_machine`: the machine lacks what any engine needs, for now; it says nothing about the model.
    """

    reason: Reason
    message: str
    changes: tuple[Change, ...] = ()
    of_machine: bool = False

    def masked(self, mask: Callable[[str], str]) -> "Diagnosis":
        """With the secrets in its message hidden."""
        return replace(self, message=mask(self.message))


@dataclass(frozen=True, slots=True)
class Exit:
    """How the first process of an engine ended: exit code or signal; both None when it cannot be known."""

    code: int | None
    signal: int | None

    @property
    def refused(self) -> bool:
        """Whether it is how vLLM's parser ends that does not take the options."""
        return self.code == _ARGPARSE_EXIT

    def __str__(self) -> str:
        if self.signal is not None:
            known = self.signal in set(signal.Signals)
            return f"signal {signal.Signals(self.signal).name}" if known else "a signal"
        return "exit code unknown" if self.code is None else f"exit code {self.code}"


def diagnose(
    ended: Exit,
    tail: Sequence[str],
    *,
    was_ready: bool,
    asleep: bool = False,
    known_options: Collection[str] = (),
    mask: Callable[[str], str] = str,
) -> Diagnosis:
    """From exit status and last lines. Any exit that nobody asked for is a failure: vLLM exits 0 when it dies.

    For a thread: it takes some milliseconds, of a log that is full of dumps some tens, no step of it longer than one.
    `known_options`: the names of vLLM's options, kebab-case without dashes, where they are known. `mask` hides the
    secrets in a message, before it is shortened: what is looked for are the lines as they are.
    """
    lines, successes = _bounded(tail[-_LINES_OF_A_DEATH:] if was_ready else tail)
    found = (_of_the_command(ended, lines, known_options) if not was_ready else None) or _of_a_known_cause(
        ended, lines, was_ready=was_ready
    )
    when = "while it slept" if asleep else "while it served" if was_ready else "before it was ready"
    found = (found or _of_the_exit(ended, lines, successes, when)).masked(mask)
    return replace(found, message=_short(found.message))


def _bounded(tail: Sequence[str]) -> tuple[list[str], set[str]]:
    """The last lines, of each its beginning, without vLLM's prefix; and those of them whose level tells no failure."""
    lines: list[str] = []
    successes: set[str] = set()
    size = 0
    for whole in reversed(tail):
        line = whole[: 2 * _MOST_OF_A_LINE]
        prefix = _PREFIX.match(line)
        assert prefix is not None  # it matches the empty string
        lines.append(line[prefix.end() :][:_MOST_OF_A_LINE].rstrip())
        if _SUCCESS.match(prefix["level"] or lines[-1].lstrip()):
            successes.add(lines[-1])
        size += len(lines[-1])
        if size > _MOST_TEXT:
            break
    return lines[::-1], successes


def _of_the_command(ended: Exit, lines: Sequence[str], known_options: Collection[str]) -> Diagnosis | None:
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if ended.code in {_NOT_EXECUTABLE, _NOT_FOUND}:
        return Diagnosis(Reason.COMMAND_NOT_FOUND, f"cannot run the engine's command: {last or ended}")
    if not ended.refused:
        return None
    said = _ARGPARSE.search("\n".join(lines))
    what = said["what"] if said else last or str(ended)
    if unknown := _UNKNOWN.search(what):
        return Diagnosis(Reason.INVALID_ARGUMENTS, _of_unknown_options(unknown["options"], known_options))
    return Diagnosis(Reason.INVALID_ARGUMENTS, f"vLLM refuses its options: {what}")


def _of_unknown_options(given: str, known_options: Collection[str]) -> str:
    names = [token.removeprefix("--").partition("=")[0] for token in given.split() if token.startswith("--")]
    text = f"vLLM refuses its options: unrecognized arguments: {given}"
    near = [match for name in names for match in difflib.get_close_matches(name, known_options, n=1)]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"{text}{hint}; they come from args or command"


def _of_a_known_cause(ended: Exit, lines: Sequence[str], *, was_ready: bool) -> Diagnosis | None:
    if ended.signal == signal.SIGKILL:
        return None
    text = "\n".join(lines)
    for cause in CAUSES:
        if (cause.while_serving or not was_ready) and (found := cause.find(text)):
            said = {name: " ".join((value or "").split()) for name, value in found.groupdict().items()}
            return Diagnosis(cause.reason, cause.message.format(**said), cause.changes(said))
    return None


def _of_the_exit(ended: Exit, lines: Sequence[str], successes: Container[str], when: str) -> Diagnosis:
    if ended.signal == signal.SIGKILL:
        return Diagnosis(Reason.KILLED, f"killed {when}, perhaps by the kernel for want of memory: see dmesg")
    cause = _last_error(lines, successes)
    hint = "; often /dev/shm is too small" if ended.signal == signal.SIGBUS else ""
    return Diagnosis(Reason.CRASHED, f"the engine ended {when} ({ended}){hint}{': ' if cause else ''}{cause}")


def _last_error(lines: Sequence[str], successes: Container[str]) -> str:
    """The last line that names an error which does not follow from another one; else the last that is no success."""
    error = last = ""
    for whole in reversed(lines):
        line = whole.strip()
        last = last or ("" if whole in successes else line)
        if _ERROR.search(line):
            error = error or line
            if not _FOLLOW_UP.search(line):
                return line
    return error or last


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
