"""What commands print: results on stdout, reasons on stderr, nothing that fails in silence.

An error that a user can cause is one sentence on stderr, never a traceback.
"""

import contextlib
import sys
from collections.abc import Sequence

from vllm_proxy.errors import OutputError


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
        msg = f"cannot write to the standard output: {error.strerror}"
        raise OutputError(msg) from error


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
