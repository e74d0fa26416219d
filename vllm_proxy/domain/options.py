"""Checks an `EngineSpec` against the options that one version of vLLM accepts.

When in doubt it accepts. It refuses what vLLM's parser refuses, and two things that the parser misreads: an
abbreviation, and surplus values, of which it may take one for the model. `engine/options.py` obtains the table of
options.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import msgspec

from vllm_proxy.domain import args
from vllm_proxy.domain.config import EngineKeys, EngineSpec, TomlTable
from vllm_proxy.domain.secrets import show

_MOST = 10_000  # of anything in a table: vLLM 0.32 has 317 options
_CHOICES_SHOWN = 12
_OWN = tuple(name for name in EngineKeys.model_fields if name in args.OWN_KEYS.values() and name != "model")
_NONE = frozenset({"", "None"})  # no value, for most options
_NO_JSON = re.compile(r"\s*(?!(true|false|null|nan|inf|infinity)\s*$)[a-z/.~]", re.IGNORECASE)
_NUMBER = re.compile(r"\s*([+-]?\d|auto\s*$)", re.IGNORECASE)

type _Text = Annotated[str, msgspec.Meta(max_length=500)]


class Option(msgspec.Struct, frozen=True):
    """One option, as `engine/read_options.py` describes it. What its values may be is "other" where that is unsure."""

    names: Annotated[tuple[_Text, ...], msgspec.Meta(min_length=1, max_length=20)]  # with their dashes
    kind: _Text  # which of argparse's actions: "store", "boolean_optional", "append", ...
    nargs: int | _Text | None  # as argparse has it
    type: Literal["str", "int", "float", "human_int", "json", "folded", "other"]
    choices: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=_MOST)] | None
    default: float | None = None  # where it is a number

    @property
    def name(self) -> str:
        """Its first long name, without dashes."""
        return next((name for name in self.names if name.startswith("--")), self.names[0]).lstrip("-")


class OptionTable(msgspec.Struct, frozen=True):
    """Every option of one version of vLLM."""

    version: _Text
    options: Annotated[tuple[Option, ...], msgspec.Meta(min_length=1, max_length=_MOST)]

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """What `to_json` wrote, or the script.

        Raises:
            ValueError: it is something else.

        """
        return msgspec.json.decode(data, type=cls)

    def default(self, name: str) -> float | None:
        """The number that an option has where nobody gives it; None: it is not known."""
        return next((option.default for option in self.options if option.name == name), None)

    def to_json(self) -> bytes:
        """One line."""
        return msgspec.json.encode(self)

    def by_name(self) -> dict[str, Option]:
        """Each name, with its dashes."""
        return {name: option for option in self.options for name in option.names}


def names(table: OptionTable) -> frozenset[str]:
    """The long names of all options, without dashes, `no-` forms among them."""
    return frozenset(name.removeprefix("--") for name in table.by_name() if name.startswith("--"))


def problems(table: OptionTable, spec: EngineSpec, written: TomlTable | None = None) -> list[tuple[str, str]]:
    """(key path, message) for each thing that this vLLM would not take; the path begins at the model's table.

    `written` is the table as it stands in the file: its options are named as it spells them.
    """
    return list(_problems(table, spec, (written or {}).get("args", {})))


def _problems(table: OptionTable, spec: EngineSpec, written: object) -> Iterator[tuple[str, str]]:
    for name in _OWN:
        value = getattr(spec, name)
        if value is not None and (message := _problem(table, name, value)):
            yield name, message
    spelling = {args.option_name(key): key for key in written} if isinstance(written, Mapping) else {}
    for name, value in spec.args.items():
        key = spelling.get(name, name)
        if message := _problem(table, key, value):
            yield f"args.{key}", message


def _problem(table: OptionTable, key: str, value: Any) -> str | None:  # noqa: ANN401 - a TOML value
    """The tokens are looked at as argparse does: what it gets is what counts."""
    tokens = args.tokens({key: value})
    if not tokens:
        return None
    flag, explicit, text = tokens[0].partition("=")
    base, part, _ = flag.partition(".")
    option = table.by_name().get(base)
    if option is None:
        return _unknown(table, base, key, value)
    values = ["{}"] if part else [text] if explicit else tokens[1:]  # vLLM puts the parts of a table together
    return _arity_problem(option, len(values), value) or next(
        (message for item in values if (message := _value_problem(option, item, value))), None
    )


def _unknown(table: OptionTable, flag: str, key: str, value: object) -> str:
    known = table.by_name()
    positive = "--" + flag.removeprefix("--no-")
    if flag.startswith("--no-") and positive in known:
        return _no_negation(known[positive], flag, value)
    if value is False:  # as it is written
        flag = positive
    meant = {option.name for name, option in known.items() if name.startswith(flag)}
    if len(meant) == 1:
        return f"an abbreviation; write {_as_written(meant.pop(), key)}"
    short = known.get(flag[1:])  # `tp`, for `-tp`
    negated = flag.startswith("--no-")
    candidates = sorted(name for name in names(table) - args.OWNED if name.startswith("no-") == negated)
    near = [short.name] if short else difflib.get_close_matches(flag.removeprefix("--"), candidates, n=1, cutoff=0.75)
    if near:
        return f"unknown option; did you mean {_as_written(near[0], key)}?"
    return f"unknown option: vLLM {table.version} has none of this name"


def _no_negation(option: Option, flag: str, value: object) -> str:
    if option.nargs == 0:
        return f"vLLM has no {flag}: leave the option out"
    return "expected a value, got false" if value is False else f"vLLM has no {flag}, since {option.name} takes a value"


def _as_written(name: str, key: str) -> str:
    """A name in the spelling of the key that it is to replace."""
    if name in args.OWN_KEYS:
        return f"{args.OWN_KEYS[name]}, which is written outside args"
    return name if "-" in key else name.replace("-", "_")


def _arity_problem(option: Option, count: int, value: object) -> str | None:
    match option.nargs:
        case 0 if count:
            return f"expected true or false, since vLLM takes no value here, got {show(value, (option.name,))}"
        case None | 1 | "?" if count > 1:
            hint = '; write it as text of JSON, such as "[1, 2]"' if option.type == "json" else ""
            return f"expected one value, got a list of {count}{hint}"
        case None | "+" | 1 if count == 0:
            return f"expected a value, got {show(value, (option.name,))}"
        case int(wanted) if wanted > 1 and count != wanted:
            return f"expected a list of {wanted} values, got {show(value, (option.name,))}"
    return None


def _value_problem(option: Option, text: str, value: object) -> str | None:
    """`text` is what vLLM gets of `value`: an item where that is a list."""
    if text in _NONE:
        return None
    got = show(text if isinstance(value, list) else value, (option.name,))
    if not _TYPES.get(option.type, _anything)(text):
        return f"expected {_EXPECTED[option.type]}, got {got}"
    return _choice_problem(option, text, got)


def _anything(_: str) -> bool:
    return True


def _whole(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _human(text: str) -> bool:
    """8192, "8k", "auto"; what begins as a number may be one in some version."""
    return _NUMBER.match(text) is not None and (_whole(text) or not _number(text))


def _json(text: str) -> bool:
    """Whether it may be JSON: vLLM also reads some that is none, such as `{"bytes": 80m}`."""
    return not _NO_JSON.match(text)


_TYPES = {"int": _whole, "float": _number, "human_int": _human, "json": _json}
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "human_int": 'a whole number such as 8192 or "8k"',
    "json": "a table",
}


def _choice_problem(option: Option, text: str, got: str) -> str | None:
    choices = option.choices
    if choices is None or _is_choice(option.type, choices, text):
        return None
    near = difflib.get_close_matches(text, choices, n=1)
    listed = ", ".join(
        show(choice) if option.type in {"str", "folded"} else choice for choice in choices[:_CHOICES_SHOWN]
    )
    more = f" or {len(choices) - _CHOICES_SHOWN} more" if len(choices) > _CHOICES_SHOWN else ""
    meant = f"; did you mean {show(near[0])}?" if near else ""
    return f"expected one of {listed}{more}, got {got}{meant}"


def _is_choice(kind: str, choices: Sequence[str], text: str) -> bool:
    match kind:
        case "str":
            return text in choices
        case "folded":
            return _folded(text) in map(_folded, choices)
        case "int" | "float":
            return not all(map(_number, choices)) or float(text) in map(float, choices)
    return True


def _folded(text: str) -> str:
    return text.lower().replace("-", "_")
