"""TOML's syntax with positions: splits a text into pieces, finds values and comments. The only TOML lexer here.

tomllib gives no positions. Callers pass texts that tomllib has accepted, so headers, keys, values and comments only
have to be told apart; on any other text it must not fail or hang either (tests/domain/test_lexer.py).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vllm_proxy.domain.toml import KeyPath

_PART = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)"""
_KEY = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER = re.compile(rf"[ \t]*\[(\[?)[ \t]*({_KEY})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_KEY})[ \t]*=")
_STRING = r'''"""(?:[^\\]|\\.)*?"{3,5}''' + r"""|'''.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'"""
_COMMENT = r"\#[^\n]*"
_TOKEN = re.compile(rf"""{_STRING}|{_COMMENT}|[\[\]{{}},\n]|[^\[\]{{}},"'\#\n]+|.""", re.DOTALL)
_STRING_OR_COMMENT = re.compile(rf"{_STRING}|(?P<comment>{_COMMENT})", re.DOTALL)
_BETWEEN = re.compile(rf"(?:[\s,]|{_COMMENT})*")  # two entries of a table in one line
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some whole lines: a header, a key with its value, or neither (blank, a comment)."""

    kind: Literal["header", "key", "other"]
    path: KeyPath
    outer: int  # how much of the path is that of the header above
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A key and its value in a table that is written in one line: `{ a = 1, b.c = 2 }`."""

    path: KeyPath
    start: int  # of the key
    value: int  # where that begins
    end: int  # of the value


def pieces(text: str) -> Iterator[Piece]:
    """A text in pieces, without gaps."""
    table: KeyPath = ()
    position = 0
    while position < len(text):
        start = position
        if header := _HEADER.match(text, position):
            table = _path(header[2])
            position = _end_of_lines(text, header.end())
            yield Piece("header", table, len(table), start, position)
        elif assignment := _ASSIGNMENT.match(text, position):
            position = _end_of_lines(text, assignment.end())
            yield Piece("key", table + _path(assignment[1]), len(table), start, position)
        else:
            position = _end_of_lines(text, position)
            yield Piece("other", table, len(table), start, position)


def value_span(text: str, key: int = 0) -> tuple[int, int]:
    """Where the value begins and ends whose key begins at `key`, without what is blank or a comment around it.

    Raises:
        ValueError: no key begins there.

    """
    assignment = _ASSIGNMENT.match(text, key)
    if assignment is None:
        raise ValueError("no key begins here")
    begin = end = assignment.end()
    depth = 0
    for token in _TOKEN.finditer(text, begin):
        word = token[0]
        if not depth and (word in {"\n", ",", "]", "}"} or word.startswith("#")):
            break
        depth += _deeper(word)
        if not word.isspace():
            begin = begin if end > begin else token.end() - len(word.lstrip())
            end = token.start() + len(word.rstrip())
    return begin, end


def entries(table: str) -> list[Entry]:
    """Those of a table in one line, which begins with its brace."""
    found: list[Entry] = []
    between = _BETWEEN.match(table, 1)
    while between and (assignment := _ASSIGNMENT.match(table, between.end())):
        begin, end = value_span(table, between.end())
        found.append(Entry(_path(assignment[1]), between.end(), begin, end))
        between = _BETWEEN.match(table, end)
    return found


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Where each begins, and what it says from its `#` on."""
    for match in _STRING_OR_COMMENT.finditer(text):
        if match["comment"]:
            yield match.start(), match[0].rstrip()


def _end_of_lines(text: str, position: int) -> int:
    """Behind the newline that ends what goes on at `position`: not one inside a string, array or table."""
    depth = 0
    for token in _TOKEN.finditer(text, position):
        depth += _deeper(token[0])
        if token[0] == "\n" and depth <= 0:
            return token.end()
    return len(text)


def _deeper(token: str) -> int:
    return 1 if token in {"[", "{"} else -1 if token in {"]", "}"} else 0


def _path(key: str) -> KeyPath:
    return tuple(_unquoted(part) for part in re.findall(_PART, key))


def _unquoted(part: str) -> str:
    if part[0] == "'":
        return part[1:-1]
    if part[0] == '"':
        return _ESCAPE.sub(_unescaped, part[1:-1])
    return part


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r"}.get(code, code)
