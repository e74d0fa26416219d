"""`vllm_proxy/models.schema.json`, the JSON schema of the configuration; `python -m tests.pages` writes it.

Types, bounds and costs are those of the code; what a key means is said in the tables of docs/configuration.md, and
nowhere else.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vllm_proxy.api.openapi_keys import KEY_NAME, MODEL_ID, REF, Generate, Schema, key_schemas
from vllm_proxy.domain import plan
from vllm_proxy.domain.config import Devices, EngineDefaults, Server
from vllm_proxy.domain.moderation_table import ModerationTable
from vllm_proxy.help import page

FILE = Path(__file__).parent.parent / "vllm_proxy/models.schema.json"
_DEFINED = {
    "ModelKeys": "Model", "RestartKeys": "Restart", "AdapterKeys": "Adapter", "AdaptersMaxKeys": "AdaptersMax",
    "KeyTable": "Key", "RateKeys": "Rate",
}  # fmt: skip


def made() -> str:
    """The text of the file."""
    schemas = key_schemas()
    definitions = {name: _of_toml(schemas[known]) for known, name in _DEFINED.items()}
    for definition in definitions.values():
        definition.pop("examples", None)
    definitions["Model"]["properties"].pop("id")
    definitions["Key"]["properties"].pop("name")
    env = definitions["Model"]["properties"]["env"]
    tables = {
        "server": _table(Server, "server", {}),
        "engine": _table(EngineDefaults, "engine", {"env": env}),
        "devices": _table(Devices, "devices", {}),
        "moderation": _table(ModerationTable, "moderation", {}),
        "defaults": {"$ref": "#/$defs/Model", "description": "Of every model; what a model says itself is stronger."},
        "models": _tables("Model", MODEL_ID, "The models; the name of each table is what clients send as `model`."),
        "keys": _tables("Key", KEY_NAME, "Who may do what; `vllm-proxy keys new NAME` writes such a table."),
    }
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The configuration of vllm-proxy",
        "type": "object",
        "properties": tables,
        "additionalProperties": False,
        "$defs": definitions,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _tables(definition: str, names: Schema, description: str) -> Schema:
    return {
        "type": "object",
        "propertyNames": {key: value for key, value in names.items() if key != "description"},
        "additionalProperties": {"$ref": f"#/$defs/{definition}"},
        "description": description,
    }


def _table(table: type[BaseModel], name: str, known: Mapping[str, Schema]) -> Schema:
    schema = _of_toml(table.model_json_schema(schema_generator=Generate, mode="validation"))
    words = _words(name)
    for key, value in schema["properties"].items():
        cost = " A change needs a restart of the daemon." if f"{name}.{key}" in plan.RESTART_KEYS else ""
        described = {part: of for part, of in value.items() if part != "default"}
        schema["properties"][key] = known.get(key, described) | {"description": words[key] + cost}
    return {part: of for part, of in schema.items() if part not in {"$defs", "title", "description"}}


def _words(table: str) -> dict[str, str]:
    """What the page says of the keys of a table."""
    from tests.pages import BLOCK, cells_of  # which writes the file, too

    blocks = "".join(found["table"] for found in BLOCK.finditer(page("configuration")))
    rows = [cells_of(line) for line in blocks.splitlines()]
    prefix = f"`{table}."
    return {row[0].removeprefix(prefix).strip("`"): row[-1] for row in rows if row[0].startswith(prefix)}


def _of_toml(value: Any) -> Any:  # noqa: ANN401 - JSON
    """The same without null, which TOML does not have."""
    if isinstance(value, list):
        return [_of_toml(each) for each in value]
    if not isinstance(value, dict):
        return re.sub(r"(?i)(?<=left out) or null|; null removes one", "", value) if isinstance(value, str) else value
    found = {key: _of_toml(each) for key, each in value.items()}
    if isinstance(ref := found.get("$ref"), str):
        name = ref.removeprefix(REF)
        found["$ref"] = f"#/$defs/{_DEFINED.get(name, name)}"
    if isinstance(found.get("type"), list):
        kinds = [kind for kind in found["type"] if kind != "null"]
        found["type"] = kinds if len(kinds) > 1 else kinds[0]
    if isinstance(found.get("enum"), list):
        found["enum"] = [one for one in found["enum"] if one is not None]
    if "anyOf" in found:
        rest = [one for one in found.pop("anyOf") if one != {"type": "null"}]
        found = {**rest[0], **found} if len(rest) == 1 else {**found, "anyOf": rest}
    return found
