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
_MOST_YOUNG = 32  # values in a pattern of their own: each start of an engine has a new one, and a thousand take 40 ms
_PIECE = 2**16  # characters that are looked at in a row: no other thread runs meanwhile


class Masking:
    """The secrets of one daemon."""

    def __init__(self) -> None:
        self._configured: frozenset[str] = frozenset()
        self._held = Counter[str]()  # how many engines have each
        self._former: dict[str, None] = {}  # the last one that was in use is the last
        self._lock = threading.Lock()  # of those three; never for longer than it takes to count
        self._known: frozenset[str] = frozenset()  # those that the first pattern finds
        self._young: frozenset[str] = frozenset()  # those that the second one finds
        self._patterns: tuple[re.Pattern[str], ...] = ()  # always looked at together
        self._learning = threading.Lock()  # of what is known

    def configure(self, values: Iterable[str]) -> None:
        """The configuration has these now. Of thousands it takes a while."""
        with self._lock:
            before, self._configured = self._configured, frozenset(values)
            self._forget(before - self._configured)
        self.learn()

    def note(self, values: Iterable[str]) -> None:
        """These may stand in what engines have written. Takes a while, too."""
        with self._lock:
            self._forget(values)
        self.learn()

    @contextlib.contextmanager
    def held(self, values: Iterable[str]) -> Iterator[None]:
        """An engine has these while the block lasts: `learn` them first thing in it. Neither end of it has to wait."""
        mine = frozenset(values)
        with self._lock:
            self._held.update(mine)
        try:
            yield
        finally:
            with self._lock:
                self._held -= Counter(mine)
                self._forget(mine)

    def learn(self) -> None:
        """Find all that are in use from here on. Takes up to a tenth of a second of computing: for a thread."""
        with self._learning:
            with self._lock:
                wanted = self._configured | self._held.keys() | self._former.keys()
            new = wanted - self._known - self._young
            if not new:
                return
            young = self._young | new
            if self._patterns and len(young) <= _MOST_YOUNG:
                pattern = secrets.pattern(young)
                if pattern is None or not self._overlaps(pattern, young):
                    self._young, self._patterns = young, (self._patterns[0], *([pattern] if pattern else ()))
                    return
            self._known, self._young = frozenset(wanted), frozenset()
            found = secrets.pattern(wanted)
            self._patterns = (found,) if found else ()

    def mask(self, text: str) -> str:
        """The text with "***" for each secret of 8 characters and more."""
        for pattern in self._patterns:
            if len(text) <= _PIECE:
                text = pattern.sub(secrets.HIDDEN, text)
            else:
                text = "".join(pattern.sub(secrets.HIDDEN, piece) for piece in _pieces(text))
        return text

    def _overlaps(self, pattern: re.Pattern[str], young: Iterable[str]) -> bool:
        """Whether a young value, which `pattern` finds, has an older one in it, or the other way round.

        One pattern finds the longer of two; of two in a row the first may leave a part of it to be read.
        """
        return any(map(self._patterns[0].search, young)) or any(map(pattern.search, self._known))

    def _forget(self, values: Iterable[str]) -> None:
        for value in values:
            self._former.pop(value, None)
            self._former[value] = None
        for value in list(self._former)[:-_MOST_FORMER]:
            del self._former[value]


def _pieces(text: str) -> Iterator[str]:
    """Whole lines, as many as fit; no secret that is looked for goes beyond one."""
    begin = 0
    while begin < len(text):
        end = text.rfind("\n", begin, begin + _PIECE) + 1
        if end <= begin:
            end = text.find("\n", begin) + 1 or len(text)
        yield text[begin:end]
        begin = end
