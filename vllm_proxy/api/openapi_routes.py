"""The description of each route for `openapi`: what it is for, takes and answers.

A route without a description here is an error, which tests/api/test_openapi.py finds.
"""

from collections.abc import Mapping
from http import HTTPStatus

from vllm_proxy.api.openapi_inference import INFERENCE_ROUTES
from vllm_proxy.api.openapi_keys import REF, Schema
from vllm_proxy.api.openapi_observation import OBSERVATION
from vllm_proxy.api.openapi_operation import BODY, HERE, Answer, Operation, as_json, as_text
from vllm_proxy.domain import device_resources, key_resources, resources, usage_resources

TAGS = {
    "Models": "What is declared and what runs. A write goes to the file first, then to the engines, and is answered "
    "once the file is on disk and the change adopted, not when the model has loaded.",
    "Configuration": "The file, the only desired state: an editor, `git pull` and this API change it alike.",
    "Keys": "Who may do what. A key is told once, when it is made; its hashes are never shown. A change is written "
    "where the key stands, a new key to `server.keys_file` where that is set, and is in force when it is answered.",
    "Observation": "What is in flight, what has happened, and how much of it.",
    "Daemon": "How the daemon is.",
    "Inference": "As vLLM documents it: the body is passed on byte for byte, but for an alias, and the answer "
    "is streamed as it comes. An engine's own errors pass unchanged.",
    "Documentation": "This API, in its own words.",
}


def _keys(name: str) -> dict[str, Schema]:
    """A body in JSON: keys of a table."""
    return {"application/json": {"$ref": REF + name}}


_NO_FILE = ("revision_mismatch", "config_read_only", "config_not_written")
_WRITE = (*HERE, *BODY, "invalid_json", "invalid_model", "invalid_config", *_NO_FILE)
_WAIT, _LATE = ("wait", "timeout"), ("bad_request", "not_rolled_out", "shutting_down")
_ETAG = ("ETag",)
_FINISH: Schema = {
    "type": "object",
    "properties": {"finish": {"type": "boolean", "default": False, "description": "Keep only the newest; make none."}},
    "additionalProperties": False,
}
_TOML = {"text/toml": {"type": "string"}, "application/toml": {"type": "string"}}


def _model(status: int, description: str, *headers: str) -> Answer:
    return Answer(status, description, as_json(resources.Model), (*_ETAG, *headers))


def _act(summary: str, *errors: str, more: str = "") -> Operation:
    return Operation(
        "Models",
        summary,
        (Answer(HTTPStatus.ACCEPTED, "Begun.", as_json(resources.Model)),),
        (*HERE, "model_not_found", "model_disabled", *errors),
        description=f"{more}A running state, not a desired one: it is not written to the file, and a change of the "
        "model or a restart of the daemon forgets it.",
    )


_MODELS = {
    "GET /models": Operation(
        "Models", "List all models", (Answer(200, "In the file's order.", as_json(resources.Models), _ETAG),), HERE
    ),
    "POST /models": Operation(
        "Models",
        "Create a model",
        (_model(201, "Written to the file; it may still load.", "Location"),),
        (*_WRITE, *_LATE, "model_exists"),
        _keys("NewModel"),
        ("if_match", *_WAIT),
    ),
    "GET /models/{model_id}": Operation(
        "Models", "Show a model", (_model(200, "What is asked for, and what is."),), (*HERE, "model_not_found")
    ),
    "PUT /models/{model_id}": Operation(
        "Models",
        "Replace all keys of a model",
        (_model(200, "Written to the file."),),
        (*_WRITE, *_LATE, "model_not_found"),
        _keys("ModelKeys"),
        ("if_match", *_WAIT),
        "A key that is left out or null is gone.",
    ),
    "PATCH /models/{model_id}": Operation(
        "Models",
        "Change some keys of a model",
        (_model(200, "Written to the file."),),
        (*_WRITE, *_LATE, "model_not_found"),
        {"application/merge-patch+json": {"$ref": REF + "ModelKeys"}, **_keys("ModelKeys")},
        ("if_match", *_WAIT),
        "A JSON merge patch (RFC 7396): null removes a key, tables are merged key by key, the rest stays.",
    ),
    "DELETE /models/{model_id}": Operation(
        "Models",
        "Delete a model",
        (_model(202, "Gone from the file; its engines drain."), Answer(204, "Gone.", {}, _ETAG)),
        (*HERE, *_LATE, "model_not_found", "invalid_config", *_NO_FILE),
        None,
        ("if_match", *_WAIT),
    ),
    "POST /models/{model_id}/start": _act("Start a model by hand"),
    "POST /models/{model_id}/stop": _act("Stop a model by hand"),
    "POST /models/{model_id}/restart": _act("Restart a model by hand"),
    "POST /models/{model_id}/sleep": _act(
        "Put a model to sleep by hand", "sleep_not_enabled", more="Its next request wakes it. "
    ),
    "POST /models/{model_id}/wake": _act("Wake a model by hand", more="Or start it, where it does not sleep. "),
    "GET /models/{model_id}/logs": Operation(
        "Models",
        "Read what its engines write",
        (Answer(200, "The last lines.", {**as_text("text/plain"), **as_text("text/event-stream")}),),
        (*HERE, "model_not_found", "bad_request"),
        None,
        ("lines", "follow"),
        "Lines of a model with several instances begin with `ID/INDEX | `.",
    ),
}
_WRITE_KEY = (*HERE, *BODY, "invalid_json", "invalid_key", "invalid_config", *_NO_FILE)
_ONE_KEY = ("key_not_found", "key_conflict")
_KEYS = {
    "GET /keys": Operation(
        "Keys", "List all keys", (Answer(200, "Without their hashes.", as_json(key_resources.Keys), _ETAG),), HERE
    ),
    "POST /keys": Operation(
        "Keys",
        "Make a key",
        (Answer(201, "In force. `key` is told this once.", as_json(key_resources.NewKey), (*_ETAG, "Location")),),
        (*_WRITE_KEY, "key_exists"),
        _keys("NewKeyTable"),
        ("if_match",),
        "With a `hash` or a `file` of your own, and for `anonymous`, no key is made.",
    ),
    "GET /keys/{name}": Operation(
        "Keys",
        "Show a key",
        (Answer(200, "Without its hashes.", as_json(key_resources.Key), _ETAG),),
        (*HERE, "key_not_found"),
    ),
    "PATCH /keys/{name}": Operation(
        "Keys",
        "Change a key",
        (Answer(200, "In force.", as_json(key_resources.Key), _ETAG),),
        (*_WRITE_KEY, *_ONE_KEY),
        {"application/merge-patch+json": {"$ref": REF + "KeyTable"}, **_keys("KeyTable")},
        ("if_match",),
        "A JSON merge patch (RFC 7396). `enabled = false` revokes: the next request is refused, running streams end.",
    ),
    "DELETE /keys/{name}": Operation(
        "Keys",
        "Delete a key",
        (Answer(204, "Gone.", {}, _ETAG),),
        (*HERE, *_ONE_KEY, "invalid_config", *_NO_FILE),
        None,
        ("if_match",),
    ),
    "POST /keys/{name}/rotate": Operation(
        "Keys",
        "Rotate a key",
        (Answer(200, "In force. `key` is told this once.", as_json(key_resources.NewKey), _ETAG),),
        (*_WRITE_KEY, *_ONE_KEY),
        {"application/json": _FINISH},
        ("if_match",),
        "One more hash, behind the others (the last is the newest, 4 at most): the old key is good until `finish` "
        "keeps only the newest.",
        body_required=False,
    ),
}
_CONFIGURATION = {
    "GET /config": Operation(
        "Configuration",
        "Show the file",
        (Answer(200, "As it is on disk.", as_text("text/toml"), (*_ETAG, "X-Vllm-Proxy-Read-Only")),),
        (*HERE, "invalid_config"),
    ),
    "PUT /config": Operation(
        "Configuration",
        "Replace the file",
        (Answer(200, "Written and adopted.", as_json(resources.Applied), _ETAG),),
        (*HERE, *BODY, *_LATE, "invalid_config", *_NO_FILE),
        _TOML,
        ("if_match", *_WAIT),
    ),
    "POST /config/plan": Operation(
        "Configuration",
        "What would a file change?",
        (Answer(200, "Nothing is applied.", as_json(resources.Plan)),),
        (*HERE, *BODY, "invalid_config"),
        _TOML,
        description="Beside the steps for models: which `keys` are new, changed or gone, other `settings` that are "
        "live, with their values, what waits for a restart, and `warnings`. Options that vLLM would refuse are "
        "`invalid_config`, as in a write. Without a body: what would the file as it is on disk change? A text may name "
        "files (`server.keys_file`, `file` of a key) and programs (`command`, `env`): without the scope `admin` only "
        "those are looked at that the configuration names already.",
        body_required=False,
    ),
    "POST /config/reload": Operation(
        "Configuration",
        "Read the file again now",
        (Answer(200, "Adopted.", as_json(resources.Applied), _ETAG),),
        (*HERE, *_LATE, "invalid_config"),
        parameters=_WAIT,
        description="The daemon also does so by itself when the file changes.",
    ),
}
_DAEMON = {
    "GET /": Operation(
        "Daemon",
        "Show name, version, endpoints",
        (
            Answer(200, "This daemon.", as_json(resources.Root)),
            Answer(303, "To `/ui/`, where `Accept` asks for HTML first.", {}, ("Location",)),
        ),
        HERE,
    ),
    "GET /ui": Operation(
        "Daemon",
        "The page",
        (Answer(200, "HTML, at `/ui/`.", as_text("text/html")), Answer(308, "There.", {}, ("Location",))),
        HERE,
    ),
    "GET /ui/{file}": Operation(
        "Daemon", "What the page is made of", (Answer(200, "A file.", {"*/*": {}}),), (*HERE, "not_found")
    ),
    "GET /health": Operation("Daemon", "Is it alive?", (Answer(200, "It is.", as_json(resources.Health)),), HERE),
    "GET /devices": Operation(
        "Daemon",
        "Who has the memory of the GPUs?",
        (
            Answer(
                200, "As it was last seen; an empty list where nobody manages any.", as_json(device_resources.Devices)
            ),
        ),
        HERE,
    ),
    "GET /usage": Operation(
        "Daemon",
        "What have keys used?",
        (Answer(200, "In whole hours.", {**as_json(usage_resources.Usage), **as_text("text/csv")}),),
        (*HERE, "bad_request", "usage_unavailable"),
        None,
        ("from", "to", "by"),
        "A key without the scope `read` sees itself alone. `Accept: text/csv` gives the rows as CSV. Only callers that "
        "are metered are counted: where there are keys, or with `server.usage = true`.",
    ),
    "GET /version": Operation(
        "Daemon", "Which vLLM is this?", (Answer(200, "As vLLM answers it.", as_json(resources.Version)),), HERE
    ),
    "GET /ready": Operation(
        "Daemon",
        "Are its models ready?",
        (
            Answer(
                200,
                'Every enabled model with `start = "always"` is, or somebody stopped it or put it to sleep by hand.',
                as_json(resources.Ready),
            ),
            Answer(503, "Some are not.", as_json(resources.Ready)),
        ),
        HERE,
    ),
    "GET /metrics": Operation(
        "Daemon",
        "Metrics for Prometheus",
        (Answer(200, "Its text format.", as_text("text/plain") | as_text("application/openmetrics-text")),),
        HERE,
        description="Where requests are traced, who asks for OpenMetrics gets that, with exemplars.",
    ),
    "GET /metrics/engines": Operation(
        "Daemon",
        "Metrics of all ready engines, as vLLM has them, each with `model` and `replica`",
        (Answer(200, "Prometheus' text format.", as_text("text/plain")),),
        HERE,
        parameters=("all",),
        description="Nobody is woken. An engine that does not answer in time has `vllm_proxy_engine_up` 0 alone.",
    ),
}


def _document(summary: str) -> Operation:
    page = as_text("text/html")
    answers = (
        Answer(200, "Served by the daemon itself.", page),
        Answer(501, "The extra `docs` is not installed.", page),
    )
    return Operation("Documentation", summary, answers, HERE)


_DOCUMENTATION = {
    "GET /help": Operation(
        "Documentation",
        "The pages of the manual",
        (Answer(200, "A list, at `/help/`.", as_text("text/html")), Answer(308, "There.", {}, ("Location",))),
        HERE,
    ),
    "GET /help/{topic}": Operation(
        "Documentation",
        "A page of the manual",
        (
            Answer(
                200,
                "HTML; Markdown of `TOPIC.md`, and of all pages at once of `all.md`.",
                as_text("text/html") | as_text("text/markdown"),
            ),
            Answer(303, "Where an error code, a reason or an exit status is explained.", {}, ("Location",)),
        ),
        (*HERE, "not_found"),
    ),
    "GET /schema.json": Operation(
        "Documentation",
        "The JSON schema of the configuration",
        (Answer(200, "For editors.", {"application/schema+json": {"type": "object"}}),),
        (*HERE, "bad_request"),
        parameters=("vllm",),
    ),
    "GET /openapi.json": Operation(
        "Documentation",
        "This document",
        (Answer(200, "OpenAPI 3.1.", {"application/json": {"type": "object"}}),),
        HERE,
    ),
    "GET /docs": _document("This document in Swagger UI"),
    "GET /redoc": _document("This document in ReDoc"),
    "GET /docs/assets/{file}": Operation(
        "Documentation", "What these pages are made of", (Answer(200, "A file.", {"*/*": {}}),), (*HERE, "not_found")
    ),
}

OPERATIONS: Mapping[str, Operation] = {
    **_MODELS,
    **_KEYS,
    **_CONFIGURATION,
    **OBSERVATION,
    **_DAEMON,
    **INFERENCE_ROUTES,
    **_DOCUMENTATION,
}
