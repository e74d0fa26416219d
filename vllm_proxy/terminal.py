"""Renders Markdown for a terminal and shows it in a pager, for `vllm-proxy help`.

Where stdout is no terminal (a file, a pipe) the text is printed as it is. Supports the Markdown that the pages of
`docs` use, nothing more.
"""

import contextlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence

_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_MARKED = re.compile(r"\*\*(?P<bold>.+?)\*\*|(?P<tick>`+)(?P<code>.+?)(?P=tick)|\[(?P<link>[^\]]+)\]\((?P<to>[^)]*)\)")
_ITEM = re.compile(r"(\s*(?:[-*]|\d+\.) )(.*)")
_CELLS = re.compile(r"(?<!\\)\|")
_WIDEST = 100  # columns that are good to read
_PLAIN, _BOLD, _CODE = "", "\x1b[1m", "\x1b[36m"
_END = "\x1b[0m"

type Paint = Callable[[str, int, str, str], Iterator[str]]  # text, width, first indent, others


def show(text: str, environ: Mapping[str, str], write: Callable[[str], None]) -> None:
    """Print Markdown: as it is where stdout is no terminal, else laid out, in a pager where there is one.

    `write`: prints a text and a newline.
    """
    if not sys.stdout.isatty():
        write(text.rstrip("\n"))
        return
    plain = "NO_COLOR" in environ or environ.get("TERM", "dumb") == "dumb"
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    laid_out = "\n".join(lines(text, width, colours=not plain)).rstrip("\n")
    if not _paged(laid_out + "\n", environ):
        write(laid_out)


def _paged(text: str, environ: Mapping[str, str]) -> bool:
    """Whether a pager has shown it: $PAGER, else less. An empty $PAGER, or `cat`, is none."""
    try:
        command = shlex.split(environ.get("PAGER", "less"))
    except ValueError:
        return False
    if not command or command == ["cat"]:
        return False
    try:
        pager = subprocess.Popen(  # noqa: S603 - the user's own choice
            command, stdin=subprocess.PIPE, text=True, encoding="utf-8", env={"LESS": "FRX", **environ}
        )
    except OSError:
        return False
    _feed(pager, text)
    return True


def _feed(pager: subprocess.Popen[str], text: str) -> None:
    """Leave Ctrl-C to the pager, and wait until it exits by itself."""
    assert pager.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            pager.stdin.write(text)
    except KeyboardInterrupt:
        pass
    with contextlib.suppress(BrokenPipeError):
        pager.stdin.close()
    while True:
        try:
            pager.wait()
        except KeyboardInterrupt:
            continue
        return


def lines(text: str, width: int, *, colours: bool) -> Iterator[str]:
    """Markdown laid out for a terminal of so many columns. `colours`: with bold and coloured words."""
    paint = _painted if colours else _unpainted
    for block in _blocks(_COMMENT.sub("", text)):
        first = block[0]
        if first.startswith("```"):
            yield from (f"    {line}" for line in block[1:-1])
        elif first.startswith("#"):
            yield from paint(f"**{first.lstrip('#').strip()}**", width, "", "")
        elif first.startswith("|"):
            yield from _table(block, width, paint)
        else:
            yield from _prose(block, width, paint)
        yield ""


def _blocks(text: str) -> Iterator[list[str]]:
    """What stands together: a heading, a paragraph, a list, a table, a block of code with its fences."""
    block: list[str] = []
    for line in text.splitlines():
        code = bool(block) and block[0].startswith("```")
        if block and (line.startswith("```") or not (line or code)):
            yield [*block, line] if code else block
            block = [line] if line and not code else []
        elif line or code:
            block.append(line)
    if block:
        yield block


def _prose(block: Sequence[str], width: int, paint: Paint) -> Iterator[str]:
    """A paragraph, or a list with its marks; lines are broken anew."""
    items: list[tuple[str, str]] = []  # mark, text
    for line in block:
        if found := _ITEM.fullmatch(line):
            items.append((found[1], found[2]))
        elif items:
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}")
        else:
            items.append(("", line))
    for mark, text in items:
        yield from paint(text, width, mark, " " * len(mark))


def _table(block: Sequence[str], width: int, paint: Paint) -> Iterator[str]:
    """In columns where they fit, else row by row: the first cell, and the others below it with their names."""
    head, _, *rows = ([cell.strip().replace("\\|", "|") for cell in _CELLS.split(line)[1:-1]] for line in block)
    widths = [max(len(_marks(row[column])[0]) for row in (head, *rows)) for column in range(len(head))]
    if sum(widths) + 2 * (len(widths) - 1) <= width:
        for row in ([f"**{name}**" if name else "" for name in head], *rows):
            padded = (
                "".join(paint(cell, width, "", "")) + " " * (wide - len(_marks(cell)[0]))
                for cell, wide in zip(row, widths, strict=True)
            )
            yield "  ".join(padded).rstrip()
        return
    for row in rows:
        yield from paint(f"**{_marks(row[0])[0]}**", width, "", "")
        for name, cell in zip(head[1:], row[1:], strict=True):
            if cell:
                yield from paint(f"{name}: {cell}" if name else cell, width, "    ", "      ")


def _unpainted(text: str, width: int, first: str, others: str) -> Iterator[str]:
    """Lines of at most `width` columns, the first one and the others with what stands before them; without marks."""
    return iter(_broken(_marks(text)[0], width, first, others))


def _painted(text: str, width: int, first: str, others: str) -> Iterator[str]:
    """As above, with bold and coloured words."""
    bare, styles = _marks(text)
    end = 0
    for line in _broken(bare, width, first, others):
        indent = first if end == 0 else others
        words = line[len(indent) :]
        start = bare.index(words, end)
        end = start + len(words)
        runs = itertools.groupby(zip(words, styles[start:end], strict=True), key=lambda pair: pair[1])
        parts = ((style, "".join(letter for letter, _ in pairs)) for style, pairs in runs)
        yield indent + "".join(f"{style}{part}{_END}" if style else part for style, part in parts)


def _broken(bare: str, width: int, first: str, others: str) -> list[str]:
    wrapped = textwrap.wrap(
        bare, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
    return wrapped or [first.rstrip()]


def _marks(text: str) -> tuple[str, list[str]]:
    """Text without its marks, single spaces between the words, and the style of each of its characters."""
    bare, styles, end = "", list[str](), 0
    text = " ".join(text.split())
    for found in _MARKED.finditer(text):
        inner = found["bold"] or found["code"] or _linked(found["link"], found["to"])
        style = _BOLD if found["bold"] else _CODE if found["code"] else _PLAIN
        if found["bold"] or found["link"]:
            inner = inner.replace("`", "")
        bare += text[end : found.start()] + inner
        styles += [_PLAIN] * (found.start() - end) + [style] * len(inner)
        end = found.end()
    bare += text[end:]
    return bare, styles + [_PLAIN] * (len(text) - end)


def _linked(text: str, to: str) -> str:
    """What a link is called, and the section that it leads to where that has another name; addresses as they are."""
    if to.startswith("http"):
        return f"{text} ({to})"
    section = to.partition("#")[2]
    return f"{text} (help {section})" if section and section != text.lower().replace(" ", "-") else text
