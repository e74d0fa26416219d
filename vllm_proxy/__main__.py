"""`python -m vllm_proxy` and the console script `vllm-proxy`.

Its one rule: however the streams are that it was started with, a command does its work and ends with its status.
"""

import contextlib
import io
import os
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows no such letter; stderr does so itself
    status = _run()
    sys.exit(_flushed(status))


def _run() -> int:
    try:
        from vllm_proxy.cli import run  # noqa: PLC0415 - takes a second, in which Ctrl-C must not be a traceback

        return run(sys.argv[1:])
    except SystemExit as ended:  # of argparse
        return ended.code if isinstance(ended.code, int) else 0
    except KeyboardInterrupt:
        return 1


def _open_missing_streams() -> None:
    """A standard descriptor that is closed would go to the next file that is opened, and the output into that."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.dup2(descriptor, number)
            if descriptor != number:
                os.close(descriptor)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - kept open


def _flushed(status: int) -> int:
    """The status, once all that was printed is written; what cannot be is dropped, or Python would complain of it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop(sys.stdout.fileno())
        if not status and not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                print(f"vllm-proxy: cannot write to the standard output: {error.strerror}", file=sys.stderr)
        status = status or 1
    try:
        sys.stderr.flush()
    except OSError:
        _drop(sys.stderr.fileno())
    return status


def _drop(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


if __name__ == "__main__":
    main()
