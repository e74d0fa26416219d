"""Open files: as many as the daemon may have, and some of them for its own work alone.

Its one rule: whoever has taken all descriptors cannot keep an engine from being ended or put on record.
"""

import contextlib
import resource
from collections.abc import Iterator

_SPARE = 64
_SPARE_SHARE = 4  # of a small limit no more than a fourth


def raise_limit() -> int:
    """Take what the hard limit allows but for the spare ones; returns the soft limit that the daemon was given.

    A stream takes two descriptors; the usual soft limit is 1,024. Engines are to get that one back: a program that
    still uses `select` fails beyond it.
    """
    given, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _set(hard - min(_SPARE, hard // _SPARE_SHARE))
    return given


class _Spare:
    """The spare descriptors, which are as good as taken while the soft limit stands below the hard one."""

    def __init__(self) -> None:
        self._users = 0
        self._soft = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, they may be used: for what must not fail. On the event loop's thread alone."""
        if not self._users:
            self._soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            _set(hard)
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                _set(self._soft)


spare = _Spare()


def give(pid: int, soft: int) -> None:
    """Give a child that does nothing yet a soft limit of its own."""
    with contextlib.suppress(OSError, ValueError):  # it keeps the daemon's
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _set(soft: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # it stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
