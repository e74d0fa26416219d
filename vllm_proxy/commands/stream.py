"""Server-sent events of the running daemon, as commands read them: each with its kind, its data decoded."""

import json
from collections.abc import Iterator
from typing import Any

from vllm_proxy.connection import Connection


def events_of(daemon: Connection, path: str) -> Iterator[tuple[str, Any]]:
    """(its kind, its data) of each event, as it comes; "" where nothing has happened for a while."""
    kind, data = "", ""
    for raw in daemon.lines(path):
        line = raw.decode(errors="replace")
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
        elif line == ":":
            yield "", None
        elif not line and kind:
            yield kind, json.loads(data)
            kind, data = "", ""
