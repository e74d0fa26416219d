"""Sends entries to the systemd journal in its native protocol: with fields, which `journalctl MODEL=chat` looks for.

What is logged is a line (`logline.entry`): fields, then the message, its own line breaks kept apart from the line's
end. So a line stays the unit that is queued, masked and counted; it becomes a datagram when it is written.
"""

import socket
import struct
from collections.abc import Iterator

from vllm_proxy.runtime.logline import BETWEEN, BREAK, END_OF_FIELDS

SOCKET = "/run/systemd/journal/socket"
_IDENTIFIER = b"SYSLOG_IDENTIFIER=vllm-proxy\n"
_MOST_BYTES = 128 * 2**10  # of a message: with its fields it fits a datagram
_INFO = "6"


class Journal:
    """The journal's socket. Not for several threads."""

    def __init__(self, place: str | None = None) -> None:
        """`place`: its path if not the usual one; found anew for each entry, since the journal may make it anew."""
        self._place = place or SOCKET
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._rest = ""  # of a line whose end is still to come

    def send(self, text: str) -> int:
        """Send the entries of a text, blocking as long as the journal does. Returns how many could not be sent."""
        *lines, self._rest = (self._rest + text).split("\n")
        for number, line in enumerate(lines):
            try:
                self._socket.sendto(datagram(line), self._place)
            except OSError:
                return len(lines) - number
        return 0

    def close(self) -> None:
        """Send nothing any more."""
        self._socket.close()


def takes_entries(place: str | None = None) -> bool:
    """Whether there is a journal."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        return probe.connect_ex(place or SOCKET) == 0


def datagram(line: str) -> bytes:
    """An entry in the journal's native protocol."""
    priority = _INFO
    if line[:1] == "<" and line[2:3] == ">":
        priority, line = line[1], line[3:]
    fields, _, message = line.rpartition(END_OF_FIELDS)
    parts = [b"PRIORITY=%s\n" % priority.encode(), _IDENTIFIER, *map(_field, fields.split(BETWEEN) if fields else ())]
    return b"".join([*parts, *_message(message.replace(BREAK, "\n"))])


def _field(text: str) -> bytes:
    return text.encode(errors="backslashreplace") + b"\n"


def _message(text: str) -> Iterator[bytes]:
    """With its length in front, since it may hold line breaks."""
    data = text.encode(errors="backslashreplace")
    if len(data) > _MOST_BYTES:
        data = data[:_MOST_BYTES] + b" [...]"
    yield b"MESSAGE\n"
    yield struct.pack("<Q", len(data))
    yield data
    yield b"\n"
