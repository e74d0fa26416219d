"""(TOML text, change of one model) -> TOML text. What the change is not about stays byte for byte.

Its one rule: it proves itself. The new text is parsed and compared with what was asked for before anybody sees it; a
change that cannot be put into the file is an error, never a damaged file.

The text is cut into headers, keys and what stands between them; only the pieces of one model are touched. tomlkit
edits the few that hold a table within a line. A block of comments directly above a header belongs to that table and
goes with it; one that a blank line separates from it stays, and so does one above a key.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from vllm_proxy.domain import args
from vllm_proxy.domain.config import differ
from vllm_proxy.domain.locate import KeyPath, Piece, pieces
from vllm_proxy.errors import VllmProxyError

type Table = Mapping[str, Any]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_LEAST, _MOST = -(2**63), 2**63 - 1
_MODEL_DEPTH = 2  # ("models", ID)


class EditError(VllmProxyError):
    """A change that cannot be put into this file; the message says why."""


def models_in(text: str) -> dict[str, Any]:
    """The tables of all models, by id."""
    found = _parsed(text).get("models", {})
    return found if isinstance(found, dict) else {}


@lru_cache(maxsize=4)
def _parsed(text: str) -> dict[str, Any]:
    """To be read alone: the next edit mostly begins where the last one has ended."""
    return tomllib.loads(text)


def create(text: str, model_id: str, keys: Table) -> str:
    """With a model that is not there yet, at the end of the file.

    Raises:
        EditError: when it cannot be put there.

    """
    return _edited(text, model_id, _without_nulls(keys))


def put(text: str, model_id: str, keys: Table) -> str:
    """With these keys for a model that is there, and no others. A key that is null, at any depth, is none.

    Raises:
        EditError: when the keys cannot be put there.

    """
    return _edited(text, model_id, _spelled_as(models_in(text)[model_id], _without_nulls(keys)))


def patch(text: str, model_id: str, change: Table) -> str:
    """With a JSON merge patch (RFC 7396) applied to a model that is there.

    Raises:
        EditError: when the result cannot be put there.

    """
    old = models_in(text)[model_id]
    return _edited(text, model_id, _merged(old, _spelled_as(old, change)))


def delete(text: str, model_id: str) -> str:
    """Without a model that is there.

    Raises:
        EditError: when it cannot be taken out.

    """
    return _edited(text, model_id, None)


# What is asked for, as plain values


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _merged(target: object, change: object) -> Any:  # noqa: ANN401 - JSON
    if not isinstance(change, Mapping):
        return change
    result = dict(target) if isinstance(target, Mapping) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


def _spelled_as(old: Table, new: Table) -> Table:
    """The options in `args` are written as the file spells them: `a_b` and `a-b` are one."""
    options, before = new.get("args"), old.get("args")
    if not isinstance(options, Mapping) or not isinstance(before, Mapping):
        return new
    spelling = {args.option_name(key): key for key in before}
    return {**new, "args": {spelling.get(args.option_name(key), key): value for key, value in options.items()}}


def _edited(text: str, model_id: str, wanted: Table | None) -> str:
    path = ("models", model_id)
    before = _parsed(text)
    old = models_in(text).get(model_id)
    result = text
    if wanted is None:
        result = _removed(text, path)
    elif old is None:
        result = _appended(text, path, wanted)
    else:
        for where, value in _differences(path, old, wanted):
            result = _removed(result, where) if value is None else _set(result, where, value)
    _prove(before, result, model_id, wanted)
    return result


def _differences(at: KeyPath, old: Table, new: Table) -> Iterator[tuple[KeyPath, Any]]:
    """Each key to set, and each to remove (None), the nearest to the leaves that is possible."""
    for key in old:
        if key not in new:
            yield (*at, key), None
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping) and value:
            yield from _differences((*at, key), before, value)
        elif key not in old or differ(before, value):
            yield (*at, key), value


def _prove(before: Table, text: str, model_id: str, wanted: Table | None) -> None:
    tables = {name: table for name, table in before.get("models", {}).items() if name != model_id}
    if wanted is not None:
        tables[model_id] = wanted
    try:
        after = _parsed(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        msg = f"cannot put this into the file as it is laid out: {error}"
        raise EditError(msg) from None
    if differ(_pruned({**before, "models": tables}), _pruned(after)):
        msg = f"cannot change model {model_id} in the file as it is laid out: edit the file itself"
        raise EditError(msg)


def _pruned(value: Any) -> Any:  # noqa: ANN401 - TOML
    """Without empty tables, which mean as much as none."""
    if not isinstance(value, Mapping):
        return value
    rest = {key: _pruned(item) for key, item in value.items()}
    return {key: item for key, item in rest.items() if item != {}}


# The text


@dataclass(frozen=True, slots=True)
class _Section:
    """A header with what stands below it, up to the next; the first one, of the root, has no header."""

    path: KeyPath
    pieces: tuple[Piece, ...]

    @property
    def end(self) -> int:
        """Behind its last key, or its header: what follows are blank lines and comments of what comes next."""
        return max((piece.end for piece in self.pieces if piece.kind != "other"), default=0)


@lru_cache(maxsize=4)
def _pieces(text: str) -> tuple[Piece, ...]:
    return tuple(pieces(text))


def _sections(text: str) -> list[_Section]:
    sections: list[list[Piece]] = [[]]
    for piece in _pieces(text):
        if piece.kind == "header":
            sections.append([])
        sections[-1].append(piece)
    return [_Section(found[0].path[: found[0].outer] if found else (), tuple(found)) for found in sections]


def _keys(text: str) -> list[Piece]:
    return [piece for piece in _pieces(text) if piece.kind == "key"]


def _below(path: KeyPath, of: KeyPath) -> bool:
    return path[: len(of)] == of


def _set(text: str, path: KeyPath, value: object) -> str:
    """With a value at a path, where there may be another."""
    for piece in _keys(text):
        if _below(path, piece.path):  # it is this key's, or within its table
            return _in_line(text, piece, path, value)
    text = _removed(text, path)  # a table that is spread over lines
    headed = len(path) == _MODEL_DEPTH + 1 and any(found.path == path[:-1] for found in _sections(text))
    if isinstance(value, Mapping) and value and headed:
        return _new_section(text, path, value)
    return _new_key(text, path, value)


def _in_line(text: str, piece: Piece, path: KeyPath, value: object) -> str:
    """With a value set, or removed where it is None, within one key's own value."""
    try:
        document = tomlkit.parse(text[piece.start : piece.end])
        container: Any = document
        parts = (*piece.path[piece.outer :], *path[len(piece.path) :])
        for part in parts[:-1]:
            container = container[part]
        if value is None:
            del container[parts[-1]]
        else:
            container[parts[-1]] = tomlkit.parse(f"x = {_rendered(value)}")["x"]
        return text[: piece.start] + tomlkit.dumps(document) + text[piece.end :]
    except (TOMLKitError, KeyError, TypeError, AttributeError) as error:
        msg = f"cannot change {'.'.join(path)} in the file as it is laid out: {error}"
        raise EditError(msg) from None


def _new_key(text: str, path: KeyPath, value: object) -> str:
    """With a key behind the last one of the table that it belongs to, or behind its nearest relation."""
    for depth in range(len(path) - 1, 0, -1):
        outer = path[:depth]
        at = [found for found in _sections(text)[1:] if found.path == outer]
        if at:
            return _inserted(text, at[-1].end, path[depth:], value)
        near = [piece for piece in _keys(text) if _below(piece.path, outer)]
        if near:
            return _inserted(text, near[-1].end, path[near[-1].outer :], value)
        if depth == _MODEL_DEPTH and (sub := [found for found in _sections(text)[1:] if _below(found.path, outer)]):
            return _with_header(text, sub[0], path, value)  # [models.a.args] alone: [models.a] comes in front of it
    msg = f"cannot find where {'.'.join(path)} belongs in the file"
    raise EditError(msg)


def _inserted(text: str, position: int, key: Sequence[str], value: object) -> str:
    line = f"{_dotted(key)} = {_rendered(value)}{_newline(text)}"
    before = text[:position]
    if before and not before.endswith("\n"):
        before += _newline(text)
    return before + line + text[position:]


def _with_header(text: str, behind: _Section, path: KeyPath, value: object) -> str:
    start, end = behind.pieces[0].start, _newline(text)
    head = f"[{_dotted(path[:_MODEL_DEPTH])}]{end}{_dotted(path[_MODEL_DEPTH:])} = {_rendered(value)}{end}{end}"
    return text[:start] + head + text[start:]


def _new_section(text: str, path: KeyPath, value: Table) -> str:
    """With a table of its own below the model's last one."""
    last = [found for found in _sections(text) if _below(found.path, path[:_MODEL_DEPTH])][-1]
    end = _newline(text)
    before = text[: last.end]
    if not before.endswith("\n"):
        before += end
    lines = [f"[{_dotted(path)}]", *(f"{_dotted([key])} = {_rendered(item)}" for key, item in value.items())]
    return before + end + "".join(f"{line}{end}" for line in lines) + text[last.end :]


def _appended(text: str, path: KeyPath, keys: Table) -> str:
    for piece in _keys(text):
        if piece.path == path[:1]:  # models = { ... }
            return _in_line(text, piece, path, keys)
    end = _newline(text)
    plain = {key: value for key, value in keys.items() if not isinstance(value, Mapping) or not value}
    tables = {key: value for key, value in keys.items() if key not in plain}
    lines = [f"[{_dotted(path)}]", *(f"{_dotted([key])} = {_rendered(value)}" for key, value in plain.items())]
    for name, table in tables.items():
        lines += ["", f"[{_dotted((*path, name))}]"]
        lines += [f"{_dotted([key])} = {_rendered(value)}" for key, value in table.items()]
    gap = "" if not text.strip() else end if text.endswith("\n") else end * 2
    return text + gap + "".join(f"{line}{end}" for line in lines)


def _removed(text: str, path: KeyPath) -> str:
    """Without a key, or a table however it is spread."""
    for piece in _keys(text):
        if piece.path != path and _below(path, piece.path):
            return _in_line(text, piece, path, None)
    cuts: list[tuple[int, int]] = []
    before: _Section | None = None
    for section in _sections(text):
        if section.path and _below(section.path, path):
            cuts.append((_comment_start(section, before), section.end))
        else:
            cuts += [(piece.start, piece.end) for piece in section.pieces
                     if piece.kind == "key" and _below(piece.path, path)]  # fmt: skip
        before = section
    for start, end in reversed(cuts):
        text = _joined(text[:start], text[end:], table=text[start:end].lstrip().startswith(("[", "#")))
    return text


def _comment_start(section: _Section, before: _Section | None) -> int:
    """Where the comments begin that stand directly above a header."""
    start = section.pieces[0].start
    for piece in reversed(before.pieces if before else ()):
        if piece.kind != "other" or piece.end - piece.start <= len("\r\n"):
            break
        start = piece.start
    return start


def _joined(before: str, after: str, *, table: bool) -> str:
    """What stands around a table that is gone, with the blank lines of one of the two."""
    if table and (not before.strip() or before.endswith(("\n\n", "\n\r\n"))):
        after = after.lstrip("\r\n")
        if not after:
            before = before.rstrip("\r\n") + (_newline(before) if before.strip() else "")
    return before + after


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _dotted(path: Sequence[str]) -> str:
    return ".".join(part if _BARE.fullmatch(part) else _rendered(part) for part in path)


def _rendered(value: object) -> str:
    """A JSON value as TOML, in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            msg = "cannot write half a surrogate pair as TOML"
            raise EditError(msg)
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int) and _LEAST <= value <= _MOST:
        return str(value)
    if isinstance(value, float) and value == value and abs(value) != float("inf"):  # noqa: PLR0124 - not NaN
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_dotted([key])} = {_rendered(item)}' for key, item in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_rendered(item) for item in value)}]"
    what = "null within a list" if value is None else f"{value!r}"
    msg = f"cannot write {what} as TOML"
    raise EditError(msg)
