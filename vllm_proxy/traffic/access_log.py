"""The access log: one line for each inference request, without bodies and keys.

Lines are queued, and written in batches ten times a second: a write for each would cost more than the relay itself. A
SIGKILL loses the last tenth of a second.
"""

from typing import Protocol

from vllm_proxy.runtime import logline
from vllm_proxy.runtime.logline import Form
from vllm_proxy.traffic.call import Call


class Lines(Protocol):
    """What gathers lines, to be written soon."""

    def queue(self, text: str, /) -> object:
        """Take whole lines, without waiting."""


class AccessLog:
    """Writes to `lines`."""

    def __init__(self, lines: Lines, form: Form) -> None:
        self._lines = lines
        self._form = form

    def write(self, call: Call) -> None:
        """One request has ended."""
        seconds = call.ended_at - call.started_at
        first = call.first_byte_at - call.started_at if call.first_byte_at else None
        if self._form == "json":
            self._lines.queue(logline.as_json("request", "info", _fields(call, seconds, first)))
            return
        head = logline.head(self._form, "info")
        if self._form == "native":
            head += logline.marked(call.instance, call.model, call.request_id.decode())
        self._lines.queue(
            f"{head}request id={call.request_id.decode()} engine_id={_engine_id(call) or '-'} "
            f"{call.request.method} {call.route} key={_key(call) or '-'} model={call.model or '-'} "
            f"instance={call.instance or '-'} status={call.status} bytes={call.bytes_out} seconds={seconds:.4f} "
            f"first_byte={'-' if first is None else f'{first:.4f}'}\n"
        )


def _engine_id(call: Call) -> str | None:
    """The id that the engine got; of a request that was sent again, the last one."""
    return call.engine_id.decode() if call.instance else None


def _key(call: Call) -> str | None:
    """The name of the key that it was sent with."""
    return None if call.caller.is_anonymous else call.caller.name


def _fields(call: Call, seconds: float, first: float | None) -> dict[str, object]:
    return {
        "id": call.request_id.decode(),
        "engine_id": _engine_id(call),
        "method": call.request.method,
        "route": call.route,
        "key": _key(call),
        "model": call.model or None,
        "instance": call.instance or None,
        "status": call.status,
        "bytes": call.bytes_out,
        "seconds": round(seconds, 4),
        "first_byte": None if first is None else round(first, 4),
    }
