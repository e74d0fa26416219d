"""Which requests for inference are in progress, and the last that have ended: for `/requests`, and to cancel one.

Keeps the calls themselves, and makes nothing of them before somebody asks: a request costs a place in a dictionary and
one in a ring. What belongs to a client's connection is given up as a call ends: its head, its key, its body.
"""

from collections import deque
from collections.abc import Iterable, Iterator

from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.front import client_of

KEPT = 1000  # requests that have ended


class Requests:
    """Of one daemon."""

    def __init__(self) -> None:
        self.active: dict[Call, None] = {}  # in the order in which they came
        self.recent: deque[Call] = deque(maxlen=KEPT)  # the last one to end comes last

    def end(self, call: Call) -> None:
        """It is over, and its outcome is known. It has no request, no head and no prompt from here on."""
        del self.active[call]
        call.peer = call.request._transport_peername  # noqa: SLF001 - what `remote` is made of, without making it
        call.request = call.head = call.forwarded = None  # type: ignore[assignment] # `del` takes ten times as long
        call.prompt = None  # which may be a part of its body
        self.recent.append(call)

    def in_progress(self, request_id: str) -> list[Call]:
        """Those in progress that have this id, the client's or the engine's: clients may give several the same."""
        return list(_called(request_id, self.active))

    def ended(self, request_id: str) -> Iterator[Call]:
        """Those that have ended and have this id, the last one first."""
        return _called(request_id, reversed(self.recent))


def _called(request_id: str, calls: Iterable[Call]) -> Iterator[Call]:
    wanted = request_id.encode(errors="replace")
    return (call for call in calls if wanted in {call.request_id, call.engine_id})


def cancel(call: Call) -> None:
    """End a request in progress: its engine stops working on it, and its client can tell that it is not whole."""
    client_of(call.request).revoke(
        call, RequestError("request_cancelled", "cannot finish this: it was cancelled by who operates this daemon")
    )
