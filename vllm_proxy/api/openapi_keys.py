"""The keys of a model, and of a key, as JSON Schema, for `openapi`. Names, types, defaults come from `domain/config`.

Written by hand is what no type says: a line for people, and what the validators accept beyond their types.
tests/api/test_openapi.py compares both.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import core_schema

from vllm_proxy.domain.adapters import RANKS
from vllm_proxy.domain.config import AdaptersMax, AdapterTable, ModelTable, Policy, Restart
from vllm_proxy.domain.key_table import KeyTable, RateTable
from vllm_proxy.domain.keys import MOST_HASHES, RESERVED
from vllm_proxy.domain.units import parse_duration, parse_size, parse_size_or_percent

type Schema = dict[str, Any]

REF = "#/components/schemas/"
MODEL_ID: Schema = {
    "type": "string",
    "pattern": r"^(?!-)(?!.*(^|/)\.{0,2}(/|$))(?!(.*/)?(start|stop|restart|sleep|wake|logs)$)[A-Za-z0-9._:@/-]{1,200}$",
}
_ID = "What clients send as `model`. It cannot be changed."
DURATION: Schema = {
    "anyOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "minLength": 1, "pattern": r"^(\d+(\.\d+)?h)?(\d+(\.\d+)?m)?(\d+(\.\d+)?s)?(\d+ms)?$"},
    ],
    "examples": ["90s", "1h30m", 90],
}
_SIZE: Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\d{1,30}(\.\d{1,30})?\s*(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?$"},
    ],
    "examples": ["20GiB"],
}
_PART: Schema = {
    "anyOf": [*_SIZE["anyOf"], {"type": "string", "pattern": r"^(\d{1,2}(\.\d{1,30})?|100(\.0{1,30})?)\s*%$"}],
    "examples": ["64GiB", "50%"],
}
_READ: Mapping[Any, Schema] = {parse_duration: DURATION, parse_size: _SIZE, parse_size_or_percent: _PART}
_REFERENCES: dict[str, Schema] = {
    "file": {"type": "string", "minLength": 1, "pattern": r"^(?!credential:)[^\x00]+$"},
    "credential": {"type": "string", "pattern": r"^(?!\.{1,2}$)[A-Za-z0-9_.-]{1,255}$"},
}
_TAKEN: dict[str, Schema] = {
    "model": {"type": "string", "pattern": "^[^-]", "examples": ["Qwen/Qwen3-0.6B"]},
    "max_model_len": {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": r"^(auto|\d+(\.\d+)?[kKmMgG]?)$"},
        ],
        "examples": [8192, "8k", "auto"],
    },
    "memory": _SIZE,
    "devices": {
        "type": "array",
        "items": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[^, ]+$"}]},
        "uniqueItems": True,
        "examples": [[0, 1]],
    },
    "env": {
        "type": "object",
        "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
        "additionalProperties": {
            "anyOf": [
                {"type": ["string", "number", "null"]},
                *(
                    {"type": "object", "required": [key], "properties": {key: schema}, "additionalProperties": False}
                    for key, schema in _REFERENCES.items()
                ),
            ]
        },
        "examples": [{"HF_HOME": "/srv/hf", "HF_TOKEN": {"file": "/run/secrets/hf-token"}}],
    },
    "aliases": {"type": "array", "items": MODEL_ID, "examples": [["gpt-4o-mini"]]},
    "adapters": {
        "type": "object",
        "propertyNames": {"pattern": MODEL_ID["pattern"]},
        "additionalProperties": {"anyOf": [{"$ref": REF + "AdapterKeys"}, {"type": "null"}]},
        "examples": [{"support": {"path": "adapters/support"}}],
    },
    "rank": {"type": "integer", "enum": list(RANKS)},
}
KEYS = {
    "model": "Hugging Face id, local path or URL, passed to vLLM as it is. Required, unless `[defaults]` gives it.",
    "tensor_parallel_size": "GPUs that share each layer.",
    "pipeline_parallel_size": "GPUs that share the layers between them.",
    "max_model_len": 'Tokens of a prompt and its answer together; also `"8k"` or `"auto"`.',
    "dtype": "Number format of weights and activations.",
    "quantization": "How the weights are quantized.",
    "trust_remote_code": "Run Python code that comes with the model.",
    "gpu_memory_utilization": "This engine's share of each GPU's memory.",
    "memory": "What this engine gets of each of its GPUs, in the place of `gpu_memory_utilization`; 0: it uses none.",
    "max_num_seqs": "Requests that the engine works on at once.",
    "sleep": "It may sleep in the place of being stopped: 1 keeps its weights in the machine's memory, 2 does not and "
    "loads them again when it wakes; 0: it may not, whatever the defaults say. Not with `kv_transfer_config` or "
    "`kv_offloading_*` in `args`.",
    "devices": "GPU indices or UUIDs, as `CUDA_VISIBLE_DEVICES`: exactly these. Left out: those that have room.",
    "command": "Another vLLM for this model, over `engine.command`.",
    "env": 'Environment, over `engine.env`; a value that is a secret may stand elsewhere: `{ file = "…" }`, '
    '`{ credential = "…" }`. Shown as `***`.',
    "args": "Any other option of `vllm serve`: true is `--key`, false `--no-key`, an array several words, "
    "an object JSON.",
    "description": "For people.",
    "metadata": "Anything; shown by `GET /models`.",
    "aliases": "Other names that clients may send.",
    "enabled": "Whether it is offered and may run.",
    "replicas": "Instances.",
    "balance": "Which of several instances gets a request: `prefix`: one that was sent the beginning of its prompt, "
    "unless it is much busier; `least-loaded`: the one with the fewest requests in flight.",
    "start": "`always`: has its room for good; `warm`: runs whenever there is room that nobody waits for; `on-demand`: "
    "started by the first request; later ones join the same start and wait in the queue.",
    "priority": "Whose requests wait with more comes first, whose has less gives way first; never beats `max_wait`.",
    "yield_timeout": "How long its running requests may take when others wait for its room; 0: they are never cut.",
    "idle_timeout": "On-demand: unload after this long with no request; 0 never.",
    "startup_timeout": "A start in which nothing moves for this long (no line, no download, no disk) has failed.",
    "drain_timeout": "For requests in flight before an engine is stopped.",
    "stop_timeout": "From SIGTERM to SIGKILL.",
    "stall_timeout": "Requests in flight and nothing moves for this long, or `/health` is bad for as long, without "
    "requests too: the engine is restarted; 0 never, but for an adopted engine that does not answer for 30 s.",
    "replace": "`surge`: new beside old, then switch; `drain`: old away first; `auto`: one at a time where there are "
    "several replicas, else `drain`.",
    "request_timeout": "For a whole request, from its head on: body and queue included; 0 none.",
    "max_in_flight": "Requests at once for each instance; 0 no limit; more wait in the queue.",
    "queue_size": "Requests that may wait; more get 503 at once.",
    "queue_timeout": "Longest wait for an instance to become ready or free.",
    "moderate": "The guard of `[moderation]` checks the last user turn of each request first; what it flags gets 400 "
    "`content_filter`.",
    "restart": "What happens after an engine died by itself.",
    "adapters": "LoRA adapters by id, each of which clients may send as `model`; null removes one.",
    "adapters_max": "The room that engines have for adapters, in the place of what is derived.",
    "max_failures": "So many in a row, then the instance stays in `error`.",
    "backoff": "Before the next start; doubles, with jitter, up to `max_backoff`.",
    "max_backoff": "The longest wait before a start.",
}

OF_AN_ADAPTER = {
    "path": "A folder as PEFT writes it, a relative one from the file's; or the id of an adapter on the hub.",
    "description": "For people.",
    "enabled": "Whether it is offered; one that is not is not read, and no room is kept for it.",
}
OF_ADAPTERS_MAX = {
    "rank": "The largest rank: `--max-lora-rank`. Left out: the smallest that holds all.",
    "loras": "Different ones in one batch: `--max-loras`. Left out: as many as there are, at most 4.",
    "cpu_loras": "So many are held in memory: `--max-cpu-loras`. Left out: twice as many as there are, at least 16.",
}
_COSTS = {
    "adapters": " A change is applied live, where engines have room for it; else it replaces them.",
    "adapters_max": " A change replaces engines that were started with something else.",
}


def nullable(schema: Schema) -> Schema:
    """The same, or null."""
    if isinstance(kind := schema.get("type"), str):
        found = {**schema, "type": [kind, "null"]}
        return {**found, "enum": [*schema["enum"], None]} if "enum" in schema else found
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return schema if isinstance(kind, list) else {"anyOf": [schema, {"type": "null"}]}


KEY_NAME: Schema = {
    "type": "string",
    "pattern": "^[a-z0-9][a-z0-9._-]{0,63}$",
    "not": {"enum": list(RESERVED)},
    "description": "For people, logs and counters. It cannot be changed.",
}
_HASH: Schema = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
_TAKEN_OF_A_KEY: dict[str, Schema] = {
    "hash": {"anyOf": [_HASH, {"type": "array", "items": _HASH, "minItems": 1, "maxItems": MOST_HASHES}]},
    "file": {"type": "string", "minLength": 1, "examples": ["credential:ci-key"]},
    "models": {"type": "array", "items": {"type": "string", "minLength": 1}, "examples": [["chat", "org/*"]]},
    "expires_at": {"type": "string", "format": "date-time"},
    "limits": {
        "type": "object",
        "propertyNames": {"minLength": 1},
        "additionalProperties": nullable({"$ref": REF + "RateKeys"}),
        "examples": [{"qwen-*": {"tokens_per_minute": 20000}}],
    },
}
OF_A_RATE = {
    "requests_per_minute": "Requests in any 60 seconds; 0 no limit.",
    "tokens_per_minute": "Tokens of prompts and answers in any 60 seconds; 0 no limit.",
}
OF_A_KEY = {
    "hash": "`sha256:` and 64 hex digits, or up to 4 of them, the newest last: all of them are good.",
    "file": "The key is the first line of this file, in place of `hash`; `credential:NAME` is a systemd credential.",
    "description": "For people.",
    "scopes": "What it may do: `inference`, `metrics`, `read` (`metrics` too), `operate` (`read` too), `admin` (all).",
    "models": "Globs over the ids and aliases that it may use; an id allows its aliases.",
    "enabled": "`false` revokes it: its next request is refused, its running streams end.",
    "expires_at": "From then on it is refused, and its running streams end; with an offset.",
    "isolate_cache": "Its prompts share no prefix cache with those of others.",
    "requests_per_minute": "Requests in any 60 s, over all models; more: 429 `rate_limit_exceeded`; 0 none.",
    "tokens_per_minute": "Tokens of prompts and answers in any 60 s, over all models; 0 none.",
    "tokens_per_day": "Tokens of a day in UTC; more: 429 `insufficient_quota`; 0 none.",
    "tokens_per_month": "Tokens of a month in UTC; as above.",
    "max_in_flight": "Requests at once, over all models; more wait in the model's queue; 0 none.",
    "max_output_tokens": "Tokens of one answer; a request for more gets 400 `invalid_max_tokens`; 0 none.",
    "priority": "Whose requests come first: the higher one's.",
    "weight": "Its share among keys of its priority: one of 2 gets twice what one of 1 does.",
    "limits": 'Tables `[keys.NAME.limits."GLOB"]` with `requests_per_minute` and `tokens_per_minute`, which count '
    "beside the key's own, for each model apart: for a model its id, else the longest glob that matches it.",
}


class Generate(GenerateJsonSchema):
    """pydantic's generator, without titles that repeat the keys, and true to what is taken in."""

    def field_title_should_be_set(self, schema: object) -> bool:  # noqa: ARG002 - the signature is pydantic's
        """No."""
        return False

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        """`["integer", "null"]` reads better than two alternatives."""
        return nullable(self.generate_inner(schema["schema"]))

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        """Durations and sizes are numbers only once they were read."""
        if self.mode == "validation" and (known := _READ.get(schema["function"]["function"])):
            return dict(known)
        return super().function_before_schema(schema)


def key_schemas() -> dict[str, Schema]:
    """The keys as they are taken in, and as they are in force."""
    taken, effective = _table(ModelTable, "validation"), _table(ModelTable, "serialization")
    taken["properties"]["restart"] = nullable({"$ref": REF + "RestartKeys"}) | {"description": KEYS["restart"]}
    most = {"$ref": REF + "AdaptersMaxKeys"}
    taken["properties"]["adapters_max"] = nullable(most) | {"description": _said("adapters_max")}
    effective["properties"] |= {
        "restart": {"$ref": REF + "EffectiveRestart"},
        "adapters": {"type": "object", "additionalProperties": {"$ref": REF + "EffectiveAdapter"}},
        "adapters_max": {"$ref": REF + "EffectiveAdaptersMax"},
    }
    taken["properties"] = {"id": MODEL_ID | {"description": _ID}, **taken["properties"]}
    key = _taken_in(KeyTable, _TAKEN_OF_A_KEY, OF_A_KEY) | {"description": "Left out or null: the default."}
    key["properties"] = {"name": KEY_NAME, **key["properties"]}
    example = {"model": "Qwen/Qwen3-0.6B", "max_model_len": 8192}
    return {
        "ModelKeys": taken | {"examples": [example]},
        "NewModel": taken | {"required": ["id"], "examples": [{"id": "chat", **example}]},
        "AdapterKeys": _taken_in(AdapterTable, {}, OF_AN_ADAPTER) | {"description": "A LoRA adapter."},
        "AdaptersMaxKeys": _taken_in(AdaptersMax, _TAKEN, OF_ADAPTERS_MAX) | {"description": "Left out: derived."},
        "EffectiveAdapter": _table(AdapterTable, "serialization"),
        "EffectiveAdaptersMax": _table(AdaptersMax, "serialization")
        | {"description": "What engines are started with, where there are adapters."},
        "RestartKeys": _table(Restart, "validation"),
        "EffectiveModel": effective,
        "EffectiveRestart": _table(Restart, "serialization"),
        "KeyTable": key | {"examples": [{"scopes": ["inference"], "models": ["chat"]}]},
        "RateKeys": _taken_in(RateTable, {}, OF_A_RATE) | {"description": "Left out or null: the default."},
        "NewKeyTable": key | {"required": ["name"], "examples": [{"name": "ci", "scopes": ["inference"]}]},
    }


def _table(table: type[BaseModel], mode: JsonSchemaMode) -> Schema:
    """Of a model. Taken in, every key may be left out; in force, every key is there."""
    if mode == "validation":
        about = "A key that is left out or null takes its value from `[defaults]`, else its default."
        words = {key: _said(key) if table is ModelTable else KEYS[key] for key in table.model_fields}
        return _taken_in(table, _TAKEN, words) | {"description": about}
    schema = _bare(table, mode) | {"description": "Every key, `[defaults]` merged in."}
    schema["required"] = list(schema["properties"])
    for value in schema["properties"].values():
        value.pop("default", None)
    return schema


def _taken_in(table: type[BaseModel], known: Mapping[str, Schema], words: Mapping[str, str]) -> Schema:
    """Every key may be left out, and null is the same. `known`: what is taken beyond the types."""
    schema = _bare(table, "validation")
    for key, value in schema["properties"].items():
        default = {"default": value["default"]} if value.get("default") is not None else {}
        taken = known.get(key, {name: part for name, part in value.items() if name != "default"})
        schema["properties"][key] = nullable(taken) | default | {"description": words[key]}
    return schema


def _bare(table: type[BaseModel], mode: JsonSchemaMode) -> Schema:
    schema = table.model_json_schema(schema_generator=Generate, mode=mode)
    for name in ("$defs", "title", "required"):
        schema.pop(name, None)
    return schema


def _said(key: str) -> str:
    """Of a model's key, with what a change of it costs."""
    return KEYS[key] + (_COSTS.get(key) or _cost(key))


def _cost(key: str) -> str:
    return " A change is applied live." if key in Policy.model_fields else " A change replaces the engine."
