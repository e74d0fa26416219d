"""`serve`: runs the daemon in the foreground. Also what `demo` shares with it: the log, the standard streams."""

import argparse
import contextlib
import os
from collections.abc import Callable
from typing import TextIO, cast

import structlog
import uvloop

from vllm_proxy import daemon, logsetup, settings
from vllm_proxy.commands.outcome import FAILED, OK, outcome_of
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.runtime.threads import DaemonLoop

log = structlog.get_logger()

_STDERR = 2


def run(options: argparse.Namespace) -> int:
    """Until it is stopped."""
    return with_log(_serve, options)


def _serve(options: argparse.Namespace) -> int:
    loaded = settings.load(os.environ, vars(options))
    config = daemon.read_config(loaded)
    serving = daemon.serve(loaded, config, set_up_log(options, engines=True))
    uvloop.run(serving, loop_factory=DaemonLoop)
    return OK


def with_log(work: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a daemon whose log, and all that Python itself would write, goes through `options.writer`."""
    _reserve_standard_descriptors()
    with LogWriter(_STDERR) as writer, contextlib.redirect_stderr(cast("TextIO", writer)):
        options.writer = writer
        try:
            return outcome_of(work, options)
        except Exception:  # not left to Python, which would block on a stderr that nobody reads
            log.exception("the daemon ends by a fault of its own")
            return FAILED


def _reserve_standard_descriptors() -> None:
    """Open closed ones: the next socket would reuse their number, and the log would be written into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(descriptor)


def set_up_log(options: argparse.Namespace, *, engines: bool) -> logsetup.Output:
    """Of a daemon. `engines`: their output is part of it, where the level includes it."""
    form = logsetup.with_fields(logsetup.resolve(options.log_format, os.environ), options.writer, os.environ)
    logsetup.set_up(options.log_level, form)
    logsetup.capture(options.writer, form)
    talks = options.log_level in {"debug", "info"}
    output = logsetup.Output(options.writer, form, requests=talks, engines=engines and talks)
    options.writer.mask = output.masking.mask
    return output
