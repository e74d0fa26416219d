"""Listening sockets: which are made, what is in their way, and that they notice clients which vanished."""

import ctypes
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.harness import free_port
from vllm_proxy.domain.config import Server
from vllm_proxy.domain.listener import Kind
from vllm_proxy.errors import StartupError
from vllm_proxy.listen import Listening, inherited, listen, notice_departed_clients


@contextmanager
def connection(seconds: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection, the client's first; the other is probed as aiohttp has it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        notice_departed_clients(listener, seconds)
        with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as accepted:
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            accepted.settimeout(60)
            yield client, accepted


def vanish(client: socket.socket) -> None:
    """Let the kernel drop whatever comes for this socket, as if its machine were gone: no answer, no reset."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0: no byte of the packet
    so_attach_filter = 26
    client.setsockopt(socket.SOL_SOCKET, so_attach_filter, struct.pack("HL", 1, ctypes.addressof(program)))


@pytest.mark.parametrize("sent", [b"", b"an event"])
def test_a_client_that_vanished_is_noticed(sent: bytes) -> None:
    """In the middle of a silent stream, and with bytes on the way, though no packet says that it is gone."""
    with connection(2) as (client, accepted):
        vanish(client)
        accepted.send(sent)
        with pytest.raises(TimeoutError, match="Connection timed out"):
            accepted.recv(1)


def test_a_minute_is_what_clients_get() -> None:
    """It is inherited by each connection from its listener."""
    with connection(60) as (_, accepted):
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        assert [accepted.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [20, 10, 4, 60_000]


def test_a_unix_socket_needs_no_probes() -> None:
    """Its clients cannot vanish."""
    with socket.socket(socket.AF_UNIX) as listener:
        notice_departed_clients(listener)
        assert listener.fileno() >= 0


@contextmanager
def listening(*addresses: str) -> Iterator[list[Listening]]:
    """Sockets at these addresses."""
    found = listen(Server(listen=addresses), Path("/"))
    with ExitStack() as stack:
        for one in found:
            stack.callback(one.close)
        yield found


def answers(path: Path) -> bool:
    """Whether somebody listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


def test_each_address_has_a_socket_that_knows_who_can_connect(tmp_path: Path) -> None:
    """In the order of the file, each for itself: one that others reach changes nothing for the one on loopback."""
    port, path = free_port(), tmp_path / "http.sock"
    with listening(f"127.0.0.1:{port}", f"[::1]:{port}", f"unix:{path}") as found:
        assert [one.listener.kind for one in found] == [Kind.LOOPBACK, Kind.LOOPBACK, Kind.ELSEWHERE]
        urls = [one.listener.url for one in found]
        assert urls == [f"http://127.0.0.1:{port}", f"http://[::1]:{port}", f"unix:{path}"]
        socket.create_connection(("127.0.0.1", port)).close()
        socket.create_connection(("::1", port)).close()
        assert answers(path)
    with listening(f"0.0.0.0:{port}") as found:
        assert [one.listener.kind for one in found] == [Kind.ELSEWHERE]


def test_a_unix_socket_is_for_its_owner_and_group_and_goes_with_the_daemon(tmp_path: Path) -> None:
    """Mode 0660 from its first moment, whatever the umask; no file is left."""
    path = tmp_path / "http.sock"
    before = os.umask(0o777)
    try:
        with listening(f"unix:{path}"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert os.umask(0o777) == 0o777
    finally:
        os.umask(before)
    assert not path.exists()


def test_a_path_of_any_length_will_do(tmp_path: Path) -> None:
    """The kernel takes 107 bytes; the folder is named by a descriptor instead."""
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    with listening(f"unix:{folder}/http.sock") as (one,):
        assert (folder / "http.sock").is_socket()
        assert one.listener.url == f"unix:{folder}/http.sock"
    assert not (folder / "http.sock").exists()


def test_a_relative_path_is_one_from_the_folder_of_the_file(tmp_path: Path) -> None:
    """As all paths in the file."""
    (one,) = listen(Server(listen=("unix:http.sock",)), tmp_path)
    assert (tmp_path / "http.sock").is_socket()
    assert one.listener.url == f"unix:{tmp_path}/http.sock"
    one.close()


def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    """Nobody listens on it."""
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    with listening(f"unix:{path}"):
        assert answers(path)


def test_a_socket_that_somebody_listens_on_is_taken(tmp_path: Path) -> None:
    """It goes on as it was, be its queue full."""
    path = tmp_path / "http.sock"
    with ExitStack() as stack:
        other = stack.enter_context(socket.socket(socket.AF_UNIX))
        other.bind(str(path))
        other.listen(0)
        for _ in range(2):  # the second one cannot be queued
            with pytest.raises(StartupError, match=f"cannot listen on {path}: it is taken"):
                listen(Server(listen=(f"unix:{path}",)), Path("/"))
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.settimeout(0)
            with suppress(BlockingIOError):
                waiting.connect(str(path))
        assert path.is_socket()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """Somebody mistyped a path: nothing is deleted for that."""
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(StartupError, match="there is something that is no socket"):
        listen(Server(listen=(f"unix:{path}",)), Path("/"))
    assert path.read_text() == "precious"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """As the kernel says it."""
    with pytest.raises(StartupError, match=f"cannot listen on {tmp_path}/no/x.sock: No such file or directory"):
        listen(Server(listen=(f"unix:{tmp_path}/no/x.sock",)), Path("/"))


def test_the_socket_of_a_daemon_that_came_later_is_not_removed(tmp_path: Path) -> None:
    """Whoever replaced it owns the file now."""
    path = tmp_path / "http.sock"
    with listening(f"unix:{path}"):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.is_socket()


def test_where_one_address_cannot_be_had_none_is_left_open(tmp_path: Path) -> None:
    """The message names it, and where to choose another."""
    path = tmp_path / "http.sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError) as raised:
            listen(Server(listen=(f"unix:{path}", f"127.0.0.1:{port}")), Path("/"))
    told = f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another in server.listen"
    assert str(raised.value) == told
    assert not path.exists()


def test_the_service_managers_unix_socket_is_elsewhere_and_stays(tmp_path: Path) -> None:
    """Its file is systemd's, and whoever connects may speak for others."""
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as held, socket.create_server(("127.0.0.1", 0)) as port:
        held.bind(str(path))
        unix, tcp = inherited([held, port], Server(tls_cert="a", tls_key="b"))
        assert (unix.listener.kind, tcp.listener.kind) == (Kind.ELSEWHERE, Kind.LOOPBACK)
        assert (unix.listener.tls, tcp.listener.tls) == (False, True)
        unix.close()
    assert path.is_socket()
