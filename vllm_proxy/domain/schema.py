"""The JSON schema of models.toml with the options of one vLLM in it, for editors: their names, types and choices.

The schema itself is a file of the package, `models.schema.json`. In doubt it accepts, as `options` does.
"""

import copy
from collections.abc import Mapping
from typing import Any

from vllm_proxy.domain import args
from vllm_proxy.domain.options import Option, OptionTable

type Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_TYPES: Mapping[str, Schema] = {  # of `Option.type`
    "str": _TEXT,
    "int": {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[+-]?\d+$"}]},
    "float": {"anyOf": [{"type": "number"}, {"type": "string"}]},
    "human_int": {
        "anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^(auto|-?\d+(\.\d+)?[kKmMgGtT]?i?)$"}]
    },
    "json": {"type": ["object", "array", "string", "number", "boolean"]},
    "folded": _TEXT,
    "other": {},
}


def with_options(schema: Schema, table: OptionTable) -> Schema:
    """A copy of the schema in which `args` knows every option that may stand there, in snake_case."""
    found = copy.deepcopy(schema)
    into = found["$defs"]["Model"]["properties"]["args"]
    into["properties"] = {
        option.name.replace("-", "_"): _of(option) | {"description": f"{option.names[0]} of vLLM {table.version}."}
        for option in table.options
        if _may_be_given(option.name)
    }
    return found


def _may_be_given(name: str) -> bool:
    """Whether neither the daemon nor a key of its own decides it."""
    decided = name in args.OWNED or name.startswith(args.OWNED_PREFIX)
    return not (decided or name in args.OWN_KEYS or name in args.VARIABLES or "." in name)


def _of(option: Option) -> Schema:
    if option.nargs == 0 and option.kind in {"boolean_optional", "store_true"}:
        return {"type": "boolean"}
    value = dict(_TYPES[option.type])
    if option.choices and option.type == "str":
        value = {"enum": list(option.choices)}
    elif option.choices:
        value["examples"] = list(option.choices)
    if option.kind not in {"store", "append"}:
        return {}
    if option.nargs in {"+", "*"} or isinstance(option.nargs, int) or option.kind == "append":
        return {"anyOf": [{"type": "array", "items": value, "minItems": 1}, value]}
    return {"anyOf": [value, {"type": "boolean"}]} if option.nargs == "?" else value
