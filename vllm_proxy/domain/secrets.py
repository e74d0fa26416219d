"""Decides which values of a configuration are secrets, and hides them: "***" in JSON, in messages, in lines of a log.

A secret is each value of an `env` table, and text under a key that names one (`is_secret_name`), at any depth. What
names a file or a systemd credential instead of holding a value is no secret (`is_reference`). "***" that comes back
stands for the value that is there (`restored`).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, TypeIs
from urllib.parse import quote

from vllm_proxy.domain import units
from vllm_proxy.domain.keys import LEAST_CHARACTERS, name_problem
from vllm_proxy.domain.toml import KeyPath, same

type Table = Mapping[str, Any]  # of TOML, or of JSON
# Where a value stands: a model's table, its adapters by id, anywhere, a table of the environment, a value in one, below
# a key that names a secret.
type _Place = Literal["model", "ids", "open", "env", "variable", "secret"]

HIDDEN = "***"
SHORTEST = 8  # characters of a secret that is looked for in texts: a shorter one would hide half of the words

# Not `tokenizer` and its like, nor `keyword`: what they hold is no secret, and people need to see it.
_NAMES = re.compile(r"token(?!i[sz])|key(?!word|board)|secret|password|credential", re.IGNORECASE)
_TOKENS = re.compile(r"tokens\Z", re.IGNORECASE)
_COUNT = re.compile(r"\d{1,9}(\.\d{1,3})?[kKmMgG]?")  # `max_num_batched_tokens = "8k"`
_PASSWORD = re.compile(r"(?<=://)([^\s/?#@:]*:)([^\s/?#@]+)(?=@)")
# `HF_TOKEN=...`, `--api-key=...`: a word of a command, or such a word in the place of a name.
_ASSIGNMENT = re.compile(r"(-{0,2}[A-Za-z_][\w.-]*[=\s])(.+)", re.DOTALL)
_HEADER = re.compile(r"\s*\[{1,2}\s*(server|engine|defaults|models|keys)\b")
_ANY_HEADER = re.compile(r"\s*\[[^,]*\]\s*(#.*)?$")
_OF_A_SECRET = re.compile(r"\b(env|keys|hash)\b|\bvp-|\bsha256:")
_COMMENT = re.compile(r"(?:^|\s)#(?:\s.*)?$")
_REFERENCES = frozenset({"file", "credential"})
_TABLES = ("env", "args", "metadata", "command")  # of a model: where secrets may stand
_NOTHING = object()
_BRANCHES = 6  # levels of a pattern that branch by their next characters; below, all alternatives stand side by side


def is_secret_name(key: str) -> bool:
    """Whether a key, an option or a variable names a secret: `api_key`, `hf-token`, `dbPassword`, `AWS_SECRET`."""
    return _NAMES.search(key) is not None


def is_reference(value: object) -> TypeIs[Mapping[str, str]]:
    """Whether a value of `env` is `{ file = "…" }` or `{ credential = "…" }`."""
    return (
        isinstance(value, Mapping)
        and len(value) == 1
        and value.keys() <= _REFERENCES
        and all(isinstance(item, str) for item in value.values())
    )


def reference_of(value: Mapping[str, str]) -> str:
    """A reference as `domain/references.py` has it: the path of a file, or "credential:NAME"."""
    return value["file"] if "file" in value else f"credential:{value['credential']}"


# Values as they are shown


def shown(table: Table) -> dict[str, Any]:
    """A model's table as JSON answers have it."""
    return {key: _form(item, _place_of(key, item, "model")) for key, item in table.items()}


def form(value: object, path: KeyPath) -> object:
    """A value as it is shown, None where there is none. `path`: where it stands, from a model's table."""
    place: _Place = "open"
    for key in path:
        place = "env" if key == "env" and place == "open" else _place_of(key, value, place)
    return None if value is None else _form(value, place)


def show(value: object, path: Sequence[str | int] = ()) -> str:
    """A value in a message, short. `path`: where it stands, from the root of the file, or from a model's table."""
    if hides(path) and not isinstance(value, bool | int | float if path[0] != "keys" else bool):
        return kind_of(value)
    if {"args", "command"} & set(path) and isinstance(value, str | list) and is_secret_name(str(value)):
        return kind_of(value)  # a command line, in which a secret is known by the word before it
    return units.show(_form(value, "open"))


def hides(path: Sequence[str | int]) -> bool:
    """Whether what stands at a path may be a secret; a model's, an adapter's or a key's own name says nothing."""
    if path and path[0] == "keys":
        return True
    names = path[2:] if path and path[0] == "models" else path
    names = names[2:] if names and names[0] == "adapters" else names
    return any(name == "env" or is_secret_name(str(name)) for name in names)


def kind_of(value: object) -> str:
    """What a value is that is not shown."""
    kinds = ((str, "a string"), (int | float, "a number"), (list | tuple, "a list"), (Mapping, "a table"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "another value")


def shown_path(path: KeyPath) -> KeyPath:
    """A path in a message: of a variable or an option that was written with its value in its name, the name alone.

    In `keys`, where a key may have been pasted as a name, nothing that is as long as one, and no name.
    """
    if path[:1] == ("keys",):
        return tuple(HIDDEN if len(part) >= LEAST_CHARACTERS and name_problem(part) else part for part in path)
    at = next((index for index, part in enumerate(path) if part in {"env", "args"}), len(path))
    return tuple(part if index <= at else shown_name(part) for index, part in enumerate(path))


def shown_name(text: str) -> str:
    """What was given as a name, such as `HF_TOKEN=hf_…` or `--hf-token hf_…`."""
    return _ASSIGNMENT.sub(rf"\1{HIDDEN}", text)


def may_hide(text: str, line: int) -> bool:
    """Whether a line (from 1) of a text that is no TOML may hold a secret: by its own words, or by its table."""
    lines = text.split("\n")[:line]
    table = next((one for one in reversed(lines) if _HEADER.match(one)), "")
    nearest = next((one for one in reversed(lines) if _ANY_HEADER.match(one)), table)
    words = (_COMMENT.sub("", one) for one in (table, *lines[-1:]))
    # Of a table that is misspelt nobody knows what it holds.
    return nearest != table or any(_OF_A_SECRET.search(one) or is_secret_name(one) for one in words)


def _place_of(key: str, value: object, outer: _Place) -> _Place:
    """Of the value of a key in a table that stands at `outer`. An id names no secret, whatever it is."""
    if outer == "model" and key == "adapters" and isinstance(value, Mapping):
        return "ids"
    if outer == "ids":
        return "open"
    if outer == "model":
        outer = "open"
    if outer == "env":
        return "variable"
    if outer != "open":
        return "secret"
    if key == "env" and isinstance(value, Mapping):
        return "env"
    is_count = isinstance(value, str) and _TOKENS.search(key) and _COUNT.fullmatch(value)
    return "secret" if is_secret_name(key) and not is_count else "open"


def _form(value: Any, place: _Place) -> Any:  # noqa: ANN401 - a TOML value
    if place == "variable":
        return value if is_reference(value) else HIDDEN
    if place == "secret":
        return HIDDEN if _holds_text(value) else value
    if isinstance(value, Mapping):
        return {key: _form(item, _place_of(key, item, place)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_word(item) if isinstance(item, str) else _form(item, "open") for item in value]
    return _PASSWORD.sub(rf"\1{HIDDEN}", value) if isinstance(value, str) else value


def _word(text: str) -> str:
    """Of a command: `HF_TOKEN=...` shows its name."""
    word = _ASSIGNMENT.fullmatch(text)
    return shown_name(text) if word and is_secret_name(word[1]) else _form(text, "open")


def _holds_text(value: object) -> bool:
    """Anything but numbers and booleans, which many options of vLLM are that have `tokens` in their names."""
    if isinstance(value, Mapping):
        return any(map(_holds_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_text, value))
    return not isinstance(value, bool | int | float)


# Values as they come back


def restored(new: Table, old: Table) -> tuple[dict[str, Any], list[KeyPath]]:
    """A model's keys as they were sent, with the values that `***` stands for; and where it stands for nothing.

    `old`: the model's keys as the file has them, options spelled as in `new`. An item of a list is known again by what
    is shown of it, not by its place: else a list in another order would give a key to another service.
    """
    lost: list[KeyPath] = []
    return _restored(new, old, "model", (), lost), lost


def _restored(new: Any, old: Any, place: _Place, path: KeyPath, lost: list[KeyPath]) -> Any:  # noqa: ANN401 - JSON
    if old is not _NOTHING and (_stands_for_all(new, place) or same(new, _form(old, place))):
        return old
    if isinstance(new, Mapping):
        before = old if isinstance(old, Mapping) else {}
        return {
            key: _restored(item, before.get(key, _NOTHING), _place_of(key, item, place), (*path, key), lost)
            for key, item in new.items()
        }
    if isinstance(new, list):
        return _restored_list(new, old if isinstance(old, list) and place == "open" else [], place, path, lost)
    if _stands_for_all(new, place) or (isinstance(new, str) and _is_partly_hidden(new)):
        lost.append(path)
    return new


def _restored_list(new: list[Any], old: list[Any], place: _Place, path: KeyPath, lost: list[KeyPath]) -> list[Any]:
    left, result = list(old), []
    for index, item in enumerate(new):
        missing: list[KeyPath] = []
        value = _restored(item, _NOTHING, place, (*path, str(index)), missing)
        if missing:
            at = next((at for at, one in enumerate(left) if same([item], _form([one], "open"))), None)
            if at is None:
                lost += missing
            else:
                value = left.pop(at)
        result.append(value)
    return result


def _stands_for_all(value: object, place: _Place) -> bool:
    return place in {"variable", "secret"} and value == HIDDEN


def _is_partly_hidden(text: str) -> bool:
    password, word = _PASSWORD.search(text), _ASSIGNMENT.fullmatch(text)
    return (password is not None and password[2] == HIDDEN) or (
        word is not None and word[2] == HIDDEN and is_secret_name(word[1])
    )


# Secrets in texts


def values_of(model: Table) -> Iterator[str]:
    """Every secret in the keys of a model, as text."""
    for key in _TABLES:
        if key in model:
            yield from _values(model[key], _place_of(key, model[key], "open"))


def _values(value: Any, place: _Place) -> Iterator[str]:  # noqa: ANN401 - a TOML value
    if place == "variable" and is_reference(value):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _values(item, _place_of(key, item, place))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _values(item, "secret" if isinstance(item, str) and _word(item) != item else place)
    elif place == "variable" or (place == "secret" and _holds_text(value)):
        text = str(value)
        word = _ASSIGNMENT.fullmatch(text) if place == "secret" else None
        yield from (text, *([word[2]] if word else ()), *(found[2] for found in _PASSWORD.finditer(text)))
    elif isinstance(value, str):
        yield from (found[2] for found in _PASSWORD.finditer(value))


def pattern(values: Iterable[str]) -> re.Pattern[str] | None:
    """What finds values in lines of text, in each way that programs write them; None where there is nothing to find.

    It is one alternation that branches by common beginnings: thousands of values cost little more than ten.
    """
    found = {form for value in values for form in _forms(value)}
    if not found:
        return None
    made = re.compile(_alternatives(sorted(found), _BRANCHES))
    re.purge()  # else the cache of `re` keeps each of the last 512, with what is secret no more: up to 250 MB
    return made


def _forms(value: str) -> Iterator[str]:
    """Of each line of a value: as it is, in JSON, in Python's spelling, in a URL."""
    for line in map(str.strip, value.splitlines()):
        forms = {line, json.dumps(line)[1:-1], json.dumps(line, ensure_ascii=False)[1:-1], repr(line)[1:-1]}
        for form in forms | {quote(line, safe="", errors="replace")}:
            if len(line) >= SHORTEST:
                yield form


def _alternatives(texts: Sequence[str], depth: int) -> str:
    """A pattern of sorted texts, the longer of two that begin alike first."""
    if depth == 0:
        return f"(?:{'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})"
    ends, parts = not texts[0], list[str]()
    for _, group in groupby(texts[1:] if ends else texts, key=lambda text: text[0]):
        alike = list(group)
        common = _common_beginning(alike[0], alike[-1])
        rest = [text[len(common) :] for text in alike]
        parts.append(re.escape(common) + ("" if rest == [""] else _alternatives(rest, depth - 1)))
    return f"(?:{'|'.join(parts)}){'?' if ends else ''}"


def _common_beginning(first: str, last: str) -> str:
    length = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    return first[: min(len(first), len(last)) if length is None else length]
