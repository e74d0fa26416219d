"""By which listening socket a client came: what that says of who the client may be.

For access rules, which are per listener and not for the daemon as a whole: one that others reach does not close the one
on loopback, nor does loopback open the other. Sockets are opened in `listen.py`; a connection knows its own listener.
"""

from dataclasses import dataclass
from enum import StrEnum

from vllm_proxy.domain.hosts import is_loopback


class Kind(StrEnum):
    """Who can connect there."""

    CONTROL = "control"  # the control socket: the daemon's own user, by the mode of its file
    LOOPBACK = "loopback"  # a port that is bound to a loopback address: whatever runs on this machine
    ELSEWHERE = "elsewhere"  # all others: any other address, and Unix sockets, which may be a web server's way here


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening socket, as its connections see it. `host`: the address it is bound to; "" for a Unix socket."""

    kind: Kind = Kind.ELSEWHERE
    host: str = ""

    @classmethod
    def at(cls, host: str) -> "Listener":
        """The listener that is bound to an address. 0.0.0.0 and :: are no loopback, whoever connects to them."""
        return cls(Kind.LOOPBACK if is_loopback(host) else Kind.ELSEWHERE, host)


CONTROL = Listener(Kind.CONTROL)
