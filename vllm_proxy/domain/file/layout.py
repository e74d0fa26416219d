"""A TOML text as a sequence of pieces, in which one key can be set or removed without touching another byte.

For `edit`. Moves whole pieces (a header, a key with its value, a comment, a blank line) and rewrites only the value
that is set; raises ValueError where it finds no place. Does not check that the result means what was asked for: `edit`
does.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vllm_proxy.domain.file.lexer import Entry, Piece, entries, pieces, value_span
from vllm_proxy.domain.toml import KeyPath, dotted, rendered, same

_INDENT = re.compile(r"[ \t]*")
_NAMED_DEPTH = 2  # ("models", ID), ("keys", NAME)


@lru_cache(maxsize=4)
def scanned(text: str) -> tuple[Piece, ...]:
    """The pieces of a text; the next edit mostly begins where the last one has ended."""
    return tuple(pieces(text))


@dataclass(slots=True, eq=False)
class _Part:
    kind: str  # as a Piece's
    path: KeyPath
    outer: int
    text: str

    @property
    def is_comment(self) -> bool:
        return self.kind == "other" and bool(self.text.strip())

    @property
    def is_blank(self) -> bool:
        return self.kind == "other" and not self.text.strip()


def territory(kinds: Sequence[str], first: int) -> tuple[int, int]:
    """What goes when the table goes whose header is at `first`: from, to (exclusive), as indexes.

    `kinds` has one of `header`, `key`, `comment`, `blank` for each piece. The comments directly above the header belong
    to the table, and so do those directly below its last key, unless another header stands directly below them. A blank
    line separates.
    """
    start = first
    while start and kinds[start - 1] == "comment":
        start -= 1
    stop = first + 1
    while stop < len(kinds) and kinds[stop] != "header":
        stop += 1
    end = max(index for index in range(first, stop) if kinds[index] in {"header", "key"}) + 1
    below = end
    while below < stop and kinds[below] == "comment":
        below += 1
    return start, end if below == stop < len(kinds) else below


class Layout:
    """One text, changed key by key."""

    def __init__(self, text: str) -> None:
        self._parts = [_Part(item.kind, item.path, item.outer, text[item.start : item.end]) for item in scanned(text)]
        first_line, newline, _ = text.partition("\n")
        self._newline = "\r\n" if newline and first_line.endswith("\r") else "\n"

    def text(self) -> str:
        """As it is now."""
        return "".join(part.text for part in self._parts)

    def set(self, path: KeyPath, value: object) -> None:
        """Give a key this value, in its place where it has one.

        Raises:
            ValueError: when there is no place for it.

        """
        for part in self._parts:
            if part.kind == "key" and _below(path, part.path):  # this key, or a table in one line around it
                part.text = _with_value(part, path, value)
                return
        old = self._spread(path)
        own = [part for part in old if part.kind == "header" and part.path == path]
        if value == {} and own and not own[0].text.lstrip().startswith("[["):
            old.remove(own[0])  # the header alone says so
        elif value == {} and old:
            self._write_empty(path, old[0])
        elif isinstance(value, Mapping) and value and self._headed(path):
            self._new_table(path, value)
        else:
            self._new_key(path, value)
        self._drop(old)

    def remove(self, path: KeyPath) -> None:
        """Without a key, or a table however it is spread."""
        for part in self._parts:
            if part.kind == "key" and part.path != path and _below(path, part.path):
                part.text = _with_value(part, path, None)
                return
        self._drop(self._spread(path))

    def append(self, path: KeyPath, keys: Mapping[str, Any]) -> None:
        """A new table at the end; tables in it get headers of their own."""
        for part in self._parts:
            if part.kind == "key" and _below(path, part.path):  # models = { ... }
                part.text = _with_value(part, path, keys)
                return
        plain = {key: value for key, value in keys.items() if not isinstance(value, Mapping) or not value}
        self._add_table(len(self._parts), path, plain)
        for name in keys:
            if name not in plain:
                self._add_table(len(self._parts), (*path, name), keys[name])

    # What is there

    def _kinds(self) -> list[str]:
        return ["comment" if part.is_comment else "blank" if part.is_blank else part.kind for part in self._parts]

    def _spread(self, path: KeyPath) -> list[_Part]:
        """Each header and key at or below a path."""
        return [part for part in self._parts if part.kind != "other" and _below(part.path, path)]

    def _headed(self, path: KeyPath) -> bool:
        """Whether a table at this path gets a header: one in a model or key that is written with headers itself."""
        outer = path[:_NAMED_DEPTH]
        return len(path) == _NAMED_DEPTH + 1 and any(
            part.kind == "header" and part.path == outer for part in self._parts
        )

    # What changes

    def _drop(self, parts: Sequence[_Part]) -> None:
        """Take these out, headers with their territory, and the blank lines that nothing separates any more."""
        kinds, gone = self._kinds(), set[int]()
        for index, part in enumerate(self._parts):
            if part in parts:
                gone |= set(range(*territory(kinds, index))) if part.kind == "header" else {index}
        kept: list[_Part] = []
        closing = False  # a table has gone here
        for index, part in enumerate(self._parts):
            if index in gone:
                closing = closing or kinds[index] == "header"
            elif not (closing and part.is_blank and (not kept or kept[-1].is_blank)):
                closing = False
                kept.append(part)
        while closing and kept and kept[-1].is_blank:
            kept.pop()
        self._parts = kept

    def _write_empty(self, path: KeyPath, first: _Part) -> None:
        """Write that a table is there, in front of the first thing in it, which is about to go."""
        index = self._parts.index(first)
        if first.kind == "key" and first.outer < len(path):
            self._insert(index, self._key(first, path, {}))
        else:
            start = territory(self._kinds(), index)[0]
            self._insert(start, _Part("header", path, len(path), f"[{dotted(path)}]{self._newline}"))

    def _new_key(self, path: KeyPath, value: object) -> None:
        """Put a key behind the last one of its table, or of the nearest table around it that stands somewhere."""
        for depth in range(len(path) - 1, _NAMED_DEPTH - 1, -1):
            outer = path[:depth]
            if (index := self._last_of(outer)) is not None:
                self._insert(index + 1, self._key(self._parts[index], path, value))
                return
            below = [part for part in self._parts if part.kind == "header" and _below(part.path, outer)]
            if below:  # [models.a.args] alone: [models.a] comes in front of it
                start = territory(self._kinds(), self._parts.index(below[0]))[0]
                lines = [f"[{dotted(outer)}]", f"{dotted(path[depth:])} = {rendered(value)}", ""]
                head = [_Part("header", outer, depth, lines[0] + self._newline)]
                head += [_Part("key", path, depth, lines[1] + self._newline), _Part("other", (), 0, self._newline)]
                self._parts[start:start] = head
                return
        msg = f"found no place for {dotted(path)}"
        raise ValueError(msg)

    def _last_of(self, table: KeyPath) -> int | None:
        """The last key below a table's own header, or the header; else the last dotted key that names the table."""
        headers = [n for n, part in enumerate(self._parts) if part.kind == "header" and part.path == table]
        if headers:
            last = headers[-1]
            for index in range(last + 1, len(self._parts)):
                if self._parts[index].kind == "header":
                    break
                if self._parts[index].kind == "key":
                    last = index
            return last
        named = [
            n
            for n, part in enumerate(self._parts)
            if part.kind == "key" and part.outer < len(table) and _below(part.path, table)
        ]
        return named[-1] if named else None

    def _key(self, beside: _Part, path: KeyPath, value: object) -> _Part:
        """A line for a key that shares the header, and the indentation, of the part beside it."""
        indent = _INDENT.match(beside.text)
        assert indent is not None, "it matches the empty string"
        line = f"{indent[0]}{dotted(path[beside.outer :])} = {rendered(value)}{self._newline}"
        return _Part("key", path, beside.outer, line)

    def _new_table(self, path: KeyPath, value: Mapping[str, Any]) -> None:
        """Put a table with a header below the last one of the table around it."""
        kinds = self._kinds()
        last = max(n for n, part in enumerate(self._parts) if kinds[n] == "header" and _below(part.path, path[:-1]))
        self._add_table(territory(kinds, last)[1], path, value)

    def _add_table(self, index: int, path: KeyPath, keys: Mapping[str, Any]) -> None:
        new = [_Part("header", path, len(path), f"[{dotted(path)}]{self._newline}")]
        for key, value in keys.items():
            line = f"{dotted([key])} = {rendered(value)}{self._newline}"
            new.append(_Part("key", (*path, key), len(path), line))
        if index and any(not part.is_blank for part in self._parts[:index]) and not self._parts[index - 1].is_blank:
            new.insert(0, _Part("other", (), 0, self._newline))
        if index < len(self._parts) and not self._parts[index].is_blank:
            new.append(_Part("other", (), 0, self._newline))
        self._insert(index, *new)

    def _insert(self, index: int, *new: _Part) -> None:
        if index and not self._parts[index - 1].text.endswith("\n"):  # the end of a file without one
            self._parts[index - 1].text += self._newline
        self._parts[index:index] = new


def _below(path: KeyPath, of: KeyPath) -> bool:
    return path[: len(of)] == of


# Values


def _with_value(part: _Part, path: KeyPath, value: object) -> str:
    """The text of a key with another value at a path at or below it; None removes what is there."""
    begin, end = value_span(part.text)
    raw = part.text[begin:end]
    old = tomllib.loads(f"x = {raw}")["x"]
    new = _changed(old, path[len(part.path) :], value)
    return part.text[:begin] + _rewritten(raw, old, new) + part.text[end:]


def _changed(old: object, path: KeyPath, value: object) -> object:
    if not path:
        return value
    if not isinstance(old, Mapping):
        msg = f"found no table for {dotted(path)}"
        raise ValueError(msg)  # noqa: TRY004 - of the file, not of the caller
    rest = {key: item for key, item in old.items() if key != path[0] or len(path) > 1 or value is not None}
    if len(path) > 1 or value is not None:
        rest[path[0]] = _changed(old.get(path[0], {}), path[1:], value)
    return rest


def _rewritten(raw: str, old: object, new: object) -> str:
    """The text of a value that means `new`: what stays of an inline table keeps its text."""
    if same(old, new):
        return raw
    if isinstance(old, Mapping) and isinstance(new, Mapping) and new:
        found = entries(raw)
        if found and all(len(entry.path) == 1 for entry in found):
            return _entries_rewritten(raw, found, old, new)
        if "\n" in raw:
            msg = "a table in one line has dotted keys and a list over many lines; take it apart first"
            raise ValueError(msg)
    return rendered(new)


def _entries_rewritten(raw: str, found: Sequence[Entry], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    text, between = raw[: found[0].start], ""
    for number, entry in enumerate(found):
        (key,) = entry.path
        if key in new:
            between = between and raw[found[number - 1].end : entry.start]
            text += (
                between + raw[entry.start : entry.value] + _rewritten(raw[entry.value : entry.end], old[key], new[key])
            )
            between = ", "
    for key, value in new.items():
        if key not in old:
            text += f"{between}{dotted([key])} = {rendered(value)}"
            between = ", "
    return text + raw[found[-1].end :]
