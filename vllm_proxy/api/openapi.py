"""`GET /openapi.json`: the API as an OpenAPI 3.1 document, generated from the routing table and the types.

Nothing is listed here by hand that the code says already, so the document cannot drift from it
(tests/api/test_openapi.py).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

from pydantic import TypeAdapter

from vllm_proxy import __version__
from vllm_proxy.api.openapi_keys import REF, Generate, Schema, key_schemas
from vllm_proxy.api.openapi_operation import Answer, Operation
from vllm_proxy.api.openapi_parameters import HEADERS, PARAMETERS
from vllm_proxy.api.openapi_routes import OPERATIONS, TAGS
from vllm_proxy.domain import (
    device_resources,
    feed_resources,
    key_resources,
    moderation_resources,
    resources,
    usage_resources,
)
from vllm_proxy.domain.keys import Scope
from vllm_proxy.errors import STATUS
from vllm_proxy.traffic.envelope import anthropic_type
from vllm_proxy.traffic.routes import is_anthropic

_DESCRIPTION = """One OpenAI-compatible address in front of many vLLM processes, kept as one declarative file says.

JSON in and out; times are RFC 3339 in UTC. Every answer has an `X-Request-Id`, the request's own where it sent one.
Errors are `{"error": {"message", "type", "param", "code"}}`; `Retry-After` comes with them where waiting helps.
"""

_ANSWERS: tuple[Any, ...] = (
    resources.Models, key_resources.Keys, key_resources.NewKey,
    resources.Plan, resources.Applied, device_resources.Devices, usage_resources.Usage, resources.Health,
    resources.Ready, resources.Root, resources.Version,
    resources.Cards, resources.Error, resources.AnthropicError, resources.ModelEvent, resources.ConfigAccepted,
    resources.ConfigRejected, resources.PlanEvent, resources.WriteEvent,
    moderation_resources.Moderations, moderation_resources.ModerationRequest,
    feed_resources.Requests, feed_resources.Stats, feed_resources.FleetEvent, feed_resources.ConfigState,
    feed_resources.Happening, feed_resources.ResetEvent,
)  # fmt: skip


_ENGINES_ERROR: Schema = {"type": "object", "description": "An error of the engine's own, unchanged."}
_MESSAGE = "cannot …: why, and what to do"
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key, as `Authorization: Bearer KEY`."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "A key, as Anthropic's API."},
}
NOT_LET_IN = ("missing_api_key", "invalid_api_key", "expired_api_key", "missing_scope")


type Described = tuple[str, str, Scope | None]  # method, path as the router writes it, scope


def document(routes: Iterable[Described]) -> dict[str, Any]:
    """The document for these routes.

    Raises:
        KeyError: a route is not described.

    """
    paths: dict[str, dict[str, Schema]] = {}
    order = {route: place for place, route in enumerate(OPERATIONS)}
    for route, scope in sorted(
        ((f"{method} {re.sub(r':[^}]*}', '}', path)}", scope) for method, path, scope in routes),
        key=lambda found: order[found[0]],
    ):
        method, _, path = route.partition(" ")
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, OPERATIONS[route], scope)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vllm-proxy",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "./"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "parameters": PARAMETERS,
            "headers": HEADERS,
            "securitySchemes": _SCHEMES,
        },
    }


def _operation(method: str, path: str, operation: Operation, scope: Scope | None) -> Schema:
    parameters = [*re.findall(r"{(\w+)}", path), *operation.parameters]
    found: Schema = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": method.lower() + "".join(map(str.capitalize, re.findall(r"[a-z0-9]+", path) or ["root"])),
        "description": operation.description,
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in parameters],
        "responses": _responses(path, [*operation.errors, *(NOT_LET_IN if scope else ())], operation),
    }
    if operation.body is not None:
        found["requestBody"] = {"required": operation.body_required, "content": _content(operation.body)}
    shown = {name: value for name, value in found.items() if value}
    return shown | {"security": [{name: [scope]} for name in _SCHEMES] if scope else []}


def _responses(path: str, errors: Sequence[str], operation: Operation) -> dict[str, Schema]:
    name, example = ("AnthropicError", _anthropic_example) if is_anthropic(path) else ("Error", _example)
    schema: Schema = {"$ref": REF + name}
    if operation.passes_on:
        schema = {"anyOf": [schema, _ENGINES_ERROR]}
    found = {str(int(answer.status)): _answer(answer) for answer in operation.answers}
    for status in sorted({STATUS[code] for code in errors}):
        codes = [code for code in errors if STATUS[code] == status]
        found.setdefault(str(status), {
            "description": f"{HTTPStatus(status).phrase}: {', '.join(f'`{code}`' for code in codes)}",
            "content": {
                "application/json": {
                    "schema": schema,
                    "examples": {code: {"value": example(code)} for code in codes},
                }
            },
        })  # fmt: skip
    if operation.passes_on:
        found["default"] = {
            "description": "Any other error of the engine's own, as it says it.",
            "content": {"application/json": {"schema": _ENGINES_ERROR}},
        }
    return found


def _example(code: str) -> Schema:
    error: Schema = {
        "message": _MESSAGE,
        "type": "server_error" if STATUS[code] >= 500 else "invalid_request_error",
        "param": None,
    }
    problems = [{"path": "models.chat.replicas", "line": 3, "message": "expected a whole number"}]
    details = {"problems": problems} if code in {"invalid_model", "invalid_key", "invalid_config"} else {}
    return {"error": error | {"code": code} | details}


def _anthropic_example(code: str) -> Schema:
    kind = anthropic_type(STATUS[code])
    return {"type": "error", "error": {"type": kind, "message": _MESSAGE, "code": code}}


def _answer(answer: Answer) -> Schema:
    found: Schema = {"description": answer.description}
    if answer.headers:
        found["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in answer.headers}
    if answer.content:
        found["content"] = _content(answer.content)
    return found


def _content(content: Mapping[str, Schema]) -> Schema:
    return {kind: {"schema": schema} for kind, schema in content.items()}


def _schemas() -> dict[str, Schema]:
    """Everything under components/schemas: what is answered, and what is taken in."""
    adapters: list[tuple[str, Literal["serialization"], TypeAdapter[Any]]]
    adapters = [(answer.__name__, "serialization", TypeAdapter(answer)) for answer in _ANSWERS]
    _, made = TypeAdapter.json_schemas(adapters, ref_template=REF + "{model}", schema_generator=Generate)
    found: dict[str, Schema] = made["$defs"]
    for schema in found.values():
        schema.pop("title", None)
    found["Model"]["properties"]["effective"] = {"$ref": REF + "EffectiveModel"}
    return dict(sorted((found | key_schemas()).items()))
