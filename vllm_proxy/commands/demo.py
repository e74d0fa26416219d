"""`demo`: runs the daemon with two small real models on this machine's CPU, which the package `demo` prepares."""

import argparse
import os

import uvloop

from vllm_proxy import daemon, demo
from vllm_proxy.commands.outcome import OK
from vllm_proxy.commands.serve import set_up_log, with_log
from vllm_proxy.runtime.threads import DaemonLoop


def run(options: argparse.Namespace) -> int:
    """Until it is stopped."""
    return with_log(_demo, options)


def _demo(options: argparse.Namespace) -> int:
    output = set_up_log(options, engines=False)
    loaded, config, watch = demo.prepare(os.environ, vars(options))
    uvloop.run(daemon.serve(loaded, config, output, watch), loop_factory=DaemonLoop)
    return OK
