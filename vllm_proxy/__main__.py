"""Entry point: `python -m vllm_proxy` and the console script `vllm-proxy`.

Makes sure that a command runs and exits with its status even where the standard streams are closed, full or broken
pipes. Commands are in `cli`, which is imported late, since that takes a second. Nothing else belongs here.
"""

import contextlib
import io
import os
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # for characters that the terminal's encoding lacks; stderr does that itself
    status = _run()
    sys.exit(_flushed(status))


def _run() -> int:
    try:
        from vllm_proxy.cli import run  # noqa: PLC0415 - takes a second: Ctrl-C in it must not be a traceback

        return run(sys.argv[1:])
    except SystemExit as ended:  # of argparse
        return ended.code if isinstance(ended.code, int) else 0
    except KeyboardInterrupt:
        return 1


def _open_missing_streams() -> None:
    """Open closed standard streams: their descriptors would be reused by the next file, and output written into it.

    Stdout only for reading: who writes there is told that it cannot be done, as where it is full.
    """
    streams = (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY))
    for number, (name, mode, access) in enumerate(streams):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, access)
            os.dup2(descriptor, number)
            if descriptor != number:
                os.close(descriptor)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - kept open


def _flushed(status: int) -> int:
    """The status, after flushing; what cannot be written is dropped, since Python would report it again at exit."""
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
