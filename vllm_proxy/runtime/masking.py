"""Hides secrets in texts: lines of engines, sentences about failures, the daemon's log.

Knows the values that are in use, those of the configuration and those that engines were given, and the last ones that
were. From any thread. What a secret is decides `domain/secrets.py`.
"""

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

from vllm_proxy.domain import secrets

_MOST_FORMER = 1000  # values that are in use no more: engines may have written them a while ago
_PIECE = 2**16  # characters that are looked at in a row: no other thread runs meanwhile


class Masking:
    """The secrets of one daemon."""

    def __init__(self) -> None:
        self._configured: frozenset[str] = frozenset()
        self._held = Counter[str]()  # how many engines have each
        self._former: dict[str, None] = {}  # the last one that was in use is the last
        self._known: frozenset[str] = frozenset()  # those that the pattern finds
        self._pattern: re.Pattern[str] | None = None
        self._lock = threading.Lock()

    def configure(self, values: Iterable[str]) -> None:
        """The configuration has these now. Of thousands it takes a while."""
        with self._lock:
            before, self._configured = self._configured, frozenset(values)
            self._forget(before - self._configured)
            self._learn()

    def note(self, values: Iterable[str]) -> None:
        """These may stand in what engines have written."""
        with self._lock:
            self._forget(values)
            self._learn()

    @contextlib.contextmanager
    def held(self, values: Iterable[str]) -> Iterator[None]:
        """An engine has these while the block lasts."""
        mine = frozenset(values)
        with self._lock:
            self._held.update(mine)
            self._learn()
        try:
            yield
        finally:
            with self._lock:
                self._held -= Counter(mine)
                self._forget(mine)

    def mask(self, text: str) -> str:
        """The text with "***" for each secret of 8 characters and more."""
        pattern = self._pattern
        if pattern is None:
            return text
        if len(text) <= _PIECE:
            return pattern.sub(secrets.HIDDEN, text)
        return "".join(pattern.sub(secrets.HIDDEN, piece) for piece in _pieces(text))

    def _forget(self, values: Iterable[str]) -> None:
        for value in values:
            self._former.pop(value, None)
            self._former[value] = None
        for value in list(self._former)[:-_MOST_FORMER]:
            del self._former[value]

    def _learn(self) -> None:
        wanted = self._configured | self._held.keys() | self._former.keys()
        if not wanted <= self._known:
            self._known = frozenset(wanted)
            self._pattern = secrets.pattern(wanted)


def _pieces(text: str) -> Iterator[str]:
    """Whole lines, as many as fit; no secret that is looked for goes beyond one."""
    begin = 0
    while begin < len(text):
        end = text.rfind("\n", begin, begin + _PIECE) + 1
        if end <= begin:
            end = text.find("\n", begin) + 1 or len(text)
        yield text[begin:end]
        begin = end
