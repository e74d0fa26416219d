"""The listening sockets: TCP ports and Unix sockets for clients, and the Unix control socket for commands.

For `daemon`, which uses these or the sockets inherited from systemd (`systemd`). Enables the kernel's keep-alive
probes, so that clients which vanished are noticed. Serving connections is up to `traffic/front.py`.
"""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from vllm_proxy.domain.address import Address, TcpAddress, UnixAddress
from vllm_proxy.domain.config import Server
from vllm_proxy.domain.listener import Kind, Listener
from vllm_proxy.errors import StartupError
from vllm_proxy.places import short_name
from vllm_proxy.runtime.background import keep_running

BACKLOG = 4096  # connections that wait to be accepted: a burst of clients must not wait for a retransmission
_OWNER, _OWNER_AND_GROUP = 0o600, 0o660
_LOOK_SECONDS = 2.0  # between two looks at the files of Unix sockets
_PROBE_SECONDS = 1.0  # for who listens on a socket that is there already: its queue may be full

log = structlog.get_logger()

type Accept = Callable[[Listening], Awaitable[None]]
type SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Listening:
    """A listening socket, and what it says of its clients."""

    socket: socket.socket
    listener: Listener
    file: tuple[int, int] | None = None  # device and inode of a Unix socket that was made here

    def close(self) -> None:
        """Close it. The file of a Unix socket goes too, unless it is another one by now."""
        self.socket.close()
        address = self.listener.address
        if self.file is not None and isinstance(address, UnixAddress):
            with contextlib.suppress(OSError):
                if _identity(address.path) == self.file:
                    Path(address.path).unlink()


@dataclass(frozen=True, slots=True)
class Listeners:
    """Where requests come in."""

    clients: Sequence[Listening]
    commands: Listening

    def __iter__(self) -> Iterator[Listening]:
        """All of them."""
        return iter((*self.clients, self.commands))

    def addresses(self) -> list[str]:
        """The addresses of `clients` that are on a network, be it loopback."""
        return [one.listener.host for one in self.clients if one.listener.host]

    def ports(self) -> list[int]:
        """The ports that are taken by them."""
        found = [one.listener.address for one in self.clients]
        return [address.port for address in found if isinstance(address, TcpAddress)]


def listen(server: Server, folder: Path) -> list[Listening]:
    """Listening sockets for every address that the configuration asks for. `folder`: of its file.

    Raises:
        StartupError: when one is taken or cannot be had; then none is left open.

    """
    with contextlib.ExitStack() as opened:
        found = []
        for address in server.addresses:
            for one in _listen_at(address, server, folder):
                opened.callback(one.close)
                found.append(one)
        opened.pop_all()
        return found


def inherited(sockets: Iterable[socket.socket], server: Server) -> list[Listening]:
    """The sockets that the service manager holds; their files are its own."""
    return [Listening(one, _listener_of(one, server)) for one in sockets]


def _listen_at(address: Address, server: Server, folder: Path) -> Iterator[Listening]:
    if isinstance(address, UnixAddress):
        path = folder / address.path
        yield _unix(path, Listener(address=UnixAddress(str(path))))
        return
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, place in dict.fromkeys(found):
            bound = _bound(family, place)
            yield Listening(bound, _listener_of(bound, server))
    except OSError as error:
        named = "host" if isinstance(error, socket.gaierror) else "port"
        variable = "VLLM_PROXY_HOST" if named == "host" else "APP_PORT"
        where = "in server.listen" if server.listen else f"with --{named}, {variable} or server.{named}"
        msg = f"cannot listen on {address.host} port {address.port}: {error.strerror or error}; choose another {where}"
        raise StartupError(msg) from error


def listen_for_commands(path: Path) -> Listening:
    """The control socket, for this user alone. The caller holds the lock of the state directory.

    Raises:
        StartupError: when it cannot be made, or a daemon with another state directory listens there.

    """
    try:
        if not _is_socket(path):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_listen(path, error) from error
    return _unix(path, Listener(Kind.CONTROL, UnixAddress(str(path))))


async def accept_all(listeners: Listeners, accept: Accept, stack: contextlib.AsyncExitStack) -> None:
    """Have the clients of all sockets accepted; while `stack` lasts, a Unix socket whose file is gone is made anew."""
    for one in listeners:
        await accept(one)
    keeping = keep_running(partial(_keep_in_place, listeners, accept, stack), "files of Unix sockets")
    stack.callback(keeping.cancel)


async def _keep_in_place(listeners: Listeners, accept: Accept, stack: contextlib.AsyncExitStack) -> None:
    held = [one for one in listeners if one.file is not None]
    told = [""] * len(held)
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        for place, one in enumerate(held):
            problem = ""
            try:
                if (new := _remade(one)) is not None:
                    held[place] = new
                    stack.callback(new.close)
                    await accept(new)
            except (OSError, StartupError) as error:
                problem = str(error)
            if problem and problem != told[place]:
                log.error("nobody can connect by a Unix socket any more", listens=one.listener.url, why=problem)
            told[place] = problem


def _remade(one: Listening) -> Listening | None:
    """A Unix socket in the place of one whose file was removed; None: it is there.

    Raises:
        OSError, StartupError: there is something else, or nothing can be.

    """
    address = one.listener.address
    assert isinstance(address, UnixAddress)
    try:
        if _identity(address.path) != one.file:
            raise OSError(f"there is another file at {address.path}; remove it")
    except FileNotFoundError:
        log.warning("the file of a Unix socket was removed, and is made anew", listens=one.listener.url)
        return _unix(Path(address.path), one.listener)
    return None


def _unix(path: Path, listener: Listener) -> Listening:
    """A Unix socket: for commands of its owner's alone, for clients of its group's, too.

    One that nobody listens on is replaced.
    """
    mode = _OWNER if listener.kind is Kind.CONTROL else _OWNER_AND_GROUP
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_name(path) as name:
            _make_room(Path(name))
            before = os.umask(0o777 & ~mode)
            try:
                bound.bind(name)
            finally:
                os.umask(before)
            file = _identity(name)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise _cannot_listen(path, error) from error
    return Listening(bound, listener, file)


def _make_room(path: Path) -> None:
    """Remove the socket that a process which was killed has left.

    Raises:
        OSError: there is something else, or somebody listens on it.

    """
    if not path.exists(follow_symlinks=False):
        return
    if not _is_socket(path):
        raise OSError("there is something that is no socket; remove it, or choose another path in server.listen")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except (TimeoutError, BlockingIOError):
            pass
    raise OSError("it is taken: another process listens on it; end that, or choose another path")


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _cannot_listen(path: Path, error: OSError) -> StartupError:
    return StartupError(f"cannot listen on {path}: {error.strerror or error}")


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def notice_departed_clients(listening: socket.socket, seconds: int = 60) -> None:
    """Enable TCP keep-alive, to end connections whose client has vanished; by default the kernel waits two hours.

    Accepted sockets inherit this. A connection that carries nothing is probed (aiohttp switches that on for each); one
    with bytes on the way ends when its client has taken none of them for `seconds`.
    """
    if listening.family == socket.AF_UNIX:
        return  # its clients end with their descriptors
    probing = {
        socket.TCP_KEEPIDLE: max(seconds // 3, 1),
        socket.TCP_KEEPINTVL: max(seconds // 6, 1),
        socket.TCP_KEEPCNT: 4,
        socket.TCP_USER_TIMEOUT: seconds * 1000,
    }
    for option, value in probing.items():
        listening.setsockopt(socket.IPPROTO_TCP, option, value)


def _listener_of(listening: socket.socket, server: Server) -> Listener:
    """What a socket for clients says of them, by where it is bound."""
    if listening.family == socket.AF_UNIX:
        return Listener(address=UnixAddress(os.fsdecode(listening.getsockname())))
    return Listener.at(*listening.getsockname()[:2], tls=server.tls_cert is not None)


def _bound(family: int, address: SocketAddress) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError:
        bound.close()
        raise
    return bound
