"""An address as a value, a TCP port or a Unix socket, and every notation of it: engines listen there, and the daemon.

For whoever starts an engine, records it or connects to it: nobody else assembles a URL, a `Host` header or an address
from host, port or path. To open a connection, use `traffic/dial.py`; where the daemon listens says `listener.py`.
"""

import re
from dataclasses import dataclass

_TCP = re.compile(
    r"(?:\[(?P<v6>[0-9a-f:.]+:[0-9a-f:.]*(?:%[A-Za-z0-9._-]+)?)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[1-9][0-9]{0,4})"
)
_UNIX = re.compile(r"unix:(?P<path>/[^\0]*[^\0/])")
_PORT_END = 2**16


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A port of a host. `host`: a name or an IP address, without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        """`127.0.0.1:8001`, `[::1]:8001`: for people, and as `parse_address` reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def authority(self) -> str:
        """What stands in a `Host` header and in a URL."""
        return str(self)

    def options(self) -> list[str]:
        """vLLM's options to listen here."""
        return [f"--host={self.host}", f"--port={self.port}"]


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket. `path`: absolute, at most 107 bytes on Linux."""

    path: str

    def __str__(self) -> str:
        """`unix:/run/x.sock`: for people, and as `parse_address` reads it."""
        return f"unix:{self.path}"

    @property
    def port(self) -> None:
        """It has none."""
        return

    @property
    def authority(self) -> str:
        """What stands in a `Host` header and in a URL; the path is given to the connection."""
        return "localhost"

    def options(self) -> list[str]:
        """vLLM's options to listen here."""
        return [f"--uds={self.path}"]


type Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """An address from what `str` makes of it.

    Raises:
        ValueError: it is none, or written in another way.

    """
    if found := _UNIX.fullmatch(text):
        return UnixAddress(found["path"])
    found = _TCP.fullmatch(text)
    if found is None or int(found["port"]) >= _PORT_END:
        raise ValueError(f"expected HOST:PORT or unix:/PATH, got {text!r}")
    return TcpAddress(found["v6"] or found["host"], int(found["port"]))
