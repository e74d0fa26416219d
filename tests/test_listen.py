"""Sockets that notice when whoever was at the other end is gone."""

import ctypes
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_proxy.listen import notice_departed_clients


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
