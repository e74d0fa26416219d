"""HTTP heads: a client's, filtered for the engine, and an engine's, rewritten for the client.

Hop-by-hop headers are removed in both directions, and so are client headers that only the daemon may set. Also makes
the ids of requests.
"""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding"
    b" upgrade".split()
)
# Of a client's head: what ends here, since it speaks of this connection, or since the daemon says it anew.
_ENDS_HERE = HOP_BY_HOP | frozenset(
    b"host content-length content-encoding authorization x-api-key api-key expect x-request-id"
    b" x-vllm-priority x-data-parallel-rank"  # clients may not set their priority or the replica
    # an engine would add what browsers look at, and the daemon says that
    b" origin sec-fetch-site sec-fetch-mode sec-fetch-dest sec-fetch-user sec-websocket-protocol".split()
)
_USUAL = frozenset({b"keep-alive", b"close", b""})  # values of Connection that name no other header
_LENGTH = b"content-length"  # without which the next answer would be taken for more of this one
_SAID_ANEW = b"x-request-id"  # of an engine's head
# Whether an engine's head holds anything that must not be passed on as it is; vLLM's usually does not.
_REWRITE = re.compile(
    rb"\n(?:connection|keep-alive|proxy-[a-z]+|te|trailer|upgrade|x-request-id)[ \t]*:|\n[ \t]", re.IGNORECASE
)


_USABLE_ID = re.compile(rb"[!-+\-.-~]{1,200}")  # printable, no comma: that would be two
_boot = os.urandom(8).hex().encode()
_numbers = itertools.count()


def request_id(given: bytes | None) -> bytes:
    """What a client sent as X-Request-Id, a new one where it is missing or unusable."""
    if given is not None and _USABLE_ID.fullmatch(given):
        return given
    return b"%s%x" % (_boot, next(_numbers))


def engine_id(client_id: bytes) -> bytes:
    """An id that no other request to an engine has, whatever clients send; it begins with the client's.

    vLLM aborts by id: of two requests with one id, the end of either would be the end of both.
    """
    return b"%s.%s%x" % (client_id, _boot, next(_numbers))


def read_head(raw_headers: Sequence[tuple[bytes, bytes]]) -> tuple[dict[bytes, bytes], bytes]:
    """(the headers that end here, by name in lower case, repeated ones joined by commas; the lines that go on)."""
    mine: dict[bytes, bytes] = {}
    lines: list[bytes] = []
    for name, value in raw_headers:
        low = name.lower()
        if low not in _ENDS_HERE:
            lines.append(b"%s: %s\r\n" % (name, value))
        elif low in mine:
            mine[low] += b"," + value
        else:
            mine[low] = value
    if b"connection" in mine:
        named = {part.strip() for part in mine[b"connection"].lower().split(b",")} - _USUAL
        if named:
            lines = [line for line in lines if line.partition(b":")[0].lower() not in named]
    return mine, b"".join(lines)


def passes_as_it_is(raw: bytes) -> bool:
    """Whether an engine's head, its last empty line left off, holds nothing that stops here."""
    return raw.startswith(b"HTTP/1.1 ") and not _REWRITE.search(raw)


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """An engine's head, taken apart: status line and header lines without their line ends."""

    start: bytes
    fields: tuple[tuple[bytes, bytes], ...]  # (name in lower case, whole line)

    @classmethod
    def of(cls, raw: bytes) -> "AnswerHead | None":
        """From a head that llhttp has accepted; None where it folds a line: obsolete, and open to request smuggling."""
        start, *lines = raw.removesuffix(b"\r\n").split(b"\r\n")
        if any(line[:1] in {b" ", b"\t"} for line in lines):
            return None
        return cls(start, tuple((line.partition(b":")[0].strip().lower(), line) for line in lines))

    def has(self, name: bytes) -> bool:
        """Whether there is such a header."""
        return any(low == name for low, _ in self.fields)

    def value(self, name: bytes) -> bytes:
        """The first value of a header, in lower case; b"" where there is none."""
        return next((line.partition(b":")[2].strip().lower() for low, line in self.fields if low == name), b"")

    def rewritten(self, *extra: bytes) -> bytes:
        """The head for a client, `extra` lines added, whatever stops here left out."""
        named = {
            part.strip()
            for low, line in self.fields
            if low == b"connection"
            for part in line.partition(b":")[2].lower().split(b",")
        }
        dropped = HOP_BY_HOP | (named - {_LENGTH}) | {_SAID_ANEW}
        kept = [line + b"\r\n" for low, line in self.fields if low not in dropped]
        return b"".join([b"HTTP/1.1 ", self.start[9:], b"\r\n", *kept, *extra, b"\r\n"])
