"""Allocates ports for engines. A port is handed out only when nothing else holds it.

Closed connections of an earlier engine (TIME_WAIT) do not hinder vLLM, which binds with SO_REUSEADDR. A bind cannot
tell them from another vLLM that loads, bound but not listening; so the kernel is asked for such sockets.

An engine imports for a minute before it binds, and two that bind the same port with SO_REUSEADDR both succeed: who
listens second stays alive and says nothing. So a daemon claims each port that it has handed out, for other daemons of
this network namespace. Of other programs remains a race, which vLLM reports (`port_in_use`).
"""

import asyncio
import errno
import socket
import struct
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from enum import Enum

from vllm_proxy.engine.sock_diag import BOUND_ALONE, tcp_sockets
from vllm_proxy.errors import VllmProxyError


class NoPortError(VllmProxyError):
    """Every port of the range is taken."""


class ClosingError(NoPortError):
    """There is none now, but there will be one soon."""


class Use(Enum):
    """Of a port, by others than our engines."""

    FREE = "free"
    CLOSING = "closing"  # nothing but closed connections, which do not hinder vLLM
    UNKNOWN = "unknown"  # closed connections, or a vLLM that loads
    TAKEN = "taken"


HOST = "127.0.0.1"  # where engines of this machine listen
_SOON_SECONDS = 90.0  # the kernel remembers closed connections for 60
_POLL_SECONDS = 0.5
# An abstract socket: it belongs to the network namespace, as ports do, and is gone with the process that holds it.
_CLAIM = "\0vllm-proxy/engine-port/{}"


class Ports:
    """The ports for engines, of `HOST`."""

    def __init__(self, first: int, last: int, reserved: Collection[int]) -> None:
        self._range = range(first, last + 1)
        self._reserved = frozenset(reserved)  # the daemon's own
        self._held: dict[int, socket.socket | None] = {}  # with the claim, where there is one
        self.close = weakref.finalize(self, _close, self._held)  # gives up every claim, as the end of the process does

    def set_range(self, first: int, last: int) -> None:
        """Another range, for engines that are started from now on."""
        self._range = range(first, last + 1)

    def take(self) -> int:
        """The lowest free port, or where there is none, one that has closed connections alone.

        Raises:
            ClosingError: when there is none, but one might be that has closed connections.
            NoPortError: when there is none.

        """
        ours = [port for port in self._range if port not in self._held and port not in self._reserved]
        for port in ours:
            if is_free(port) and self._claimed(port):
                return port
        uses = defaultdict[Use, list[int]](list)
        for port in ours:
            uses[use_of(port)].append(port)
        for port in uses[Use.FREE] + uses[Use.CLOSING]:
            if self._claimed(port):
                return port
        if unknown := uses[Use.UNKNOWN]:
            raise ClosingError(f"port {unknown[0]} is taken, perhaps by closed connections alone, for a minute")
        msg = f"cannot find a free port in {self._range.start} to {self._range.stop - 1}: set engine.port_end"
        raise NoPortError(msg)

    async def take_or_wait(self, on_wait: Callable[[str | None], None]) -> int:
        """As `take`, but wait where that helps; `on_wait`: called with what for, and with None when it is over.

        Raises:
            NoPortError: when there is none, and waiting does not help.

        """
        loop, waits = asyncio.get_running_loop(), False
        deadline = loop.time() + _SOON_SECONDS
        while True:
            try:
                port = self.take()
            except ClosingError as error:
                if loop.time() > deadline:
                    raise
                if not waits:
                    on_wait(str(error))
                waits = True
                await asyncio.sleep(_POLL_SECONDS)
            else:
                if waits:
                    on_wait(None)
                return port

    def reserve(self, port: int) -> None:
        """Mark a port as allocated: an engine of an earlier daemon has it."""
        if not self._claimed(port):
            self._held[port] = None

    def release(self, port: int) -> None:
        """The engine is gone: its port may be allocated again."""
        if claim := self._held.pop(port, None):
            claim.close()

    def _claimed(self, port: int) -> bool:
        """Whether it is ours now: no other daemon of ours has handed it out."""
        claim = None
        try:
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            claim.bind(_CLAIM.format(port))
        except OSError as error:
            if claim:
                claim.close()
            if error.errno == errno.EADDRINUSE:
                return False
            claim = None  # no such sockets on this system, or no descriptor left: an adoption does not fail for that
        self._held[port] = claim
        return True


def _close(held: Mapping[int, socket.socket | None]) -> None:
    for claim in held.values():
        if claim:
            claim.close()


def is_free(port: int) -> bool:
    """Whether nothing at all has a port, closed connections among it."""
    with socket.socket() as ours:
        return _bind(ours, port)


def use_of(port: int) -> Use:
    """What others do with a port.

    A bind without SO_REUSEADDR is the only one that a vLLM which loads (bound, not listening) keeps from binding. It
    fails beside closed connections too: the kernel is then asked what is bound.
    """
    if is_free(port):
        return Use.FREE
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if not _bind(ours, port):
            return Use.TAKEN  # somebody listens, or would not share
        try:
            bound = len(tcp_sockets(BOUND_ALONE, port))
        except (OSError, struct.error):
            bound = 0
    if bound == 0:
        return Use.UNKNOWN  # ours is bound: a kernel that does not say so says nothing of others (before Linux 6.8)
    return Use.CLOSING if bound == 1 else Use.TAKEN


def _bind(probe: socket.socket, port: int) -> bool:
    try:
        probe.bind((HOST, port))
    except OSError as error:
        if error.errno in {errno.EADDRINUSE, errno.EACCES}:
            return False
        raise
    return True
