"""Asks the kernel for its TCP sockets in one state, through netlink (sock_diag), for `ports` and `ownership`.

/proc/net/tcp is read bucket by bucket over every connection that could be, for milliseconds, and does not show sockets
that are bound and nothing else. Where the kernel does not answer, that is an error and never an empty list.
"""

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

LISTENS = 1 << 10
BOUND_ALONE = 1 << 13  # bound, and neither listening nor connected; since Linux 6.8, earlier ones name none

# From linux/netlink.h, linux/sock_diag.h and linux/inet_diag.h.
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_REQUEST_DUMP, _ERROR, _DONE = 0x301, 2, 3
_HEADER = struct.Struct("=IHHII")  # length, kind, flags, sequence, port
_NUMBER = struct.Struct("=i")
_FOUND, _INODE = struct.Struct(">4xH2x16s"), struct.Struct("=68xI")  # port, local address; the inode
_FAMILIES = {socket.AF_INET: 4, socket.AF_INET6: 16}  # and the length of their addresses
_SECONDS = 1.0  # for an answer


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """One socket. `local`: the packed address that it is bound to."""

    local: bytes
    port: int
    inode: int


def tcp_sockets(state: int, port: int) -> list[TcpSocket]:
    """Those in a state that are bound to a port, over IPv4 and over IPv6.

    Raises:
        OSError: the kernel does not tell.

    """
    return [found for family in _FAMILIES for found in _dump(family, state, port) if found.port == port]


def _dump(family: socket.AddressFamily, state: int, port: int) -> Iterator[TcpSocket]:
    wanted = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, state)
    request = wanted + struct.pack(">HH", port, 0) + bytes(44)  # of any address and interface
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_SECONDS)
        kernel.send(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + request)
        while True:
            data = kernel.recv(2**16)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                message, data = data[_HEADER.size : length], data[(length + 3) // 4 * 4 :]
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    (error,) = _NUMBER.unpack_from(message)
                    raise OSError(-error, os.strerror(-error))
                bound_to, local = _FOUND.unpack_from(message)
                yield TcpSocket(local[: _FAMILIES[family]], bound_to, *_INODE.unpack_from(message))
