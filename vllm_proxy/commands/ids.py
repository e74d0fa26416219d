"""`ids`: prints the id of each model, one a line; for completion by shells; none where no daemon runs."""

import argparse
import os

from vllm_proxy import places
from vllm_proxy.commands.outcome import OK
from vllm_proxy.commands.output import write
from vllm_proxy.connection import connected
from vllm_proxy.errors import VllmProxyError


def run(options: argparse.Namespace) -> int:
    """Of the models, not of their aliases."""
    try:
        with connected(places.find(os.environ, vars(options))) as daemon:
            models = daemon.request("GET", "/models")["models"]
    except VllmProxyError:
        return OK
    if models:
        write("\n".join(model["id"] for model in models))
    return OK
