"""Parses and validates models.toml: a `Config`, or every problem at once, each with its line and key path.

Refuses what would only fail later, and guesses nothing; suggestions are in `hints`, the types in `domain/config.py`.
The caller reads the file.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_proxy.domain import args, secrets
from vllm_proxy.domain.adapters import needed
from vllm_proxy.domain.config import (
    Config,
    Devices,
    EngineDefaults,
    EngineKeys,
    EngineSpec,
    ModelSpec,
    ModelTable,
    Policy,
    Server,
    TomlTable,
    revision_of,
)
from vllm_proxy.domain.file import hints
from vllm_proxy.domain.file.locate import key_lines, line_of
from vllm_proxy.domain.file.parse_adapters import AdapterFolders, adapters_of, dotted_names, not_with_adapters
from vllm_proxy.domain.file.parse_keys import KeyTables
from vllm_proxy.domain.file.parse_moderation import moderation_of
from vllm_proxy.domain.file.read import read_toml, unusable
from vllm_proxy.domain.file.validate import Found, unknown, validate
from vllm_proxy.domain.keys import Key
from vllm_proxy.domain.listener import replaced_by
from vllm_proxy.domain.references import Files, NoFiles
from vllm_proxy.domain.toml import KeyPath, dotted
from vllm_proxy.domain.units import show
from vllm_proxy.domain.value_types import id_problem
from vllm_proxy.errors import ConfigError, Problem

_TABLES = ("server", "engine", "devices", "defaults", "models", "keys", "moderation")
_EITHER = ("memory", "gpu_memory_utilization")  # say the same in two ways
_NO_FILES = NoFiles()


@dataclass(frozen=True, slots=True)
class Override:
    """A `[server]` value that comes from outside the file and is stronger than it."""

    value: Any
    source: str  # "VLLM_PROXY_PORT", "--port"


def parse_config(
    data: bytes,
    file: str,
    overrides: Mapping[str, Override] | None = None,
    *,
    files: Files = _NO_FILES,
    given: Iterable[Key] = (),
) -> Config:
    """The meaning of a file's bytes, which is only named in messages.

    `files`: reads what it names (key files). `given`: keys from outside of it.

    Raises:
        ConfigError: with every problem found.

    """
    text, document = read_toml(data, file)
    if wrong := list(unusable(document)):
        raise ConfigError(file, problems_at(wrong, text, {}))
    overrides = overrides or {}
    found: list[Found] = [
        ((key,), hints.of_unknown_table(key, value) or unknown(key, _TABLES))
        for key, value in document.items()
        if key not in _TABLES
    ]
    server_table = {**_table(document, "server", found), **{key: item.value for key, item in overrides.items()}}
    server = _with_given_address(validate(Server, server_table, ("server",), found), overrides)
    found += _half_a_pair(server_table)
    engine = validate(EngineDefaults, _table(document, "engine", found), ("engine",), found)
    devices = validate(Devices, _table(document, "devices", found), ("devices",), found)
    folders = AdapterFolders(files)
    models = _models(document, engine or EngineDefaults(), folders, found)
    found += _name_clashes(_table(document, "models", []), _table(document, "defaults", []))
    found += _port_problems(engine, models)
    found += _unsized(devices, models, _table(document, "defaults", []))
    keys = KeyTables(files, given)
    found += keys.add(document)
    elsewhere = keys.add_file(server.keys_file, file, found) if server is not None and server.keys_file else []
    moderation = moderation_of(document, models, files, keys.attached, found)
    attached = keys.attached | folders.attached
    if found or elsewhere or server is None or engine is None or devices is None:
        problems = [*problems_at(found, text, overrides), *elsewhere]
        raise ConfigError(file, problems, attached=attached)
    config = Config(revision_of(data), server, engine, {}, keys.found, attached, devices, moderation)
    models = [_unmoderated(model) if moderation and model.id == moderation.model else model for model in models]
    by_id = {model.id: _in_order(model) if config.is_fair else model for model in models}
    return replace(config, models=by_id)


def _in_order(model: ModelSpec) -> ModelSpec:
    """A model whose engine takes requests by their numbers, unless its own `args` say otherwise."""
    options = {"scheduling-policy": "priority", **model.engine.args}
    return replace(model, engine=model.engine.model_copy(update={"args": options}))


def _unmoderated(guard: ModelSpec) -> ModelSpec:
    """The guard, whatever the defaults say: it does not check itself."""
    return replace(guard, policy=guard.policy.model_copy(update={"moderate": False}))


def _half_a_pair(server: TomlTable) -> Iterator[Found]:
    """A certificate without its key, or a key without its certificate."""
    for key, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if server.get(key) is not None and server.get(other) is None:
            yield ("server", key), f"expected {other} beside it: TLS needs a certificate and its private key"


def _with_given_address(server: Server | None, overrides: Mapping[str, Override]) -> Server | None:
    """Host and port from outside the file are stronger than its `listen`."""
    if server is None or not server.listen or not overrides.keys() & {"host", "port"}:
        return server
    return server.model_copy(update={"listen": replaced_by(server.listen, server.host, server.port)})


def problems_at(found: Iterable[Found], text: str, overrides: Mapping[str, Override]) -> list[Problem]:
    """What was found, with its line in the file or the source of an override."""
    lines = key_lines(text)
    problems = []
    for path, message in found:
        if len(path) > 1 and path[0] == "server" and path[1] in overrides:
            problems.append(Problem(0, overrides[path[1]].source, message))
        else:
            problems.append(Problem(line_of(lines, path), dotted(secrets.shown_path(path)), message))
    return problems


def _table(document: TomlTable, name: str, found: list[Found]) -> TomlTable:
    value = document.get(name, {})
    if isinstance(value, Mapping):
        return value
    how = ": write [models.NAME]" if name == "models" and isinstance(value, list) else ""
    found.append(((name,), f"expected a table, got {secrets.show(value, (name,))}{how}"))
    return {}


def _models(
    document: TomlTable, engine: EngineDefaults, folders: AdapterFolders, found: list[Found]
) -> list[ModelSpec]:
    defaults = _table(document, "defaults", found)
    if "adapters" in defaults:
        found.append((("defaults", "adapters"), "an adapter belongs to one model: write [models.ID.adapters.NAME]"))
        defaults = {key: value for key, value in defaults.items() if key != "adapters"}
    # A wrong default is a problem with no model too.
    _model("", {}, {"model": "any", **defaults}, engine, found, folders=folders)
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
        if model := _model(model_id, own, defaults, engine, found, folders=folders):
            models.append(model)
    return models


def _without_dotted_ids(name: str, table: TomlTable, found: list[Found]) -> TomlTable:
    """A model's table without the tables in it that were meant as other models."""
    ids = list(hints.dotted_ids(table, name))
    found += [(("models", *parts), f"an id with a dot needs quotes: {hints.quoted('.'.join(parts))}") for parts in ids]
    meant = {parts[1] for parts in ids}
    return {key: value for key, value in table.items() if key not in meant}


def _model(
    model_id: str,
    table: TomlTable,
    defaults: TomlTable,
    engine: EngineDefaults,
    found: list[Found],
    *,
    folders: AdapterFolders,
) -> ModelSpec | None:
    spelling = _spelling(defaults) | _spelling(table)
    merged = _merged(_canonical(defaults), _canonical(table))
    own = ("models", model_id)
    mine: list[Found] = [
        ((*own, "memory"), "expected either memory or gpu_memory_utilization: both say how much of a device it gets")
        for _ in range(all(merged.get(key) is not None for key in _EITHER))
    ]
    nested = list(dotted_names(tables, own)) if isinstance(tables := table.get("adapters"), Mapping) else []
    valid = None if nested else validate(ModelTable, merged, own, mine)
    mine += nested
    adapters = {} if valid is None else adapters_of(valid, own, folders, mine)
    options = merged.get("args")
    if isinstance(options, Mapping):
        wrong = [*args.problems_of(options), *(args.not_with_sleep(options) if merged.get("sleep") else ())]
        wrong += not_with_adapters(options) if merged.get("adapters") else ()
        mine += [((*own, "args", spelling.get(key, key)), message) for key, message in wrong]
    # What the model itself does not say, the defaults do: there it is to be mended.
    for path, message in mine:
        inherited = _holds(defaults, path[2:]) and not _holds(table, path[2:])
        found.append((("defaults", *path[2:]) if inherited else path, message))
    if valid is None or mine:
        return None
    spec = EngineSpec.model_construct(**{name: getattr(valid, name) for name in EngineKeys.model_fields})
    most = valid.adapters_max.most
    lora = needed(adapters.values(), most)
    over = {"command": spec.command or engine.command, "env": {**engine.env, **spec.env}, "lora": lora}
    spec = spec.model_copy(update=over)
    policy = Policy.model_construct(**{name: getattr(valid, name) for name in Policy.model_fields})
    return ModelSpec(model_id, spec, policy, table, adapters, most)


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


def _merged(defaults: TomlTable, table: TomlTable) -> dict[str, Any]:
    """A model's keys. What a variable of its own refers to is not merged with what the one in the defaults does."""
    if table.keys() & {*_EITHER} and not defaults.keys() >= {*_EITHER}:  # its own way of saying it
        defaults = {key: value for key, value in defaults.items() if key not in _EITHER}
    merged, env = merge(defaults, table), table.get("env")
    return {**merged, "env": {**merged["env"], **env}} if isinstance(env, Mapping) else merged


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


def _name_clashes(tables: TomlTable, defaults: TomlTable) -> Iterator[Found]:
    """Names that two models claim, or two adapters, whatever else may be wrong with the two."""
    taken = {model_id: model_id for model_id in tables}
    for model_id, table in tables.items():
        adapters = table.get("adapters", ()) if isinstance(table, Mapping) else ()
        for name in adapters if isinstance(adapters, Mapping) else ():
            if name in taken:
                yield ("models", model_id, "adapters", name), f"the id is taken by model {show(taken[name])}"
            taken.setdefault(name, model_id)
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


def _unsized(devices: Devices | None, models: list[ModelSpec], defaults: TomlTable) -> Iterator[Found]:
    """Bytes of devices of which nobody is to know how large they are: vLLM is told a share."""
    if devices is None or devices.source != "none":
        return
    for model in models:
        if model.engine.memory:
            place = ("models", model.id) if "memory" in model.written or "memory" not in defaults else ("defaults",)
            message = (
                'expected gpu_memory_utilization: with [devices] source = "none" nobody knows how large devices are'
            )
            yield (*place, "memory"), message


def _port_problems(engine: EngineDefaults | None, models: list[ModelSpec]) -> Iterator[Found]:
    if engine is None:
        return
    if engine.port_end < engine.port_start:
        yield ("engine", "port_end"), f"expected at least port_start ({engine.port_start}), got {engine.port_end}"
        return
    on_ports = (model for model in models if model.policy.enabled and model.engine.sleep is None)
    wanted = sum(model.policy.replicas for model in on_ports)
    if wanted > (ports := engine.port_end - engine.port_start + 1):
        where = "port_end" if "port_end" in engine.model_fields_set else "port_start"
        yield ("engine", where), f"expected a port for each of {wanted} instances, got {ports} ports"
