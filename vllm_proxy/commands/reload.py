"""`reload`: has the running daemon read its file and its certificate again, and prints what changed or is wrong.

With `--wait` it returns once every model is as the file asks, whether this or an earlier look at the file found that.
"""

import argparse
import json
import os

from vllm_proxy import places
from vllm_proxy.commands.changes import lines_of
from vllm_proxy.commands.outcome import CONFIG_INVALID, OK, refused_by_daemon
from vllm_proxy.commands.output import complain, write
from vllm_proxy.commands.screen import Screen
from vllm_proxy.connection import connected, file_of
from vllm_proxy.errors import RefusedError


def run(options: argparse.Namespace) -> int:
    """Returns when the verdict is known; a `CommandError` says which models are not as asked, and why."""
    where = places.find(os.environ, vars(options))
    with connected(where) as daemon:
        try:
            done = daemon.request("POST", "/config/reload")
            now = daemon.request("GET", "/health")["config"]
            error = now["certificate_error"]
            if error is not None:
                complain(f"the certificate before stays in force: {error}")
            if options.json:
                write(json.dumps({key: done[key] for key in ("changes", "keys", "settings", "warnings")}))
            else:
                write("\n".join(lines_of(done, Screen.of_stdout(), now["pending_restart"])))
            if options.wait:
                daemon.request("POST", f"/config/reload?wait=1&timeout={options.timeout}")
        except RefusedError as refused:
            return refused_by_daemon(refused, options, file_of(daemon))
    return OK if error is None else CONFIG_INVALID
