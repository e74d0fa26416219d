"""Parameters and headers of the routes, for `openapi`: each is described once, and named where it is taken or answered.

Which route takes which is in `openapi_routes`.
"""

from vllm_proxy.api.openapi_keys import MODEL_ID, Schema

PARAMETERS: dict[str, Schema] = {
    "model_id": {
        "name": "model_id", "in": "path", "required": True, "schema": MODEL_ID | {"examples": ["chat"]},
        "description": "A model's id. It may hold slashes, percent-encoded or not.",
    },
    "id": {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}},
    "name": {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "examples": ["ci"]}},
    "file": {"name": "file", "in": "path", "required": True, "schema": {"type": "string"}},
    "if_match": {
        "name": "If-Match", "in": "header", "schema": {"type": "string"},
        "description": "Write only if the file still has this revision: an `ETag` of an earlier answer, or `*`.",
    },
    "topic": {"name": "topic", "in": "path", "required": True, "schema": {"type": "string", "examples": ["errors"]}},
    "vllm": {
        "name": "vllm", "in": "query", "schema": {"type": "string", "enum": ["0", "1"], "default": "0"},
        "description": "`1`: with the options of the vLLM that `[engine]` starts, for who may read.",
    },
    "wait": {
        "name": "wait", "in": "query", "schema": {"type": "string", "enum": ["0", "1"], "default": "0"},
        "description": "`1`: answer once every instance that this concerns runs what the file asks for and is ready "
        "(or sleeps, or has ended), or else with `not_rolled_out`; the change stays.",
    },
    "timeout": {
        "name": "timeout", "in": "query", "schema": {"type": "string", "default": "30m", "examples": ["90", "5m"]},
        "description": "With `wait`: for how long.",
    },
    "lines": {
        "name": "lines", "in": "query", "schema": {"type": "integer", "minimum": 0, "default": 100},
        "description": "How many of the last lines; 10000 at most.",
    },
    "follow": {
        "name": "follow", "in": "query", "schema": {"type": "string", "examples": ["1"]},
        "description": "`1`: server-sent events, one a line, until one side leaves.",
    },
    "all": {
        "name": "all", "in": "query", "schema": {"type": "string", "examples": ["1"]},
        "description": "`1`: also what is not vLLM's own: of HTTP, Python, the process, and when counters were made.",
    },
    "from": {
        "name": "from", "in": "query", "schema": {"type": "string", "examples": ["2026-11-01T00:00:00Z", "2026-11-01"]},
        "description": "Since when: a time with its offset, or a day in UTC; the hour that it is in counts whole. "
        "Default: 24 hours ago.",
    },
    "to": {
        "name": "to", "in": "query", "schema": {"type": "string", "examples": ["2026-12-01T00:00:00Z", "2026-12-01"]},
        "description": "Until when, as `from`; what has begun of an hour counts whole. Default: now.",
    },
    "by": {
        "name": "by", "in": "query", "schema": {"type": "string", "default": "key,model", "examples": ["key,day"]},
        "description": "What a row is of: some of `key`, `model`, and `day` or `hour`, with commas between them.",
    },
    "request_id": {
        "name": "request_id", "in": "path", "required": True, "schema": {"type": "string"},
        "description": "Its `X-Request-Id`, or the id that its engine knows it by.",
    },
    "limit": {
        "name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 0, "default": 100},
        "description": "How many of each list; 1000 at most.",
    },
    "minutes": {
        "name": "minutes", "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": 60, "default": 60},
        "description": "How many of the last ones.",
    },
    "of_model": {
        "name": "model", "in": "query", "schema": {"type": "string", "examples": ["chat"]},
        "description": "Of this model alone.",
    },
    "fleet": {
        "name": "fleet", "in": "query", "schema": {"type": "string", "examples": ["1"]},
        "description": "`1`: the fleet as it is, then what changes of it, and what has happened.",
    },
    "since": {
        "name": "since", "in": "query", "schema": {"type": "string", "examples": ["3f2a9c1b-17", "0"]},
        "description": "Begin with what came after the one with this id; `0`: with all of the 1,000 that are kept.",
    },
    "last_event_id": {
        "name": "Last-Event-ID", "in": "header", "schema": {"type": "string"},
        "description": "As `since`, from clients that connect anew by themselves.",
    },
    "of_one": {
        "name": "model", "in": "query", "schema": {"type": "string", "examples": ["chat"]},
        "description": "The model, by its id or an alias.",
    },
    "model": {
        "name": "model", "in": "query", "schema": {"type": "string"},
        "description": "The model; without it the first `session.update` names it.",
    },
}  # fmt: skip
HEADERS: dict[str, Schema] = {
    "ETag": {"schema": {"type": "string"}, "description": "The quoted revision of the file."},
    "Location": {"schema": {"type": "string"}, "description": "Where it is."},
    "X-Vllm-Proxy-Read-Only": {
        "schema": {"type": "string"},
        "description": "Why a write would be 409 `config_read_only`: its message. Only there where it would be.",
    },
}
