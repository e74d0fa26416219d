"""How text is shown where stdout leads: colours, width, shapes beyond ASCII; a table in columns.

Where stdout is no terminal nothing is coloured and nothing cut, so that other programs get whole lines. Control
characters never reach a terminal: messages may repeat what an engine or a client has written.
"""

import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

BOLD, DIM, RED, GREEN, YELLOW, CYAN, PLAIN = "1", "2", "31", "32", "33", "36", ""
_END = "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")  # and what turns lines around
_LEAST_WIDTH = 40

type Text = tuple[str, str]  # and its style
type Cell = Text | str


@dataclass(frozen=True, slots=True)
class Screen:
    """Where it is shown. `width`: in columns, None: nothing is cut."""

    width: int | None
    colours: bool
    shapes: bool

    @classmethod
    def of_stdout(cls) -> "Screen":
        """As stdout and the environment are."""
        shapes = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
        if sys.stdout is None or not sys.stdout.isatty():
            return cls(None, colours=False, shapes=shapes)
        colours = "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"
        return cls(max(shutil.get_terminal_size().columns, _LEAST_WIDTH), colours, shapes)

    @property
    def dot(self) -> str:
        """What stands between facts."""
        return " · " if self.shapes else " | "

    def paint(self, text: str, style: str) -> str:
        """In a style, where there are colours."""
        return f"\x1b[{style}m{text}{_END}" if style and self.colours else text

    def line(self, *parts: Cell) -> str:
        """One line of texts, cut to the width."""
        left, found = self.width, ""
        for part in parts:
            text, style = (part, PLAIN) if isinstance(part, str) else part
            text = printable(text)
            shown = text if left is None else cut(text, left)
            found += self.paint(shown, style)
            if left is not None:
                left -= len(shown)
        return found

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Cell]], right: frozenset[str]) -> list[str]:
        """In columns with a head; `right`: the names of those that are aligned to the right. The last one is cut."""
        cells = [[_of(cell) for cell in row] for row in rows]
        titles = [(name, DIM) for name in head]
        widths = [max(len(row[place][0]) for row in (titles, *cells)) for place in range(len(head))]
        return [self._row(row, head, widths, right) for row in (titles, *cells)]

    def _row(self, row: Sequence[Text], head: Sequence[str], widths: Sequence[int], right: frozenset[str]) -> str:
        parts: list[Cell] = []
        for place, ((text, style), name, wide) in enumerate(zip(row, head, widths, strict=True)):
            gap = " " * (wide - len(text))
            last = place == len(row) - 1
            parts += [gap, (text, style)] if name in right else [(text, style), "" if last else gap]
            parts.append("" if last else "  ")
        return self.line(*parts).rstrip() if not self.colours else self.line(*_stripped(parts))


def _of(cell: Cell) -> Text:
    text, style = (cell, PLAIN) if isinstance(cell, str) else cell
    return printable(text), style


def _stripped(parts: list[Cell]) -> list[Cell]:
    """Without blanks at the end."""
    while parts and not _of(parts[-1])[0].strip():
        parts.pop()
    return parts


def cut(text: str, most: int) -> str:
    """At most so many characters, the last one … where some are missing."""
    return text if len(text) <= most else f"{text[: most - 1]}…" if most > 0 else ""


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return _CONTROL.sub(" ", text)
