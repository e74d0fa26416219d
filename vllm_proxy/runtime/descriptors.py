"""The limit of open files: raised for the daemon, with a reserve of descriptors for work that must not fail.

Clients can use up all descriptors but the reserve, which is for ending an engine and putting it on record (`spare`).
Engines get the original soft limit: programs that use `select` fail beyond it.
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
    """The reserve: no descriptor can use it while the soft limit is below the hard one."""

    def __init__(self) -> None:
        self._users = 0
        self._soft = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, it may be used: for what must not fail. On the event loop's thread only."""
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


def set_soft_limit(pid: int, soft: int) -> None:
    """Set the soft limit of a child that does nothing yet."""
    with contextlib.suppress(OSError, ValueError):  # it keeps the daemon's
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _set(soft: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # it stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
