"""Where in a TOML text a key stands: for messages alone, never for deciding anything.

Neither tomllib nor tomlkit gives positions. This walks the lines of a text that tomllib has accepted already, so it
only has to tell headers, keys and values apart; what it cannot see (a key inside an inline table) gets the line of
the nearest table or key around it.
"""

import re

type KeyPath = tuple[str, ...]

_PART = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)"""
_KEY = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER = re.compile(rf"[ \t]*\[(\[?)[ \t]*({_KEY})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_KEY})[ \t]*=")
_VALUE_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}'
    r"|'''.*?'{3,5}"
    r"""|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*|[\[\]{}]|\n|[^\S\n]+|.""",
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
    table: KeyPath = ()
    position, line = 0, 1
    while position < len(text):
        if header := _HEADER.match(text, position):
            table = _split(header[2])
            lines.setdefault(table, line)
            for depth in range(1, min(len(table), _DEEPEST)):
                implied.setdefault(table[:depth], line)
            end = header.end()
        elif assignment := _ASSIGNMENT.match(text, position):
            key = table + _split(assignment[1])
            for depth in range(len(table) + 1, min(len(key), _DEEPEST) + 1):
                lines.setdefault(key[:depth], line)
            end = assignment.end()
        else:
            end = position
        position = _end_of_value(text, end)
        line += text.count("\n", end, position)
    return implied | lines


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
