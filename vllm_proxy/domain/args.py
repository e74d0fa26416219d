"""`[models.ID.args]`: options of `vllm serve`, validated without vLLM and rendered as command-line arguments.

Refuses options that belong to the daemon or have a key of their own. What a certain version of vLLM accepts is checked
by `domain/options.py`. Source of the rules: the parser of vLLM 0.32 (argparse with BooleanOptionalAction, abbreviations
allowed).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from vllm_proxy.domain.config import EngineKeys
from vllm_proxy.domain.secrets import show, shown_name
from vllm_proxy.domain.toml import dotted
from vllm_proxy.domain.value_types import id_problem

# Options that the daemon decides, since it listens, routes and stops through them.
OWNED = frozenset(
    "help model served-model-name host port uds api-key config root-path headless grpc middleware shutdown-timeout "
    "allowed-origins enable-sleep-mode data-parallel-multi-port-external-lb lora-modules".split()
)
OWNED_PREFIX = "ssl-"
# What is written in the place of some of them.
_INSTEAD = {
    "api-key": "`vllm-proxy keys add` writes one",
    "host": "write host in [server], where clients come in; engines listen on 127.0.0.1",
    "port": "write port in [server], where clients come in; engines get ports of their own",
    "uds": 'write listen = ["unix:PATH"] in [server], where clients come in',
    OWNED_PREFIX: "write server.tls_cert and server.tls_key",
    "allowed-origins": "write server.cors_origins",
    "served-model-name": "clients send the id of its table, or one of its aliases",
    "enable-sleep-mode": "write sleep = 1 in the model's table",
}
# Options that have a key of their own outside `args`, with vLLM's second name for one of them.
OWN_KEYS = {
    name.replace("_", "-"): name
    for name in EngineKeys.model_fields
    if name not in {"command", "env", "args", "devices", "memory", "sleep"}
} | {"device-memory-utilization": "gpu_memory_utilization"}
# vLLM's short names, and what other servers call keys of ours.
SHORT = {
    "tp": "tensor-parallel-size",
    "pp": "pipeline-parallel-size",
    "dp": "data-parallel-size",
    "q": "quantization",
}
_OF_OTHERS = {
    **dict.fromkeys(("keep-alive", "ttl"), "idle_timeout"),
    **dict.fromkeys(("context-length", "n-ctx", "num-ctx", "ctx-size"), "max_model_len"),
}
# Engines whose KV cache others have a part in do not wake up right: nothing that puts it there goes with `sleep`.
NOT_WITH_SLEEP = ("kv-transfer-config", "kv-offloading-")
# Options whose value is a secret, with the variable that says the same: every user may read a command line.
VARIABLES = {"hf-token": "HF_TOKEN"}
# Flags with no `--no-` form, and options whose list is one JSON token (of those not owned).
STORE_TRUE = frozenset({"disable-log-stats", "aggregate-engine-logging"})
JSON_LISTS = frozenset({"allowed-methods", "allowed-headers"})

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*(\.[A-Za-z0-9_.-]+)?")


def option_name(key: str) -> str:
    """`enable_prefix_caching` and `enable-prefix-caching` are one option; behind a dot the case and `_` are kept."""
    head, dot, rest = key.partition(".")
    return head.replace("_", "-") + dot + rest


def problems_of(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) for each option that cannot be passed on. The keys are as written."""
    for key, value in args.items():
        name = option_name(key)
        if message := _name_problem(name, value) or _negation_problem(name, value) or _value_problem(name, value):
            yield key, message


def refusal(name: str, value: object = None) -> str | None:
    """Why an option cannot be given, wherever it is written, with what is written in its place; None: it can be."""
    if variable := VARIABLES.get(name):
        return f'`ps` would show it: write env.{variable} = {{ file = "..." }} in the model\'s table'
    if name == "lora-modules":
        return f"clients could not ask for these: write {_adapter_of(value)} instead"
    if name in OWNED or name.startswith(OWNED_PREFIX):
        place = _INSTEAD.get(OWNED_PREFIX if name.startswith(OWNED_PREFIX) else name)
        return f"--{name} belongs to the daemon{f': {place}' if place else ' and cannot be set'}"
    return None


def misplaced(key: str, value: object) -> str | None:
    """What is said of a key of a model's table that is none, where it names an option or is what others call a key."""
    name = option_name(key).lstrip("-")
    full = SHORT.get(name, name)
    if meant := _OF_OTHERS.get(name) or OWN_KEYS.get(full):
        return f"unknown key; did you mean {meant}?"
    if full != name:
        return f"unknown key; did you mean args.{full.replace('-', '_')}?"
    if name == "enable-lora":
        return f"the daemon gives it to models that have adapters: write {_adapter_of(None)}"
    return refusal(name, value)


def instead(name: str, *, is_short: bool) -> str | None:
    """What is written in the place of an option of a command line, without its dashes; None: it may stand there."""
    if full := SHORT.get(name) if is_short else name.removeprefix("no-"):
        if full in OWN_KEYS:
            return f"write {OWN_KEYS[full]}"
        if full != name and is_short:
            return f"write args.{full.replace('-', '_')}"
        if full in _INSTEAD or full == "lora-modules" or full in VARIABLES or full.startswith(OWNED_PREFIX):
            return refusal(full)
    return None


def _adapter_of(modules: object) -> str:
    """The table of the first adapter of `lora_modules`, whose items are "NAME=PATH", or tables, or such in JSON."""
    first = modules[0] if isinstance(modules, list) and modules else modules
    if isinstance(first, str) and first.startswith("{"):
        with suppress(ValueError, RecursionError):
            first = json.loads(first)
    name, path = "", ""
    if isinstance(first, Mapping):
        name, path = (str(first.get(key, "")) for key in ("name", "path"))
    elif isinstance(first, str):
        name, _, path = first.partition("=")
    if not path or id_problem(name):
        return '[models.ID.adapters.NAME] with path = "a folder, or a hub id"'
    return f"[{dotted(('models', 'ID', 'adapters', name))}] with path = {show(path)}"


def not_with_sleep(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) for each option that an engine which may sleep cannot have."""
    for key in args:
        if option_name(key).startswith(NOT_WITH_SLEEP):
            yield (
                key,
                "cannot be given together with sleep: vLLM does not wake up what others keep; leave out one of both",
            )


def repeated(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) for each option that one table gives a second time, spelled differently."""
    seen: dict[str, str] = {}
    for key in args:
        name = option_name(key).removeprefix("no-")
        if name in seen:
            yield key, f"the same option as {show(seen[name])}; keep one of them"
        seen[name] = key


def tokens(args: Mapping[str, Any]) -> list[str]:
    """Command-line tokens of options that `problems_of` found nothing wrong with, in the file's order."""
    result: list[str] = []
    for name, value in args.items():
        result += _tokens(option_name(name), value)
    return result


def _tokens(name: str, value: Any) -> list[str]:  # noqa: ANN401 - a TOML value
    option = f"--{name}"
    if "." in name and not isinstance(value, str):  # vLLM reads what is no JSON as text, and always reads a value
        return [f"{option}={json.dumps(value)}"]
    if value is True:
        return [option]
    if value is False:
        return [] if name in STORE_TRUE else [f"--no-{name}"]
    if isinstance(value, Mapping) or (isinstance(value, list) and name in JSON_LISTS):
        return [option, json.dumps(value)]
    if isinstance(value, list):
        return [option, *(json.dumps(item) if isinstance(item, Mapping) else _scalar(item) for item in value)]
    return [f"{option}={_scalar(value)}"]


def _scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name_problem(name: str, value: object) -> str | None:
    if full := SHORT.get(name.lstrip("-")):
        own = f"{OWN_KEYS[full]}, which is written outside args" if full in OWN_KEYS else full.replace("-", "_")
        return f"unknown option; did you mean {own}?"
    if not _NAME.fullmatch(name):
        return f"expected the name of a vLLM option without its dashes, got {show(shown_name(name))}"
    base = name.partition(".")[0].removeprefix("no-")
    if base in OWN_KEYS:
        return f"has a key of its own: write {OWN_KEYS[base]} outside args"
    if message := refusal(base, value):
        return message
    for full in sorted([*OWNED, *OWN_KEYS, *VARIABLES, OWNED_PREFIX]):
        if full.startswith(base):  # argparse would take it for the full name
            return f"vLLM would read this as an abbreviation of --{full}, which cannot be set here"
    return None


def _negation_problem(name: str, value: object) -> str | None:
    if name.startswith("no-") and value is not True:
        return f"expected true, got {show(value, (name,))}; or write {name.removeprefix('no-')} = true or false"
    return None


def _value_problem(name: str, value: object) -> str | None:
    if isinstance(value, list):
        if not value:
            return "expected at least one item"
        for item in value:
            if isinstance(item, list):
                return "expected a list of plain values or tables, got a list inside a list"
            if isinstance(item, str | float) and str(item).startswith("-"):
                return f"cannot pass {show(item, (name,))} inside a list: vLLM would take it for an option"
    return _leaf_problem(name, value)


def _leaf_problem(name: str, value: object) -> str | None:
    if isinstance(value, Mapping):
        return next((message for key, item in value.items() if (message := _leaf_problem(f"{name}.{key}", item))), None)
    if isinstance(value, list):
        return next((message for item in value if (message := _leaf_problem(name, item))), None)
    if isinstance(value, str):
        return "expected text without NUL characters" if "\0" in value else None
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, got {value}"
    if not isinstance(value, bool | int | float):
        return f"expected a string, number, boolean, list or table, got {show(value, (name,))}"
    return None
