"""Parses and validates models.toml: a `Config`, or every problem at once, each with its line and key path.

Refuses what would only fail later, and guesses nothing; suggestions are in `hints`, the types in `domain/config.py`.
The caller reads the file.
"""

import difflib
import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vllm_proxy.domain import args
from vllm_proxy.domain.config import (
    Config,
    EngineDefaults,
    EngineSpec,
    ModelSpec,
    ModelTable,
    Policy,
    Server,
    TomlTable,
    id_problem,
)
from vllm_proxy.domain.file import hints
from vllm_proxy.domain.file.locate import key_lines, line_of
from vllm_proxy.domain.toml import KeyPath, dotted
from vllm_proxy.domain.units import show
from vllm_proxy.errors import ConfigError, Problem

type Found = tuple[KeyPath, str]  # where, what

_TABLES = ("server", "engine", "defaults", "models")
_SYNTAX_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_DEEPEST = 64  # tables and lists inside each other: what comes later may recurse
_LONGEST_INTEGER = 64  # bits, as TOML has it
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
}


@dataclass(frozen=True, slots=True)
class Override:
    """A `[server]` value that comes from outside the file and is stronger than it."""

    value: Any
    source: str  # "VLLM_PROXY_PORT", "--port"


def revision_of(data: bytes) -> str:
    """The revision of a file: a hash of its bytes, the ETag without its quotes."""
    return hashlib.sha256(data).hexdigest()[:16]


def parse_config(data: bytes, file: str, overrides: Mapping[str, Override] | None = None) -> Config:
    """The meaning of a file's bytes. `file` is only named in messages.

    Raises:
        ConfigError: with every problem found.

    """
    text, document = _read(data, file)
    if unusable := list(_unusable(document)):
        raise ConfigError(file, _problems(unusable, text, {}))
    overrides = overrides or {}
    found: list[Found] = [
        ((key,), hints.of_unknown_table(key, value) or _unknown(key, _TABLES))
        for key, value in document.items()
        if key not in _TABLES
    ]
    server_table = {**_table(document, "server", found), **{key: item.value for key, item in overrides.items()}}
    server = _validate(Server, server_table, ("server",), found)
    engine = _validate(EngineDefaults, _table(document, "engine", found), ("engine",), found)
    models = _models(document, engine or EngineDefaults(), found)
    found += _alias_clashes(_table(document, "models", []), _table(document, "defaults", []))
    found += _port_problems(engine, models)
    if found or server is None or engine is None:
        raise ConfigError(file, _problems(found, text, overrides))
    return Config(revision_of(data), server, engine, {model.id: model for model in models})


def _read(data: bytes, file: str) -> tuple[str, TomlTable]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(file, [Problem(line, "", "expected UTF-8, got other bytes")]) from None
    if text.startswith("\N{BYTE ORDER MARK}"):
        raise ConfigError(file, [Problem(1, "", "expected UTF-8 without a byte order mark")])
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        place = _SYNTAX_PLACE.search(message)
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        what = _SYNTAX_PLACE.sub("", message)
        hint = hints.of_syntax(text.split("\n")[line - 1])
        raise ConfigError(file, [Problem(line, "", f"this is no TOML: {what}{hint and '; '}{hint}")]) from None
    except RecursionError:
        raise ConfigError(file, [Problem(0, "", "cannot read this TOML: nested too deeply")]) from None
    except ValueError:  # Python's own limit on the digits of a number
        raise ConfigError(file, [Problem(0, "", "cannot read this TOML: a number has too many digits")]) from None


def _unusable(document: TomlTable) -> Iterator[Found]:
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


def _problems(found: Iterable[Found], text: str, overrides: Mapping[str, Override]) -> list[Problem]:
    lines = key_lines(text)
    problems = []
    for path, message in found:
        if len(path) > 1 and path[0] == "server" and path[1] in overrides:
            problems.append(Problem(0, overrides[path[1]].source, message))
        else:
            problems.append(Problem(line_of(lines, path), dotted(path), message))
    return problems


def _table(document: TomlTable, name: str, found: list[Found]) -> TomlTable:
    value = document.get(name, {})
    if isinstance(value, Mapping):
        return value
    found.append(((name,), f"expected a table, got {show(value)}"))
    return {}


def _models(document: TomlTable, engine: EngineDefaults, found: list[Found]) -> list[ModelSpec]:
    defaults = _table(document, "defaults", found)
    _model("", {}, {"model": "any", **defaults}, engine, found)  # a wrong default is a problem with no model too
    found += _repeated(("defaults",), defaults)
    models = []
    for model_id, table in _table(document, "models", found).items():
        path = ("models", model_id)
        if message := id_problem(model_id):
            found.append((path, message))
        if not isinstance(table, Mapping):
            found.append((path, f'expected a table: write [{dotted(path)}] with model = "..."'))
            continue
        own = _without_dotted_ids(model_id, table, found)
        if table and not own:
            continue
        found += _repeated(path, own)
        if model := _model(model_id, own, defaults, engine, found):
            models.append(model)
    return models


def _without_dotted_ids(name: str, table: TomlTable, found: list[Found]) -> TomlTable:
    """A model's table without the tables in it that were meant as other models."""
    ids = list(hints.dotted_ids(table, name))
    found += [(("models", *parts), f"an id with a dot needs quotes: {hints.quoted('.'.join(parts))}") for parts in ids]
    meant = {parts[1] for parts in ids}
    return {key: value for key, value in table.items() if key not in meant}


def _model(
    model_id: str, table: TomlTable, defaults: TomlTable, engine: EngineDefaults, found: list[Found]
) -> ModelSpec | None:
    spelling = _spelling(defaults) | _spelling(table)
    merged = merge(_canonical(defaults), _canonical(table))
    own = ("models", model_id)
    mine: list[Found] = []
    valid = _validate(ModelTable, merged, own, mine)
    options = merged.get("args")
    if isinstance(options, Mapping):
        mine += [((*own, "args", spelling.get(key, key)), message) for key, message in args.problems_of(options)]
    # What the model itself does not say, the defaults do: there it is to be mended.
    for path, message in mine:
        inherited = _holds(defaults, path[2:]) and not _holds(table, path[2:])
        found.append((("defaults", *path[2:]) if inherited else path, message))
    if valid is None or mine:
        return None
    spec = EngineSpec.model_construct(**{name: getattr(valid, name) for name in EngineSpec.model_fields})
    spec = spec.model_copy(update={"command": spec.command or engine.command, "env": {**engine.env, **spec.env}})
    policy = Policy.model_construct(**{name: getattr(valid, name) for name in Policy.model_fields})
    return ModelSpec(model_id, spec, policy, table)


def _canonical(table: TomlTable) -> TomlTable:
    """`args` in kebab-case, so that a model's spelling overrides the other spelling in the defaults."""
    options = table.get("args")
    if not isinstance(options, Mapping):
        return table
    return {**table, "args": {args.option_name(key): value for key, value in options.items()}}


def _repeated(path: KeyPath, table: TomlTable) -> list[Found]:
    options = table.get("args")
    found = args.repeated(options) if isinstance(options, Mapping) else ()
    return [((*path, "args", key), message) for key, message in found]


def _spelling(table: TomlTable) -> dict[str, str]:
    """How the file spells each option."""
    options = table.get("args")
    return {args.option_name(key): key for key in options} if isinstance(options, Mapping) else {}


def merge(base: TomlTable, over: TomlTable) -> dict[str, Any]:
    """`over` wins; tables merge key by key, at every depth."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _holds(table: TomlTable, path: KeyPath) -> bool:
    """Whether the table says anything at `path`."""
    value: Any = table
    for part in path:
        if isinstance(value, list):
            return True
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def _validate[T: BaseModel](table: type[T], value: TomlTable, at: KeyPath, found: list[Found]) -> T | None:
    try:
        return table.model_validate(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path = (*at, *(str(part) for part in detail["loc"] if part != "[key]"))  # pydantic's mark of a wrong key
            found.append((path, _message(table, detail)))
        return None


def _message(table: type[BaseModel], detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        in_model = table is ModelTable and len(detail["loc"]) == 1
        return _unknown(str(detail["loc"][-1]), _known_keys(table, detail["loc"]), in_model=in_model)
    if kind == "missing":
        return 'missing: every model needs model = "a Hugging Face id, path or URL"'
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind not in _EXPECTED:
        return f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {_shown(detail)}"
    context = dict(detail.get("ctx", {}))
    if kind == "literal_error":
        context["expected"] = context["expected"].replace("'", '"').replace(" or ", ", ")
    return f"expected {_EXPECTED[kind].format(**context)}, got {_shown(detail)}"


def _shown(detail: ErrorDetails) -> str:
    """What stands there; of texts in `env`, which may be credentials, only that they are: messages are logged."""
    value = detail["input"]
    if "env" not in detail["loc"] or isinstance(value, bool | int | float):
        return show(value)
    kinds = ((str, "a string"), (list, "a list"), (Mapping, "a table"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "another value")


def _known_keys(table: type[BaseModel], location: tuple[int | str, ...]) -> Iterable[str]:
    for part in location[:-1]:
        field = table.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        table = field.annotation
    return table.model_fields


def _unknown(key: str, known: Iterable[str], *, in_model: bool = False) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    if in_model:
        return "unknown key; an option of vLLM itself goes into args"
    return f"unknown key; expected one of {', '.join(known)}"


def _alias_clashes(tables: TomlTable, defaults: TomlTable) -> Iterator[Found]:
    """Names that two models claim, whatever else may be wrong with the two."""
    taken = {model_id: model_id for model_id in tables}
    for model_id, table in tables.items():
        own = isinstance(table, Mapping) and "aliases" in table
        place = ("models", model_id) if own else ("defaults",)
        aliases = (table if own else defaults).get("aliases", ())
        for alias in aliases if isinstance(aliases, list) else ():
            if not isinstance(alias, str):
                continue
            if alias in taken:
                yield (*place, "aliases"), f"{show(alias)} is taken by model {show(taken[alias])}"
            taken.setdefault(alias, model_id)


def _port_problems(engine: EngineDefaults | None, models: list[ModelSpec]) -> Iterator[Found]:
    if engine is None:
        return
    if engine.port_end < engine.port_start:
        yield ("engine", "port_end"), f"expected at least port_start ({engine.port_start}), got {engine.port_end}"
        return
    wanted = sum(model.policy.replicas for model in models if model.policy.enabled)
    if wanted > (ports := engine.port_end - engine.port_start + 1):
        where = "port_end" if "port_end" in engine.model_fields_set else "port_start"
        yield ("engine", where), f"expected a port for each of {wanted} instances, got {ports} ports"
