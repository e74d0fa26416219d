"""Allocates ports for engines. A port is handed out only when nothing else holds it.

Closed connections of an earlier engine (TIME_WAIT) do not hinder vLLM, which binds with SO_REUSEADDR. A bind cannot
tell them from another vLLM that loads, bound but not listening; so the kernel is asked for such sockets. Between this
and vLLM's own bind remains a race, which vLLM reports (`port_in_use`).
"""

import asyncio
import errno
import socket
import struct
from collections.abc import Callable, Collection
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


class Ports:
    """The ports for engines, of `HOST`."""

    def __init__(self, first: int, last: int, reserved: Collection[int]) -> None:
        self._range = range(first, last + 1)
        self._reserved = frozenset(reserved)  # the daemon's own
        self._held: set[int] = set()

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
        free = next((port for port in ours if is_free(port)), None)
        uses: dict[Use, int] = {}  # the lowest port of each
        for port in ours if free is None else ():
            uses.setdefault(use_of(port), port)
        if (taken := free or uses.get(Use.FREE, uses.get(Use.CLOSING))) is not None:
            self._held.add(taken)
            return taken
        if Use.UNKNOWN in uses:
            raise ClosingError(f"port {uses[Use.UNKNOWN]} is taken, perhaps by closed connections alone, for a minute")
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
        self._held.add(port)

    def release(self, port: int) -> None:
        """The engine is gone: its port may be allocated again."""
        self._held.discard(port)


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
