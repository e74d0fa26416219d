"""A TOML text as the lines it is laid out in, so that one key can be set or removed without touching another byte.

Its one rule: it moves whole pieces (a header, a key with its value, a comment, a blank line) and rewrites only the
value that is set. Whether the result means what was asked for is for the caller to prove; a ValueError says that no
place was found. tomlkit takes apart the one value that changes. It does not see the whole file, since in its tree the
comment above a header belongs to the table before it, and goes with that.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from functools import lru_cache
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import InlineTable, Item, Table

from vllm_proxy.domain.file.locate import KeyPath, Piece, pieces

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_INDENT = re.compile(r"[ \t]*")
_MODEL_DEPTH = 2  # ("models", ID)


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
            self._say_empty(path, old[0])
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
        """Whether a table at this path gets a header: one of a model that is written with headers itself."""
        model = path[:_MODEL_DEPTH]
        return len(path) == _MODEL_DEPTH + 1 and any(
            part.kind == "header" and part.path == model for part in self._parts
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

    def _say_empty(self, path: KeyPath, first: _Part) -> None:
        """Write that a table is there, in front of the first thing in it, which is about to go."""
        index = self._parts.index(first)
        if first.kind == "key" and first.outer < len(path):
            self._insert(index, self._key(first, path, {}))
        else:
            start = territory(self._kinds(), index)[0]
            self._insert(start, _Part("header", path, len(path), f"[{dotted(path)}]{self._newline}"))

    def _new_key(self, path: KeyPath, value: object) -> None:
        """Put a key behind the last one of its table, or of the nearest table around it that stands somewhere."""
        for depth in range(len(path) - 1, _MODEL_DEPTH - 1, -1):
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
        """Put a table with a header below the model's last one."""
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
    before, raw, behind = _split(part)
    old = tomllib.loads(f"x = {raw}")["x"]
    new = _changed(old, path[len(part.path) :], value)
    return before + _retold(raw, old, new) + behind


def _split(part: _Part) -> tuple[str, str, str]:
    """What is in front of a key's value, the value, and what is behind it."""
    try:
        item = _value_item(tomlkit.parse(part.text).body)
        raw, behind = item.as_string(), item.trivia.comment_ws + item.trivia.comment + item.trivia.trail
    except (TOMLKitError, StopIteration, RuntimeError) as error:
        msg = f"cannot take apart {dotted(part.path)}: {error}"
        raise ValueError(msg) from None
    if not part.text.endswith(raw + behind):
        msg = f"cannot take apart {dotted(part.path)}"
        raise ValueError(msg)
    return part.text[: len(part.text) - len(raw) - len(behind)], raw, behind


def _value_item(body: Sequence[tuple[Any, Item]]) -> Item:
    """The one value of a key, which may be dotted."""
    item = next(item for key, item in body if key is not None)
    return _value_item(item.value.body) if isinstance(item, Table) else item


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


def _retold(raw: str, old: object, new: object) -> str:
    """The text of a value that means `new`: what stays of an inline table keeps its text."""
    if same(old, new):
        return raw
    if isinstance(old, Mapping) and isinstance(new, Mapping) and new:
        spans = _entries(raw)
        if spans is not None and {key for key, *_ in spans} == old.keys():
            return _entries_retold(raw, spans, old, new)
        if "\n" in raw:
            msg = "a table in one line has dotted keys and a list over many lines; take it apart first"
            raise ValueError(msg)
    return rendered(new)


def _entries(raw: str) -> list[tuple[str, int, int, int]] | None:
    """(key, its start, its value's start and end) for each in an inline table; None where they cannot be told apart."""
    item = tomlkit.parse(f"x = {raw}").item("x")
    if not isinstance(item, InlineTable):
        return None
    result, position = [], 1
    for key, value in item.value.body:
        if key is None:
            continue
        if key.is_dotted():
            return None
        start = raw.find(key.as_string(), position)
        begin = raw.find(value.as_string(), start + len(key.as_string()))
        if start < 0 or begin < 0:
            return None
        position = begin + len(value.as_string())
        result.append((key.key, start, begin, position))
    return result or None  # an empty one is written anew


def _entries_retold(
    raw: str, spans: Sequence[tuple[str, int, int, int]], old: Mapping[str, Any], new: Mapping[str, Any]
) -> str:
    text, between = raw[: spans[0][1]], ""
    for number, (key, start, begin, end) in enumerate(spans):
        if key in new:
            between = between and raw[spans[number - 1][3] : start]
            text += between + raw[start:begin] + _retold(raw[begin:end], old[key], new[key])
            between = ", "
    for key, value in new.items():
        if key not in old:
            text += f"{between}{dotted([key])} = {rendered(value)}"
            between = ", "
    return text + raw[spans[-1][3] :]


def same(one: object, other: object) -> bool:
    """Whether two TOML values mean the same: `1`, `1.0` and `true` do not, and `nan` means `nan`."""
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (repr(one) == repr(other) if isinstance(one, float) else one == other)


def dotted(path: Sequence[str]) -> str:
    """A key path as TOML writes it."""
    return ".".join(part if _BARE.fullmatch(part) else rendered(part) for part in path)


def rendered(value: object) -> str:
    """A value as TOML, in one line."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{dotted([key])} = {rendered(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(rendered, value))}]"
    return value.isoformat() if isinstance(value, date | time) else repr(value)
