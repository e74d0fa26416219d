"""Entry point: `python -m vllm_proxy` and the console script `vllm-proxy`.

Makes sure that a command runs and exits with its status even where the standard streams are closed, full or broken
pipes, and that a daemon keeps its word about signals from its first moment. Commands are in `cli`, which is imported
late, since that takes a second. Nothing else belongs here.
"""

import io
import os
import signal
import sys
from types import FrameType

# Little is imported above: a signal that comes before `_handle_signals` ends a daemon as any program.
_DAEMONS = ("serve", "demo")


def main() -> None:
    """Run the command line and exit with its status."""
    if sys.argv[1:] and sys.argv[1] in _DAEMONS:
        _handle_signals()
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # for characters that the terminal's encoding lacks; stderr does that itself
    status = _run()
    sys.exit(_flushed(status))


def _handle_signals() -> None:
    """Until `daemon` does: SIGHUP asks for what the start does anyway, SIGTERM and SIGINT end it with status 0.

    Handlers, since programs that are started inherit what is ignored. So that every signal can come, and exits of
    children be seen, what the parent has blocked or ignored is neither.
    """
    for number, handler in ((signal.SIGHUP, _ignore), (signal.SIGTERM, _end), (signal.SIGINT, _end)):
        signal.signal(number, handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass


def _end(_number: int, _frame: FrameType | None) -> None:
    """End by unwinding, which closes and ends what there is by now; a second signal does not wait for that."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_at_once)
    raise SystemExit(0)


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    os._exit(0)


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
            try:  # noqa: SIM105 - contextlib takes three times as long to import as all else here
                print(f"vllm-proxy: cannot write to the standard output: {error.strerror}", file=sys.stderr)
            except OSError:
                pass
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
