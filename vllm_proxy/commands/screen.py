"""How text is shown where stdout leads: colours, width, shapes beyond ASCII; a table in columns.

Where stdout is no terminal nothing is coloured and nothing cut, so that other programs get whole lines. Control
characters never reach a terminal: messages may repeat what an engine or a client has written.
"""

import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from vllm_proxy.domain.units import NO_TEXT

BOLD, DIM, RED, GREEN, YELLOW, CYAN, PLAIN = "1", "2", "31", "32", "33", "36", ""
_END = "\x1b[0m"
_CONTROL = re.compile(rf"[\t{NO_TEXT}]+")
_STYLE = re.compile(r"\x1b\[([0-9;]*)m")
_LEAST_WIDTH = 40
_GOOD_NAME, _LEAST_NAME = 24, 12  # characters of a name: before columns are left out for it, and in any case
_ROOM = 16  # characters of what follows a name

type Text = tuple[str, str]  # and its style
type Cell = Text | str


@dataclass(frozen=True, slots=True)
class Columns:
    """Those of a table, by their titles.

    `right`: aligned to the right; `names`: of names, which are shortened where the terminal is narrow; `less`: what is
    left out there before names get shorter than is good, first this; `room`: characters that are left for the last one.
    """

    titles: Sequence[str]
    right: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    less: Sequence[str] = ()
    room: int = _ROOM

    def fitted(self, cells: "Sequence[Sequence[Text]]", width: int) -> tuple[list[int], int]:
        """The places of those that are shown, and the longest name."""
        widths = [max(map(len, (title, *(row[place][0] for row in cells)))) for place, title in enumerate(self.titles)]
        for left_out in range(len(self.less) + 1):
            shown = [place for place, title in enumerate(self.titles) if title not in self.less[:left_out]]
            names = [widths[place] for place in shown if self.titles[place] in self.names]
            others = sum(widths[place] for place in shown[:-1] if self.titles[place] not in self.names)
            left = width - 2 * (len(shown) - 1) - others - min(widths[shown[-1]], self.room)
            if sum(min(wide, _GOOD_NAME) for wide in names) <= left:
                break
        longest = range(max(names, default=0), _LEAST_NAME, -1)
        return shown, next((most for most in longest if sum(min(wide, most) for wide in names) <= left), _LEAST_NAME)


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

    def named_line(self, parts: Sequence[Cell], place: int) -> str:
        """As `line`; the part at that place is a name, shortened where what follows it would be cut."""
        texts = [_of(part) for part in parts]
        if self.width is not None:
            name, style = texts[place]
            others = sum(len(text) for text, _ in texts[:-1]) - len(name) + min(len(texts[-1][0]), _ROOM)
            most = max(self.width - others, _LEAST_NAME)
            texts[place] = short_names([name], most)[name], style
        return self.line(*texts)

    def table(self, columns: Columns, rows: Sequence[Sequence[Cell]]) -> list[str]:
        """In columns with a head. On a terminal they are made to fit, and the last one is cut."""
        cells = [[_of(cell) for cell in row] for row in rows]
        if self.width is not None:
            shown, most = columns.fitted(cells, self.width)
            columns = replace(columns, titles=[columns.titles[place] for place in shown])
            cells = [[row[place] for place in shown] for row in cells]
            for place, title in enumerate(columns.titles):
                if title in columns.names:
                    short = short_names((row[place][0] for row in cells), most)
                    for row in cells:
                        row[place] = short[row[place][0]], row[place][1]
        titles = [(title, DIM) for title in columns.titles]
        widths = [max(len(row[place][0]) for row in (titles, *cells)) for place in range(len(titles))]
        return [self._row(row, columns.titles, widths, columns.right) for row in (titles, *cells)]

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


def short_names(names: Iterable[str], most: int) -> dict[str, str]:
    """Each in at most so many characters, with … in its middle, or elsewhere if that tells more of them apart."""
    different, best = dict.fromkeys(names), dict[str, str]()
    for front in sorted(range(most), key=lambda front: abs(front - most // 2)):
        short = {name: _without_middle(name, front, most) for name in different}
        if len(set(short.values())) > len(set(best.values())):
            best = short
        if len(set(best.values())) == len(different):
            break
    return best


def _without_middle(name: str, front: int, most: int) -> str:
    return name if len(name) <= most else f"{name[:front]}…{name[len(name) - (most - 1 - front) :]}"


def rows_of(line: str, width: int) -> Iterator[str]:
    """A line as the rows of a terminal, broken between words; each has its styles."""
    bare, styles, style = "", list[str](), PLAIN
    for place, part in enumerate(_STYLE.split(line)):
        if place % 2:
            style = PLAIN if part == "0" else part
        else:
            bare += part
            styles += [style] * len(part)
    if len(bare) <= width:
        yield line
        return
    end = 0
    for row in textwrap.wrap(bare, width, expand_tabs=False, replace_whitespace=False, break_on_hyphens=False):
        start = bare.index(row, end)
        end = start + len(row)
        runs = itertools.groupby(zip(row, styles[start:end], strict=True), key=lambda pair: pair[1])
        texts = ((style, "".join(letter for letter, _ in pairs)) for style, pairs in runs)
        yield "".join(f"\x1b[{style}m{text}{_END}" if style else text for style, text in texts)


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return _CONTROL.sub(" ", text)
