"""The description of the routes for inference, made of the table in `traffic/routes.py`."""

from collections.abc import Mapping
from typing import Any

from vllm_proxy.api.openapi_keys import Schema
from vllm_proxy.api.openapi_operation import BODY, Answer, Operation, as_json
from vllm_proxy.domain import moderation_resources, resources
from vllm_proxy.traffic.routes import INFERENCE, InferenceRoute

_INFERENCE = (
    *BODY, "isolation_unavailable", "invalid_json", "missing_model", "invalid_max_tokens", "model_not_found",
    "not_found",
    "rate_limit_exceeded", "insufficient_quota", "engine_failed", "model_error", "model_disabled", "model_stopped",
    "no_room", "queue_full", "shutting_down", "queue_timeout", "request_timeout", "request_cancelled", "content_filter",
    "moderation_unavailable",
)  # fmt: skip
_CHECKED = frozenset({"content_filter", "moderation_unavailable"})  # of models with `moderate = true`

_NAMES_MODEL: Schema = {
    "type": "object",
    "properties": {"model": {"type": "string", "description": "A model's id or an alias.", "examples": ["chat"]}},
    "required": ["model"],
}
_FORM: Schema = {
    "type": "object",
    "properties": {**_NAMES_MODEL["properties"], "file": {"type": "string", "contentMediaType": "audio/*"}},
    "required": ["model", "file"],
}
_ENGINES: Mapping[str, Schema] = {"application/json": {"type": "object"}, "text/event-stream": {"type": "string"}}


def _infer(summary: str, body: Schema = _NAMES_MODEL, kind: str = "application/json", **more: Any) -> Operation:  # noqa: ANN401 - what Operation takes
    errors = _INFERENCE if kind == "application/json" else (*_INFERENCE, "storage_full")
    answers = (Answer(200, "The engine's.", _ENGINES),)
    return Operation("Inference", summary, answers, errors, {kind: body}, passes_on=True, **more)


_ASKED = (
    "request_too_large", "overloaded", "not_found", "engine_failed", "shutting_down", "request_timeout",
    "request_cancelled",
)  # fmt: skip
_MODERATION = (
    *(code for code in _INFERENCE if code not in {"missing_model", "invalid_max_tokens", *_CHECKED}), "bad_request",
    "unsupported_endpoint",
)  # fmt: skip
_OF_A_MODEL = tuple(
    code
    for code in _INFERENCE
    if code not in {"invalid_json", "isolation_unavailable", "invalid_max_tokens", *_CHECKED}
)
_TOKENIZER = "Where the model has `args.enable-tokenizer-info-endpoint = true`."
_GUARDED = "Each text is one request to the guard that `[moderation]` names. 501 where it names none."
_ANTHROPIC = "Errors come in Anthropic's envelope."


def _inference(route: InferenceRoute) -> Operation:
    if route.names_model == "nowhere":
        answers = (Answer(200, "The engine's.", _ENGINES),)
        return Operation("Inference", route.summary, answers, _ASKED, passes_on=True)
    if route.names_model == "session":
        answer = Answer(101, "A WebSocket.", {})
        return Operation("Inference", route.summary, (answer,), ("bad_request",), None, ("model",))
    if route.names_model == "query":
        answers = (Answer(200, "The engine's.", {"application/json": {"type": "object"}}),)
        return Operation(
            "Inference", route.summary, answers, _OF_A_MODEL, None, ("of_one",), _TOKENIZER, passes_on=True
        )
    if route.names_model == "guard":
        answer = Answer(200, "A verdict on each text.", as_json(moderation_resources.Moderations))
        body = as_json(moderation_resources.ModerationRequest)
        return Operation("Inference", route.summary, (answer,), _MODERATION, body, description=_GUARDED)
    if route.names_model == "form":
        return _infer(route.summary, _FORM, "multipart/form-data")
    return _infer(route.summary, description=_ANTHROPIC if route.anthropic else "")


INFERENCE_ROUTES: Mapping[str, Operation] = {
    **{f"{route.method} {route.path}": _inference(route) for route in INFERENCE},
    "GET /v1/models": Operation(
        "Inference",
        "List models and aliases",
        (Answer(200, "Whatever their states; `tasks` says what a ready one can.", as_json(resources.Cards)),),
    ),
    "GET /v1/models/{model_id}": Operation(
        "Inference", "Show a model or alias", (Answer(200, "Its card.", as_json(resources.Card)),), ("model_not_found",)
    ),
}
