"""What commands print: results on stdout, reasons on stderr, nothing that fails in silence.

An error that a user can cause is one sentence on stderr, never a traceback.
"""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Sequence

from vllm_proxy.errors import OutputError

_STDOUT = 1


def ensure_output() -> None:
    """For who is about to make what can be told but once.

    Raises:
        OutputError: stdout was closed, see `__main__`; whether there is room can only be found out by writing.

    """
    if fcntl.fcntl(_STDOUT, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise unwritable(errno.EBADF)


def write(text: str) -> None:
    """Print at once, since whoever reads may go or have no room.

    Raises:
        OutputError: it cannot be written; a `BrokenPipeError` where nobody reads any more.

    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable(error.errno) from error


def unwritable(number: int | None) -> OutputError:
    """What is told of stdout and this `errno`."""
    why = "it is closed" if number == errno.EBADF else os.strerror(number or errno.EIO)
    return OutputError(f"cannot write to the standard output: {why}")


def discard(_text: str) -> None:
    """With --json the result alone is printed."""


def complain(text: str, mark: str = "") -> None:
    """Report why a command failed, behind `mark`; where stderr cannot be written, the exit status has to do."""
    with contextlib.suppress(OSError):
        print(f"{mark}vllm-proxy: {text}", file=sys.stderr, flush=True)


def complain_lines(lines: Sequence[str]) -> None:
    """Each as it is: editors jump to `FILE:LINE:`."""
    with contextlib.suppress(OSError):
        print("\n".join(lines), file=sys.stderr, flush=True)
