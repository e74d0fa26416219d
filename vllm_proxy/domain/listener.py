"""Where clients come in: addresses as `server.listen` takes them, and what each listening socket says of its clients.

For access rules, which are per listener and not for the daemon as a whole: one that others reach does not close the one
on loopback, nor does loopback open the other. Sockets are opened in `listen.py`; a connection knows its own listener.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_proxy.domain import hosts
from vllm_proxy.domain.address import Address, TcpAddress, UnixAddress, parse_address
from vllm_proxy.domain.units import show

_URL = re.compile(r"(https?)://([^/]+)/?")
_UNIX = re.compile(r"unix:(?://(?=/))?([^\0]*[^\0/])")
_LONGEST_PATH = 4095  # bytes: PATH_MAX


class Kind(StrEnum):
    """Who can connect there."""

    CONTROL = "control"  # the control socket: the daemon's own user, by the mode of its file
    LOOPBACK = "loopback"  # a port that is bound to a loopback address: whatever runs on this machine
    ELSEWHERE = "elsewhere"  # all others: any other address, and Unix sockets, which may be a web server's way here


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening socket, as its connections see it. `tls`: clients speak TLS there."""

    kind: Kind = Kind.ELSEWHERE
    address: Address | None = None
    tls: bool = False

    @classmethod
    def at(cls, host: str, port: int = 0, *, tls: bool = False) -> "Listener":
        """The one that is bound to a port of an address. 0.0.0.0 and :: are no loopback, whoever connects to them."""
        return cls(Kind.LOOPBACK if hosts.is_loopback(host) else Kind.ELSEWHERE, TcpAddress(host, port), tls)

    @property
    def host(self) -> str:
        """The address that it is bound to; "" for a Unix socket."""
        return self.address.host if isinstance(self.address, TcpAddress) else ""

    @property
    def url(self) -> str:
        """For people and programs: `http://127.0.0.1:8000`, `https://[::1]:8443`, `unix:/run/vllm-proxy/http.sock`."""
        if isinstance(self.address, TcpAddress):
            return f"{'https' if self.tls else 'http'}://{self.address}"
        return str(self.address)


def listen_address(text: str) -> str:
    """An item of `server.listen`, `HOST:PORT`, `[IPV6]:PORT` or `unix:PATH`, once it is known to be one.

    Raises:
        ValueError: it is none, with the right spelling where that can be told.

    """
    if url := _URL.fullmatch(text):
        tls = ", with server.tls_cert and server.tls_key" if url[1] == "https" else ""
        raise _expected(f"{show(_with_port(url[2]))}{tls}", text)
    if text.startswith(("unix:", "/")):
        return _unix(text)
    if text.startswith((":", "*:")) and (port := text.rpartition(":")[2]).isdecimal() and not hosts.is_address(text):
        raise _expected(f'"127.0.0.1:{port}" for this machine alone, or "0.0.0.0:{port}" for all', text)
    if text.isdecimal():
        raise _expected(f'"127.0.0.1:{text}" for this machine alone, or "0.0.0.0:{text}" for all', text)
    try:
        address = parse_address(text)
    except ValueError:
        if (meant := _with_port(text)) != text:
            raise _expected(show(meant), text) from None
        raise _expected('"127.0.0.1:8000", "[::1]:8000" or "unix:/run/vllm-proxy/http.sock"', text) from None
    assert isinstance(address, TcpAddress)
    if ":" in address.host and not hosts.is_address(address.host):
        raise _expected('an IPv6 address in the brackets, such as "[::1]:8000"', text)
    hosts.host(address.host)
    return text


def _unix(text: str) -> str:
    found = _UNIX.fullmatch(text if text.startswith("unix:") else f"unix:{text}")
    if found is None or len(found[1].encode()) > _LONGEST_PATH:
        raise _expected('the path of a socket, such as "unix:/run/vllm-proxy/http.sock"', text)
    if text != (meant := f"unix:{found[1]}"):
        raise _expected(show(meant), text)
    return text


def _address(text: str) -> Address:
    """What an item means. The path of a Unix socket may be a relative one, from the folder of the file."""
    return UnixAddress(text.removeprefix("unix:")) if text.startswith("unix:") else parse_address(text)


def _with_port(text: str) -> str:
    """What was probably meant by a host without a port, or by an IPv6 address without brackets."""
    if hosts.is_address(text):
        return str(TcpAddress(text, 8000))
    host, _, port = text.rpartition(":")
    if hosts.is_address(host) and ":" in host and port.isdecimal():
        return f"[{host}]:{port}"
    return text if host else f"{text}:8000"


def _expected(what: str, got: str) -> ValueError:
    return ValueError(f"expected {what}, got {show(got)}")


def each_once(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The items of `server.listen`, once no two of them are the same or one within another.

    Raises:
        ValueError: with the first that is.

    """
    before: list[Address] = []
    for text in texts:
        address = _address(text)
        for other in before:
            if address == other:
                raise ValueError(f"expected each address once, got {show(text)} twice")
            for wide, narrow in ((other, address), (address, other)):
                if _covers(wide, narrow):
                    raise ValueError(f"{show(str(narrow))} is within {show(str(wide))}: one of them is enough")
        before.append(address)
    return texts


def _covers(wide: Address, narrow: Address) -> bool:
    """Whether one listens on all addresses, and the other on one of them."""
    if not isinstance(wide, TcpAddress) or not isinstance(narrow, TcpAddress) or wide.port != narrow.port:
        return False
    if not hosts.is_address(wide.host) or not hosts.is_address(narrow.host):
        return False
    every, one = ipaddress.ip_address(wide.host), ipaddress.ip_address(narrow.host)
    return every.version == one.version and every.is_unspecified


def addresses(listen: Sequence[str], host: str, port: int) -> tuple[Address, ...]:
    """Where clients come in: what `server.listen` says, else `server.host` and `server.port`."""
    return tuple(map(_address, listen)) or (TcpAddress(host, port),)


def replaced_by(listen: Sequence[str], host: str, port: int) -> tuple[str, ...]:
    """`server.listen` once host and port come from outside the file: they stand for its TCP addresses."""
    kept = [text for text in listen if isinstance(_address(text), UnixAddress)]
    return (str(TcpAddress(host, port)), *kept) if kept else ()


CONTROL = Listener(Kind.CONTROL)
