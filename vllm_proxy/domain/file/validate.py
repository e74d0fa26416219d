"""Validates a table against its schema: each problem with the key path where it is, and what was expected.

A message shows what stands there, unless it may be a secret (`domain/secrets.py`).
"""

import difflib
from collections.abc import Iterable
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vllm_proxy.domain import args, secrets, units
from vllm_proxy.domain.config import ModelTable, TomlTable
from vllm_proxy.domain.file import hints
from vllm_proxy.domain.toml import KeyPath

type Found = tuple[KeyPath, str]  # where, what

_LIKE, _WORD_LIKE = 0.7, 0.5  # difflib's ratio of a key and the one that was meant, and of each word of theirs
_KEY = "[key]"  # pydantic's mark of a wrong key
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "dict_type": "a table",
    "model_type": "a table",
    "tuple_type": "a list",
    "too_short": "at least one item",
    "string_too_short": "a string that is not empty",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
    "timezone_aware": "a time with an offset, such as 2031-01-01T00:00:00Z",
    "datetime_type": "a time with an offset and without quotes, such as 2031-01-01T00:00:00Z",
    "datetime_from_date_parsing": "a time with an offset, such as 2031-01-01T00:00:00Z",
}


def validate[T: BaseModel](table: type[T], value: TomlTable, at: KeyPath, found: list[Found]) -> T | None:
    """The table as a value; None where something is wrong with it, which is appended to `found`."""
    try:
        return table.model_validate(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path = (*at, *(str(part) for part in detail["loc"] if part != _KEY))
            found.append((path, _message(table, path, detail)))
        return None


def _message(table: type[BaseModel], path: KeyPath, detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    shown = secrets.show(value, path)
    if kind == "extra_forbidden":
        return _unknown(table, detail)
    if kind == "missing":
        if detail["loc"][0] == "adapters":
            return 'missing: every adapter needs path = "a folder as PEFT writes it, or a hub id"'
        needed = 'every model needs model = "a Hugging Face id, path or URL"'
        return f"missing: {needed if table is ModelTable else 'this table needs it'}"
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
        return message if _KEY in detail["loc"] else message.replace(units.show(value), shown)
    if kind not in _EXPECTED:
        return f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {shown}"
    context = dict(detail.get("ctx", {}))
    if kind == "literal_error":
        context["expected"] = context["expected"].replace("'", '"').replace(" or ", ", ")
    how = hints.of_value(path, value)
    return f"expected {_EXPECTED[kind].format(**context)}, got {shown}{f': write {how}' if how else ''}"


def _unknown(table: type[BaseModel], detail: ErrorDetails) -> str:
    key, in_model = str(detail["loc"][-1]), table is ModelTable and len(detail["loc"]) == 1
    if in_model and (message := args.misplaced(key, detail["input"])):
        return message
    return unknown(key, _known_keys(table, detail["loc"]), in_model=in_model)


def _known_keys(table: type[BaseModel], location: tuple[int | str, ...]) -> Iterable[str]:
    parts = iter(location[:-1])
    for part in parts:
        field = table.model_fields.get(str(part))
        inner = None if field is None else field.annotation
        if get_origin(inner) is dict:  # of tables, by names
            inner = get_args(inner)[1]
            next(parts, None)
        if not isinstance(inner, type) or not issubclass(inner, BaseModel):
            break
        table = inner
    return table.model_fields


def unknown(key: str, known: Iterable[str], *, in_model: bool = False) -> str:
    """What is said of a key that is not known."""
    if near := _misspelt(key.replace("-", "_"), known):
        return f"unknown key; did you mean {near}?"
    if in_model:
        return "unknown key; an option of vLLM itself goes into args"
    return f"unknown key; expected one of {', '.join(known)}"


def _misspelt(key: str, known: Iterable[str]) -> str | None:
    """The key that was meant: not one that has another word in the place of one."""
    for name in difflib.get_close_matches(key, known, n=3, cutoff=_LIKE):
        words = key.split("_"), name.split("_")
        if len(words[0]) != len(words[1]) or all(
            difflib.SequenceMatcher(None, one, other).ratio() >= _WORD_LIKE for one, other in zip(*words, strict=True)
        ):
            return name
    return None
