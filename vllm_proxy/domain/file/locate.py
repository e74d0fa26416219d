"""Maps the key paths of a TOML text to line numbers, for messages.

A key inside an inline table, whose line is not known, gets the line of the nearest table or key around it.
"""

from vllm_proxy.domain.file.lexer import pieces
from vllm_proxy.domain.toml import KeyPath

_DEEPEST = 64  # deeper tables get the line of the one around them


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
