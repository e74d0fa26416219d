"""`logs`: prints the output of a model's engines. With --follow it goes on as more comes."""

import argparse
import json
import os

from vllm_proxy import places
from vllm_proxy.commands.outcome import OK
from vllm_proxy.commands.output import write
from vllm_proxy.connection import connected, path_of


def run(options: argparse.Namespace) -> int:
    """With --follow until the daemon stops."""
    path = f"{path_of(options.model)}/logs?lines={options.lines}{'&follow=1' if options.follow else ''}"
    with connected(places.find(os.environ, vars(options))) as daemon:
        for raw in daemon.lines(path):
            line = raw.decode(errors="replace")
            if options.follow:
                if not line.startswith("data: "):
                    continue
                line = line.removeprefix("data: ")
            write(json.dumps({"line": line}) if options.json else line)
    return OK
