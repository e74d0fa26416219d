"""The JSON of usage, a part of `resources`: a report of what keys have used, and whether it is kept.

Descriptions are written here and nowhere else.
"""

from typing import Annotated, Literal, NotRequired, TypedDict

from pydantic import Field

_TIME = {"format": "date-time"}


class UsageRow(TypedDict):
    """What was used by those that `by` tells apart."""

    key: Annotated[str | None, Field(description="Null where `by` has no `key`.", examples=["ci"])]
    model: Annotated[str | None, Field(description="Or adapter; null where `by` has no `model`.", examples=["chat"])]
    hour: NotRequired[Annotated[str, Field(description="When it began, UTC.", json_schema_extra=_TIME)]]
    day: NotRequired[Annotated[str, Field(description="In UTC.", json_schema_extra={"format": "date"})]]
    requests: Annotated[int, Field(description="That were admitted, failed ones included.")]
    prompt_tokens: Annotated[int, Field(description="As engines reported them, cached ones included.")]
    completion_tokens: Annotated[int, Field(description="As engines reported them.")]
    cached_tokens: Annotated[int, Field(description="Of the prompt: those that were in an engine's cache.")]
    estimated_tokens: Annotated[
        int,
        Field(description="Of requests whose engine reported none, as of streams that ended early; in no other sum."),
    ]
    failed: Annotated[int, Field(description="Requests that were answered 5xx, or whose answer broke off.")]
    limited: Annotated[int, Field(description="Requests that a limit of the key refused; in no other sum.")]


Usage = TypedDict(
    "Usage",
    {
        "from": Annotated[str, Field(description="A whole hour, UTC.", json_schema_extra=_TIME)],
        "to": Annotated[str, Field(description="A whole hour, UTC, which is not in it.", json_schema_extra=_TIME)],
        "by": list[Literal["key", "model", "day", "hour"]],
        "rows": Annotated[list[UsageRow], Field(description="In the order of time, then by key and model.")],
    },
)
Usage.__doc__ = "What was used."


class DiskHealth(TypedDict):
    """Something that is kept on disk: what keys have used, the record of engines."""

    error: Annotated[
        str | None,
        Field(description="Why it cannot be: it is held in memory meanwhile, and lost with the daemon. Else null."),
    ]
