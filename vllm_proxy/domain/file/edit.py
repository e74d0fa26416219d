"""Edits one named table, a model or a key, in a TOML text, and leaves everything else as it is, byte for byte.

Every edit verifies itself before it is returned: the new text is parsed and compared with what was asked for, and every
line and comment that the change does not concern must still be there. A change that cannot be put into the file is an
`EditError`, never a damaged file (tests/domain/test_edit.py, with generated files).

What goes with a table: the comments directly above its header, those between its keys, and those directly below its
last key, unless another header stands directly below them. A blank line separates. What goes with a key: its line. A
list that changes is written anew; the comment behind it stays, those inside it go. A comment above a key stays.
"""

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from functools import lru_cache
from typing import Any

from vllm_proxy.domain.args import option_name
from vllm_proxy.domain.file.layout import Layout, scanned, territory
from vllm_proxy.domain.file.lexer import Piece, comments
from vllm_proxy.domain.toml import KeyPath, dotted, same
from vllm_proxy.domain.units import show
from vllm_proxy.errors import VllmProxyError

type Table = Mapping[str, Any]
type TableName = tuple[str, str]  # ("models", "chat"), ("keys", "ci")

_LEAST, _MOST = -(2**63), 2**63 - 1
_DEEPEST = 50  # tables and lists within each other; tomllib gives up at some hundreds
_GONE = object()


class EditError(VllmProxyError):
    """A change that cannot be put into this file; the message says why. `path`: of the value, where it is one's."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def tables_in(text: str, kind: str) -> dict[str, Any]:
    """All tables of a kind ("models", "keys"), by name. To be read alone.

    Raises:
        EditError: when the text is no TOML.

    """
    found = _parsed(text).get(kind, {})
    if not isinstance(found, dict):
        msg = f"cannot write the file: {kind} is no table in it"
        raise EditError(msg)
    return found


def create(text: str, name: TableName, keys: Table) -> str:
    """With a table that is not there yet, at the end of the file; a key that is null, at any depth, is none.

    Raises:
        EditError: when it cannot be put there.

    """
    _check(keys, _checked(name))
    if name[1] in tables_in(text, name[0]):
        msg = f"cannot write {_shown(name)}: there is one already"
        raise EditError(msg)
    return _edited(text, name, _merged({}, keys))


def put(text: str, name: TableName, keys: Table) -> str:
    """With these keys for a table that is there, and no others. A key that is null, at any depth, is none.

    Raises:
        EditError: when the keys cannot be put there.

    """
    _check(keys, _checked(name))
    return _edited(text, name, _merged({}, spelled_as(_table(text, name), keys)))


def patch(text: str, name: TableName, change: Table) -> str:
    """With a JSON merge patch (RFC 7396) applied to a table that is there. Values may be what TOML alone has: dates.

    Raises:
        EditError: when the result cannot be put there.

    """
    _check(change, _checked(name))
    old = _table(text, name)
    return _edited(text, name, _merged(old, spelled_as(old, change)))


def delete(text: str, name: TableName) -> str:
    """Without a table that is there.

    Raises:
        EditError: when it cannot be taken out.

    """
    _table(text, name)
    return _edited(text, name, None)


@lru_cache(maxsize=4)
def _parsed(text: str) -> dict[str, Any]:
    """To be read alone: the next edit mostly begins where the last one has ended."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        msg = f"cannot write the file: it would be no TOML: {error}"
        raise EditError(msg) from None


def _table(text: str, name: TableName) -> Table:
    found = tables_in(text, name[0]).get(name[1])
    if not isinstance(found, dict):
        msg = f"cannot write {_shown(name)}: the file has no table of that name"
        raise EditError(msg)
    return found


def _shown(name: TableName) -> str:
    """For messages: `model "chat"`."""
    return f"{name[0].removesuffix('s')} {show(name[1])}"


# What is asked for, as plain values


def _checked(name: TableName) -> str:
    """The name as TOML spells it, once it is known that it can."""
    _check_text(name[1], name[0])
    return dotted(name)


def _check(value: object, path: str, *, depth: int = 0, in_list: bool = False) -> None:
    """Raise for what TOML cannot hold. A null says that a key goes, but within a list there is nothing to go."""
    if isinstance(value, Mapping | list) and depth > _DEEPEST:
        raise _unwritable(path, f"more than {_DEEPEST} tables and lists are nested in each other")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_text(key, path)
            _check(item, f"{path}.{dotted([key])}", depth=depth + 1, in_list=in_list)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]", depth=depth + 1, in_list=True)
    elif isinstance(value, str):
        _check_text(value, path)
    elif value is not None or in_list:
        _check_plain(value, path)


def _check_plain(value: object, path: str) -> None:
    if value is None:
        raise _unwritable(path, "TOML has no null, and a list cannot do without one of its values")
    if isinstance(value, int) and not _LEAST <= value <= _MOST:
        raise _unwritable(path, "TOML has no integers of more than 64 bits")
    if isinstance(value, date | time):
        return
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _unwritable(path, f"JSON has no {value!r}")


def _check_text(text: str, path: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _unwritable(path, "TOML has no half of a surrogate pair")


def _unwritable(path: str, reason: str) -> EditError:
    return EditError(f"cannot write {path}: {reason}", path)


def _merged(target: object, change: object) -> Any:  # noqa: ANN401 - JSON
    """RFC 7396, word for word; merged into nothing, it is the change without its nulls."""
    if not isinstance(change, Mapping):
        return change
    result = dict(target) if isinstance(target, Mapping) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


def spelled_as(old: Table, new: Table) -> Table:
    """The options in `args` as the file spells them: `a_b` and `a-b` are one. A value counts for more than a null."""
    options, before = new.get("args"), old.get("args")
    if not isinstance(options, Mapping) or not isinstance(before, Mapping):
        return new
    spelling: dict[str, str] = {option_name(key): key for key in before}
    named: dict[str, Any] = {}
    key: str
    for key, value in options.items():
        name = key if key in before else spelling.get(option_name(key), key)
        if value is not None and named.get(name) is not None:
            msg = f"cannot write args: {show(key)} is given twice, spelled differently"
            raise EditError(msg)
        named[name] = named.get(name) if value is None else value
    return {**new, "args": named}


def _differences(at: KeyPath, old: Table, new: Table) -> Iterator[tuple[KeyPath, Any]]:
    """Each key to set, and each to remove (_GONE), as near to the leaves as possible; what is set comes first."""
    if not new and old:
        yield at, {}
        return
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            yield from _differences((*at, key), before, value)
        elif key not in old or not same(before, value):
            yield (*at, key), value
    yield from (((*at, key), _GONE) for key in old if key not in new)


# The text, and the proof of it


def _edited(text: str, name: TableName, wanted: Table | None) -> str:
    before = _parsed(text)
    old = tables_in(text, name[0]).get(name[1])
    layout = Layout(text)
    try:
        if wanted is None:
            layout.remove(name)
        elif old is None:
            layout.append(name, wanted)
        else:
            for where, value in _differences(name, old, wanted):
                if value is _GONE:
                    layout.remove(where)
                else:
                    layout.set(where, value)
    except ValueError as error:
        msg = f"cannot write {_shown(name)} into the file as it is laid out: {error}"
        raise EditError(msg) from None
    result = layout.text()
    _verify(before, text, result, name, wanted)
    return result


def _verify(before: Table, old: str, new: str, name: TableName, wanted: Table | None) -> None:
    """Raise unless the new text means what was asked for, and has every line and comment that is not its business."""
    kind = name[0]
    tables = {other: table for other, table in before.get(kind, {}).items() if other != name[1]}
    if wanted is not None:
        tables[name[1]] = wanted
    asked = {**before, kind: tables}
    wrong = ""
    if not same(asked, {kind: {}, **_parsed(new)}):
        wrong = "it would mean something else"
    elif _other_lines(old, name) != _other_lines(new, name):
        wrong = "a line of another table would change"
    else:
        before_it = [comment for _, comment in comments(old)]
        there = [comment for _, comment in comments(new)]
        if not (_within(_comments_to_stay(old, before, asked, name), there) and _within(there, before_it)):
            wrong = "a comment would be lost"
    if wrong:
        msg = f"cannot write {_shown(name)} into the file as it is laid out: {wrong}; edit the file itself"
        raise EditError(msg)


def _within(some: Sequence[str], of: Sequence[str]) -> bool:
    """Whether all of the one are in the other, in their order."""
    rest = iter(of)
    return all(item in rest for item in some)


def _other_lines(text: str, path: KeyPath) -> list[str]:
    """Headers and keys of everything else; a line around the table's own, `models = { ... }`, is its own too."""
    found = [
        text[piece.start : piece.end]
        for piece in scanned(text)
        if piece.kind != "other"
        and piece.path[: len(path)] != path
        and (piece.kind == "header" or path[: len(piece.path)] != piece.path)
    ]
    return [line if line.endswith("\n") else line + ("\r\n" if "\r\n" in text else "\n") for line in found]


def _comments_to_stay(text: str, before: Table, asked: Table, name: KeyPath) -> list[str]:
    """The comments of the old text that have no part in the change."""
    found = scanned(text)
    kinds = [
        piece.kind if piece.kind != "other" else "comment" if text[piece.start : piece.end].strip() else "blank"
        for piece in found
    ]
    spans: list[tuple[int, int]] = []  # in which comments may go
    for index, piece in enumerate(found):
        if piece.kind == "other" or piece.path[:2] != name[: len(piece.path)]:
            continue
        was, reached = _at(before, piece.path)
        now, still = _at(asked, piece.path)
        whole = now is _GONE or reached != still  # gone, or something else took the place of a table around it
        if not whole and (same(was, now) or (piece.kind == "header" and isinstance(now, Mapping))):
            continue
        if piece.kind == "header":
            first, last = territory(kinds, index)
            spans.append((found[first].start, found[last - 1].end))
        elif whole or reached < len(piece.path):
            spans.append((piece.start, piece.end))
        else:
            spans.append((piece.start, _last_line(text, piece)))
    return [comment for at, comment in comments(text) if not any(start <= at < end for start, end in spans)]


def _at(data: Table, path: KeyPath) -> tuple[object, int]:
    """What is at a path, or the first thing on the way that is no table; and how far that was."""
    value: object = data
    for depth, part in enumerate(path):
        if not isinstance(value, Mapping):
            return value, depth
        value = value.get(part, _GONE)
    return value, len(path)


def _last_line(text: str, piece: Piece) -> int:
    """Where the last line of a piece begins: the comment there is behind the value, not within it."""
    return max(piece.start, text.rfind("\n", piece.start, piece.end - 1) + 1)
