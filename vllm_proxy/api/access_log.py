"""One line a request: no bodies, no keys. Its one rule: gathered, and written ten times a second.

A write for each request would cost more than the relay itself. What is lost at a SIGKILL is a tenth of a second.
"""

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal, TextIO

import msgspec

from vllm_proxy.api.call import Call

type Form = Literal["text", "json", "journal"]
type Schedule = Callable[[float, Callable[[], None]], object]

_FLUSH_SECONDS = 0.1


class AccessLog:
    """Writes to `stream`. `schedule` is the event loop's `call_later`."""

    def __init__(self, stream: TextIO, form: Form, schedule: Schedule) -> None:
        self._stream = stream
        self._form = form
        self._schedule = schedule
        self._lines: list[str] = []

    def write(self, call: Call) -> None:
        """One request has ended."""
        if not self._lines:
            self._schedule(_FLUSH_SECONDS, self.flush)
        seconds = time.monotonic() - call.started_at
        first = call.first_byte_at - call.started_at if call.first_byte_at else None
        if self._form == "json":
            self._lines.append(_json(call, seconds, first))
            return
        head = "<6>" if self._form == "journal" else f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} [info     ] "
        self._lines.append(
            f"{head}request id={call.request_id.decode()} engine_id={_engine_id(call) or '-'} "
            f"{call.request.method} {call.route} model={call.model or '-'} "
            f"instance={call.instance or '-'} status={call.status} bytes={call.bytes_out} seconds={seconds:.4f} "
            f"first_byte={'-' if first is None else f'{first:.4f}'}\n"
        )

    def flush(self) -> None:
        """Write what was gathered. A log that cannot be written must not end requests."""
        lines, self._lines = self._lines, []
        with contextlib.suppress(OSError, ValueError):
            self._stream.write("".join(lines))
            self._stream.flush()


def _engine_id(call: Call) -> str | None:
    """The id that the engine got; of a request that was sent again, the last one."""
    return call.engine_id.decode() if call.instance else None


def _json(call: Call, seconds: float, first: float | None) -> str:
    fields = {
        "event": "request",
        "level": "info",
        "timestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
        "id": call.request_id.decode(),
        "engine_id": _engine_id(call),
        "method": call.request.method,
        "route": call.route,
        "model": call.model or None,
        "instance": call.instance or None,
        "status": call.status,
        "bytes": call.bytes_out,
        "seconds": round(seconds, 4),
        "first_byte": None if first is None else round(first, 4),
    }
    return msgspec.json.encode(fields).decode() + "\n"
