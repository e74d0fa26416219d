"""Finds the prompt in the body of a request, and makes of it what `domain/balance.py` compares.

The pass that finds the `model` finds the prompt's members too, and decodes neither; marks are made only where there is
a choice between engines. What vLLM keeps apart has other marks: prompts of an adapter, and of a key that isolates its
own.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import astuple

from vllm_proxy.domain.balance import MOST, marks_of
from vllm_proxy.traffic.routes import INFERENCE
from vllm_proxy.traffic.scan import Spans

NOTHING = msgspec.Raw(b"")
_EMPTY = frozenset({b"", b"null", b'""'})
_SESSION = b"x-session-id"
_SESSION_LINE = re.compile(rb"^x-session-id:[ \t]*+([^\r\n]+)", re.IGNORECASE | re.MULTILINE)
_MOST_SESSIONS = 4  # that headers name; more is nothing that a client means
_RUNS_NONE = frozenset(route.path for route in INFERENCE if route.salted is None)


class Members(msgspec.Struct):
    """The members of a body that matter here, as they stand there; the others are skipped."""

    model: Any = None
    # In the order in which a template puts them.
    tools: msgspec.Raw = NOTHING
    system: msgspec.Raw = NOTHING  # of Anthropic's API
    instructions: msgspec.Raw = NOTHING  # of responses
    messages: msgspec.Raw = NOTHING
    prompt: msgspec.Raw = NOTHING
    input: msgspec.Raw = NOTHING
    prompt_cache_key: msgspec.Raw = NOTHING


NAMES = frozenset(name.encode() for name in Members.__struct_fields__) - {b"model"}


_TEXT = slice(1, Members.__struct_fields__.index("prompt_cache_key"))


class Prompt:
    """Of one request, which is sent to one engine after the other where one fails."""

    __slots__ = ("_lines", "_members", "_salt", "known", "marks", "sessions", "size")

    # There once it is marked.
    marks: Sequence[int]
    sessions: Sequence[int]
    size: int
    known: int  # so many of its marks the engine had before that was chosen last

    def __init__(self, members: Members, salt: bytes, lines: bytes) -> None:
        """`salt`: its caller's; `lines`: of its head."""
        self._members: Members | None = members  # None: its marks are made
        self._salt = salt
        self._lines = lines

    @property
    def is_marked(self) -> bool:
        """Whether it was compared already: there was a choice."""
        return self._members is None

    def mark(self, adapter: str) -> None:
        """Make its marks, once. `adapter`: the id of what it is for; "" the model itself."""
        found = self._members
        if found is None:
            return
        self._members, self.known = None, 0  # the body may go
        text = b"".join(astuple(found)[_TEXT])
        key = found.prompt_cache_key
        self.sessions = ()
        if key is not NOTHING or self._lines.lower().find(_SESSION) >= 0:  # faster than `in`
            self.sessions = self._sessions(bytes(key), adapter)
        if adapter or self._salt:
            text = b"\0".join((adapter.encode(), self._salt, text))
        self.size = min(len(text), MOST)
        self.marks = marks_of(text)

    def _sessions(self, key: bytes, adapter: str) -> list[int]:
        names = _SESSION_LINE.findall(self._lines)
        return [hash((one, adapter, self._salt)) for one in (key, *names[:_MOST_SESSIONS]) if one not in _EMPTY]


def runs_one(path: str) -> bool:
    """Whether engines run a prompt on this route, which their caches then hold."""
    return path not in _RUNS_NONE


def members_at(body: bytes, spans: Spans) -> Members:
    """The members of a large body that stand at these places, with no more of each than is compared."""
    found = Members()
    for name in spans.keys() & NAMES:
        begin, end = spans[name]
        setattr(found, name.decode(), msgspec.Raw(body[begin : min(end, begin + MOST)]))
    return found
