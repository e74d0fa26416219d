"""Finds the prompt in the body of a request, and makes of it what `domain/balance.py` compares.

The pass that finds the `model` finds the prompt's members too, and decodes neither; marks are made only where there is
a choice between engines. What vLLM keeps apart has other marks: prompts of an adapter, and of a key that isolates its
own.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_proxy.domain.balance import MOST, Marks, marks_of
from vllm_proxy.traffic.routes import INFERENCE
from vllm_proxy.traffic.scan import Spans

NOTHING = msgspec.Raw(b"")
_EMPTY = frozenset({b"", b"null", b'""'})
_SESSION = b"x-session-id"
_RUNS_NONE = frozenset(route.path for route in INFERENCE if route.salted is None)


class Members(msgspec.Struct):
    """The members of a body that matter here, as they stand there; the others are skipped."""

    model: Any = None
    tools: msgspec.Raw = NOTHING
    system: msgspec.Raw = NOTHING  # of Anthropic's API
    instructions: msgspec.Raw = NOTHING  # of responses
    messages: msgspec.Raw = NOTHING
    prompt: msgspec.Raw = NOTHING
    input: msgspec.Raw = NOTHING
    prompt_cache_key: msgspec.Raw = NOTHING


NAMES = frozenset(name.encode() for name in Members.__struct_fields__) - {b"model"}


class Prompt:
    """Of one request, which is sent to one engine after the other where one fails."""

    __slots__ = ("_headers", "_members", "_salt", "known", "marks")

    def __init__(self, members: Members, salt: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """`salt`: its caller's; `headers`: as they came."""
        self._members: Members | None = members
        self._salt = salt
        self._headers = headers
        self.marks: Marks | None = None  # None: there was no choice yet
        self.known = 0  # so many of them the engine had before that was chosen last

    def of(self, adapter: str) -> Marks:
        """Its marks. `adapter`: the id of what it is for; "" the model itself."""
        if self.marks is None:
            found = self._members
            assert found is not None, "it is let go of with the marks at hand"
            # As a template puts them in order.
            parts = found.tools, found.system, found.instructions, found.messages, found.prompt, found.input
            text = b"".join(parts)
            sessions: Sequence[int] = ()
            if found.prompt_cache_key is not NOTHING or any(len(name) == len(_SESSION) for name, _ in self._headers):
                sessions = self._sessions(bytes(found.prompt_cache_key), adapter)
            if adapter or self._salt:
                text = b"\0".join((adapter.encode(), self._salt, text))
            self.marks = Marks(marks_of(text), min(len(text), MOST), sessions)
            self._members = None
        return self.marks

    def _sessions(self, key: bytes, adapter: str) -> list[int]:
        given = [value for name, value in self._headers if name.lower() == _SESSION and value]
        return [hash((each, adapter, self._salt)) for each in ([] if key in _EMPTY else [key]) + given]


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
