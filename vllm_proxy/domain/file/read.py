"""Reads TOML from bytes, and says what is wrong with it, with its line.

For the configuration and the files of keys that it names; what the tables mean is not looked at here.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping

from vllm_proxy.domain import secrets
from vllm_proxy.domain.config import TomlTable
from vllm_proxy.domain.file import hints
from vllm_proxy.domain.file.validate import Found
from vllm_proxy.domain.toml import KeyPath
from vllm_proxy.errors import ConfigError, Problem

_SYNTAX_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_DEEPEST = 64  # tables and lists inside each other: what comes later may recurse
_LONGEST_INTEGER = 64  # bits, as TOML has it
# A key of very many parts, wherever one may begin: reading it takes the square of their number, in time and memory.
_PART = r"""(?:[A-Za-z0-9_-]++|"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|'[^'\n]*+')"""
_ENDLESS_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*+{_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{48}}", re.MULTILINE)


def read_toml(data: bytes, file: str, *, hides_values: bool = False) -> tuple[str, TomlTable]:
    """The text of a file's bytes, and its meaning. `file` is only named in messages.

    `hides_values`: no message repeats anything of the text.

    Raises:
        ConfigError: it is no TOML.

    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(file, [Problem(line, "", "expected UTF-8, got other bytes")]) from None
    if text.startswith("\N{BYTE ORDER MARK}"):
        raise ConfigError(file, [Problem(1, "", "expected UTF-8 without a byte order mark")])
    if endless := _ENDLESS_KEY.search(text):
        line = text.count("\n", 0, endless.end()) + 1
        raise ConfigError(file, [Problem(line, "", "cannot read this TOML: a key has too many parts")])
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        place = _SYNTAX_PLACE.search(message)
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        what = _SYNTAX_PLACE.sub("", message)
        hint = hints.of_syntax(text.split("\n")[line - 1], hides_values=hides_values or secrets.may_hide(text, line))
        raise ConfigError(file, [Problem(line, "", f"this is no TOML: {what}{hint and '; '}{hint}")]) from None
    except RecursionError:
        raise ConfigError(file, [Problem(0, "", "cannot read this TOML: nested too deeply")]) from None
    except ValueError:  # Python's own limit on the digits of a number
        raise ConfigError(file, [Problem(0, "", "cannot read this TOML: a number has too many digits")]) from None


def unusable(document: TomlTable) -> Iterator[Found]:
    """What is TOML, yet could not be worked with."""
    rest: list[tuple[KeyPath, int, object]] = [((), 0, document)]
    while rest:
        path, depth, value = rest.pop()
        if depth > _DEEPEST:
            yield path[:3], "nested too deeply"
        elif isinstance(value, Mapping):
            rest += [((*path, key), depth + 1, item) for key, item in value.items()]
        elif isinstance(value, list):
            rest += [(path, depth + 1, item) for item in value]
        elif isinstance(value, int) and value.bit_length() >= _LONGEST_INTEGER:
            yield path, f"expected a whole number of at most {_LONGEST_INTEGER} bits"
