"""The listening sockets: TCP ports for clients, and the Unix control socket for commands.

For `daemon`, which uses these or the sockets inherited from systemd (`systemd`). Enables the kernel's keep-alive
probes, so that clients which vanished are noticed. Serving connections is up to `traffic/front.py`.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_proxy.domain.config import Server
from vllm_proxy.domain.listener import CONTROL, Listener
from vllm_proxy.errors import StartupError
from vllm_proxy.settings import short_name

BACKLOG = 4096  # connections that wait to be accepted: a burst of clients must not wait for a retransmission


@dataclass(frozen=True, slots=True)
class Listeners:
    """Where requests come in."""

    clients: Sequence[socket.socket]
    commands: socket.socket

    def each(self) -> Iterator[tuple[socket.socket, Listener]]:
        """All of them, and what each says of its clients."""
        for listening in self.clients:
            yield (
                listening,
                Listener() if listening.family == socket.AF_UNIX else Listener.at(listening.getsockname()[0]),
            )
        yield self.commands, CONTROL

    def addresses(self) -> list[str]:
        """The addresses of `clients` that are on a network, be it loopback."""
        return [listener.getsockname()[0] for listener in self.clients if listener.family != socket.AF_UNIX]

    def ports(self) -> list[int]:
        """The ports that are taken by them."""
        return [listener.getsockname()[1] for listener in self.clients if listener.family != socket.AF_UNIX]


def listen(server: Server) -> list[socket.socket]:
    """Listening sockets for every address of the host.

    Raises:
        StartupError: when the port is taken or cannot be had.

    """
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets = [_bound(family, address) for family, _, _, _, address in dict.fromkeys(found)]
    except OSError as error:
        hint = "choose another with --port, APP_PORT or server.port"
        msg = f"cannot listen on {server.host} port {server.port}: {error.strerror or error}; {hint}"
        raise StartupError(msg) from error
    return sockets


def listen_for_commands(path: Path) -> socket.socket:
    """The control socket, for this user alone. The caller holds the lock of the state directory.

    Raises:
        StartupError: when it cannot be made.

    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            with short_name(path) as name:
                listener.bind(name)
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        msg = f"cannot listen on {path}: {error.strerror or error}"
        raise StartupError(msg) from error
    return listener


def notice_departed_clients(listener: socket.socket, seconds: int = 60) -> None:
    """Enable TCP keep-alive, to end connections whose client has vanished; by default the kernel waits two hours.

    Accepted sockets inherit this. A connection that carries nothing is probed (aiohttp switches that on for each); one
    with bytes on the way ends when its client has taken none of them for `seconds`.
    """
    if listener.family == socket.AF_UNIX:
        return  # its clients end with their descriptors
    probing = {
        socket.TCP_KEEPIDLE: max(seconds // 3, 1),
        socket.TCP_KEEPINTVL: max(seconds // 6, 1),
        socket.TCP_KEEPCNT: 4,
        socket.TCP_USER_TIMEOUT: seconds * 1000,
    }
    for option, value in probing.items():
        listener.setsockopt(socket.IPPROTO_TCP, option, value)


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket; for a Unix socket `unix:` and its path."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(listener.getsockname())}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bound(family: int, address: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
