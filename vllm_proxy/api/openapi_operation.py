"""What describes a route for `openapi`: what it is for, takes and answers. The descriptions are in `openapi_routes`."""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_proxy.api.openapi_keys import REF, Schema

BODY = ("unsupported_media_type", "request_too_large", "overloaded")  # where one is read
HERE = ("host_not_allowed", "origin_not_allowed")  # where callers without a key are looked at closely


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: what comes with a status."""

    status: int
    description: str
    content: Mapping[str, Schema]
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """One route. `errors`: codes of `errors.STATUS`; `parameters`: those besides the path's."""

    tag: str
    summary: str
    answers: tuple[Answer, ...]
    errors: tuple[str, ...] = ()
    body: Mapping[str, Schema] | None = None
    parameters: tuple[str, ...] = ()
    description: str = ""
    body_required: bool = True
    passes_on: bool = False  # an engine's answer, errors included


def as_json(resource: type) -> dict[str, Schema]:
    """A body in JSON: one of `domain.resources`."""
    return {"application/json": {"$ref": REF + resource.__name__}}


def as_text(kind: str) -> dict[str, Schema]:
    """A body of this kind."""
    return {kind: {"type": "string"}}
