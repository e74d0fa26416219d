"""`[models.ID.args]`: options of `vllm serve`, validated without vLLM and rendered as command-line arguments.

Refuses options that belong to the daemon or have a key of their own. What a certain version of vLLM accepts is checked
by `domain/options.py`. Source of the rules: the parser of vLLM 0.32 (argparse with BooleanOptionalAction, abbreviations
allowed).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_proxy.domain.config import EngineKeys
from vllm_proxy.domain.secrets import show, shown_name

# Options that the daemon decides, since it listens, routes and stops through them.
OWNED = frozenset(
    "help model served-model-name host port uds api-key config root-path headless grpc middleware shutdown-timeout "
    "allowed-origins enable-sleep-mode data-parallel-multi-port-external-lb".split()
)
OWNED_PREFIX = "ssl-"
# Options that have a key of their own outside `args`, with vLLM's second name for one of them.
OWN_KEYS = {
    name.replace("_", "-"): name
    for name in EngineKeys.model_fields
    if name not in {"command", "env", "args", "devices", "memory", "sleep"}
} | {"device-memory-utilization": "gpu_memory_utilization"}
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
        if message := _name_problem(name) or _negation_problem(name, value) or _value_problem(name, value):
            yield key, message


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


def _name_problem(name: str) -> str | None:
    if not _NAME.fullmatch(name):
        return f"expected the name of a vLLM option without its dashes, got {show(shown_name(name))}"
    base = name.partition(".")[0].removeprefix("no-")
    if base in OWN_KEYS:
        return f"has a key of its own: write {OWN_KEYS[base]} outside args"
    if variable := VARIABLES.get(base):
        return f'`ps` would show it: write env.{variable} = {{ file = "..." }} outside args'
    if base in OWNED or base.startswith(OWNED_PREFIX):
        return f"--{base} belongs to the daemon and cannot be set"
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
