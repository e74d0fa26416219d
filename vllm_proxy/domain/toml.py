"""TOML values: how they are written, and whether two of them mean the same.

For plans, edits and messages. The syntax with its positions is in `file/lexer.py`; parsing is up to tomllib.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, time

type KeyPath = tuple[str, ...]  # from the root

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dotted(path: Sequence[str]) -> str:
    """A key path as TOML spells it: `models."org/chat".args`."""
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
    if isinstance(value, date | time):
        return value.isoformat().replace("+00:00", "Z")
    return repr(value)


def same(one: object, other: object) -> bool:
    """Whether two values mean the same. `1`, `1.0` and `true` do not, though they are equal for Python; `nan` does."""
    if one is other:  # most are: defaults, of hundreds of models at once
        return True
    if type(one) is dict or isinstance(one, Mapping):  # asking an abstract class takes longer than all the rest
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        assert isinstance(other, list | tuple)
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float | date | time):  # two ways to write one moment are not one text
        return rendered(one) == rendered(other)
    return one == other
