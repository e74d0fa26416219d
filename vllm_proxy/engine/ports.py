"""Which engine has which port. Its one rule: a port is handed out only when nothing else has it."""

import errno
import socket
from collections.abc import Collection

from vllm_proxy.errors import VllmProxyError


class NoPortError(VllmProxyError):
    """Every port of the range is taken."""


class Ports:
    """The ports for engines, on 127.0.0.1."""

    def __init__(self, first: int, last: int, reserved: Collection[int]) -> None:
        self._range = range(first, last + 1)
        self._reserved = frozenset(reserved)  # the daemon's own
        self._held: set[int] = set()

    def use(self, first: int, last: int) -> None:
        """Another range, for engines that are started from now on."""
        self._range = range(first, last + 1)

    def take(self) -> int:
        """The lowest free port.

        Raises:
            NoPortError: when there is none.

        """
        for port in self._range:
            if port not in self._held and port not in self._reserved and _is_free(port):
                self._held.add(port)
                return port
        msg = f"cannot find a free port in {self._range.start} to {self._range.stop - 1}: set engine.port_end"
        raise NoPortError(msg)

    def hold(self, port: int) -> None:
        """An engine of an earlier daemon has this port already."""
        self._held.add(port)

    def give_back(self, port: int) -> None:
        """The engine is gone."""
        self._held.discard(port)


def _is_free(port: int) -> bool:
    """Bind without SO_REUSEADDR, the only probe that sees a vLLM which loads: bound, but not listening yet.

    A port in TIME_WAIT counts as taken too; the next one serves as well.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return False
            raise
    return True
