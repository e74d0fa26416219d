"""Where in a TOML text a key stands: for messages, and for edits that prove themselves afterwards.

Neither tomllib nor tomlkit gives positions. This walks the lines of a text that tomllib has accepted already, so it
only has to tell headers, keys and values apart; what it cannot see (a key inside an inline table) gets the line of
the nearest table or key around it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

type KeyPath = tuple[str, ...]

_PART = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)"""
_KEY = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER = re.compile(rf"[ \t]*\[(\[?)[ \t]*({_KEY})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_KEY})[ \t]*=")
_VALUE_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}'
    r"|'''.*?'{3,5}"
    r"""|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*|[\[\]{}]|\n|[^\[\]{}"'\#\n]+|.""",
    re.DOTALL,
)
_DEEPEST = 64  # deeper tables get the line of the one around them
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)")


def line_of(lines: dict[KeyPath, int], path: KeyPath) -> int:
    """The line of `path`, else of the nearest thing around it, else 0."""
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return 0


def key_lines(text: str) -> dict[KeyPath, int]:
    """Each table and key of a valid TOML text with the line (from 1) where it first stands."""
    lines: dict[KeyPath, int] = {}
    implied: dict[KeyPath, int] = {}  # tables that only a deeper header names: [models.chat.args] without [models.chat]
    line = 1
    for piece in pieces(text):
        path = piece.path
        if piece.kind == "header":
            lines.setdefault(path, line)
            for depth in range(1, min(len(path), _DEEPEST)):
                implied.setdefault(path[:depth], line)
        elif piece.kind == "key":
            for depth in range(piece.outer + 1, min(len(path), _DEEPEST) + 1):
                lines.setdefault(path[:depth], line)
        line += text.count("\n", piece.start, piece.end)
    return implied | lines


@dataclass(frozen=True, slots=True)
class Piece:
    """Some whole lines: a header, a key with its value, or neither (blank, a comment). `path` is from the root."""

    kind: Literal["header", "key", "other"]
    path: KeyPath
    outer: int  # how much of the path is that of the header above
    start: int
    end: int


def pieces(text: str) -> Iterator[Piece]:
    """A valid TOML text in pieces, without gaps."""
    table: KeyPath = ()
    position = 0
    while position < len(text):
        start = position
        if header := _HEADER.match(text, position):
            table = _split(header[2])
            position = _end_of_value(text, header.end())
            yield Piece("header", table, len(table), start, position)
        elif assignment := _ASSIGNMENT.match(text, position):
            position = _end_of_value(text, assignment.end())
            yield Piece("key", table + _split(assignment[1]), len(table), start, position)
        else:
            position = _end_of_value(text, position)
            yield Piece("other", table, len(table), start, position)


def _end_of_value(text: str, position: int) -> int:
    """Behind the newline that ends the value starting at `position`: not one inside a string, array or table."""
    depth = 0
    while position < len(text):
        token = _VALUE_TOKEN.match(text, position)
        assert token is not None, "the last alternative matches any character"
        position = token.end()
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        elif token[0] == "\n" and depth <= 0:
            break
    return position


def _split(key: str) -> KeyPath:
    return tuple(_unquote(part) for part in re.findall(_PART, key))


def _unquote(part: str) -> str:
    if part[0] == "'":
        return part[1:-1]
    if part[0] == '"':
        return _ESCAPE.sub(_unescape, part[1:-1])
    return part


def _unescape(match: re.Match[str]) -> str:
    code = match[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r"}.get(code, code)
