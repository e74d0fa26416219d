"""Suggestions for mistakes in models.toml: what invalid syntax, or a table in the wrong place, probably means.

For the messages of `parse`. A hint never changes what is accepted.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping

from vllm_proxy.domain import args, secrets
from vllm_proxy.domain.config import ModelTable, TomlTable
from vllm_proxy.domain.toml import KeyPath, dotted
from vllm_proxy.domain.units import show
from vllm_proxy.domain.value_types import id_problem

_LONGEST = 300  # characters of a line that is looked at
_BARE = re.compile(r"[A-Za-z0-9_.-]+")
_HEADER = re.compile(r"\s*\[\s*models\.([^\"'\\\]]+?)((?:\.(?:args|env|metadata|restart))?)\s*\]\s*(?:#.*)?")
_ASSIGNMENT = re.compile(r"\s*([^\s=#\"'\[\]{}:][^=#\"'\[\]{}]*?)\s*=\s*([^\s].*?)\s*")
_YAML = re.compile(r"\s*([A-Za-z0-9_-]+):(?:\s+(.*?))?\s*")
_BARE_WORD = re.compile(r"[\[,]\s*(?!true\b|false\b|nan\b|inf\b)([A-Za-z][^\s,\]\"']*)\s*[,\]]")
_INDEX = re.compile(r"[0-9]{1,4}")
_SPELT = {"true": "true", "false": "false", "yes": "true", "no": "false", "on": "true", "off": "false"}


def of_syntax(line: str, *, hides_values: bool = False) -> str:
    """How to write a line that is no TOML, "" where that cannot be guessed. `hides_values`: they may be secrets."""
    if len(line) > _LONGEST:
        return ""
    if header := _HEADER.fullmatch(line):
        return _of_header(header[1], header[2])
    if assignment := _ASSIGNMENT.fullmatch(line):
        return _of_assignment(assignment[1], assignment[2], hides_values=hides_values)
    if hides_values:
        return ""
    if yaml := _YAML.fullmatch(line):
        return f"write {yaml[1]} = {yaml[2]}" if yaml[2] else f"this is TOML, not YAML: write [{yaml[1]}]"
    return ""


def _of_header(model_id: str, rest: str) -> str:
    if _BARE.fullmatch(model_id):
        return ""
    if problem := id_problem(model_id):
        return f"{show(model_id)}: {problem}"
    return f"an id with other characters than letters, digits, _ and - needs quotes: {quoted(model_id, rest)}"


def quoted(model_id: str, rest: str = "") -> str:
    """The header of a model's table."""
    return f"write [{dotted(('models', model_id))}{rest}]"


def _of_assignment(key: str, value: str, *, hides_values: bool) -> str:
    if not _BARE.fullmatch(key):
        shown = "" if hides_values else f": write {show(key)} ="
        return f"a key with other characters than letters, digits, _ and - needs quotes{shown}"
    word = value.partition("#")[0].strip()
    if not word:
        return f"{key} has no value: write one, or leave {key} out"
    if _is_value(word) or "=" in word:
        return ""
    if word.lower() in _SPELT:
        return f"write {key} = {_SPELT[word.lower()]}"
    if word.lower() in {"none", "null", "nil"}:
        return f"there is no such value: leave {key} out"
    return _of_text(key, word, hides_values=hides_values)


def _of_text(key: str, word: str, *, hides_values: bool) -> str:
    if word[0] not in "\"'[{":
        return f"text needs quotes: write {key} = {'"..."' if hides_values else show(word)}"
    bare = None if hides_values else _BARE_WORD.search(word)
    return f"text needs quotes: {show(bare[1])}" if bare else ""


def _is_value(word: str) -> bool:
    try:
        tomllib.loads(f"x = {word}")
    except (ValueError, RecursionError):
        return False
    return True


def of_unknown_table(key: str, value: object) -> str:
    """What a top-level key may have been meant for, "" where that cannot be guessed."""
    if isinstance(value, Mapping):
        names = [name for name, table in value.items() if isinstance(table, Mapping) and "model" in table]
        if key.lower() in {"model", "models"} and value and (names or "model" not in value):
            return f"unknown table; a model has one of its own: {quoted(names[0] if names else next(iter(value)))}"
        if "model" in value and not id_problem(key):
            return f"unknown table; a model has one of its own: {quoted(key)}"
        return ""
    if key in ModelTable.model_fields:
        return f"unknown key; {key} belongs into the table of a model, such as [models.chat], or into [defaults]"
    return args.misplaced(key, value) or ""


def of_value(path: KeyPath, value: object) -> str:
    """How to write a value that has another type than its key wants, "" where that cannot be guessed."""
    match path, value:
        case ("models", _, "args"), str() | list():
            return 'args = { kv_cache_dtype = "fp8", max_num_batched_tokens = 8192 }'
        case ((("models", _, "command") | ("engine", "command")), str()):
            return secrets.show(value.split(), path)
        case ("models", _, "devices"), bool():
            return ""
        case ("models", _, "devices"), int() | str():
            names = [name.strip() for name in str(value).split(",") if name.strip()]
            return show([int(name) if _INDEX.fullmatch(name) else name for name in names]) if names else ""
        case ("models", _, "adapters", _), str():
            return f"{{ path = {secrets.show(value, path)} }}"
    return ""


def dotted_ids(model: TomlTable, name: str) -> Iterator[KeyPath]:
    """Each id with a dot that was written without quotes, and so made tables within the table `name`; its parts.

    TOML takes `[models.Qwen2.5-7B]` for a table `5-7B` in a table `Qwen2`.
    """
    strict = "model" in model
    rest: list[tuple[KeyPath, TomlTable]] = [((name,), model)]
    while rest:
        path, table = rest.pop()
        for key, value in table.items():
            if isinstance(value, Mapping) and key not in ModelTable.model_fields:
                known = not value or not value.keys().isdisjoint(ModelTable.model_fields)
                if "model" in value if strict else known:
                    yield (*path, key)
                rest.append(((*path, key), value))
