"""The JSON of `/keys` as types: what `resources` is of the rest of the API. No answer has a key's hash.

A key itself is in the one answer to what made it.
"""

from typing import Annotated, TypedDict

from pydantic import Field

from vllm_proxy.domain import keys
from vllm_proxy.domain.limits import Rate
from vllm_proxy.domain.resources import Time
from vllm_proxy.domain.units import show_time


class KeyRate(TypedDict):
    """How much a key may use of some models in any 60 seconds."""

    requests_per_minute: Annotated[int, Field(description="0: no limit.")]
    tokens_per_minute: Annotated[int, Field(description="Of prompts and answers together; 0: no limit.")]


class Key(TypedDict):
    """Who may do what: a key of the file, or one that the environment gives. Neither the key nor its hashes."""

    name: Annotated[str, Field(examples=["ci"])]
    id: Annotated[
        str | None,
        Field(description="The first 8 hex digits of its newest hash; null of `anonymous`.", examples=["1f2e3d4c"]),
    ]
    hashes: Annotated[int, Field(description="How many keys are good for it: 2 while it is rotated.")]
    source: Annotated[keys.Source, Field(description="Where it is written, and can be changed.")]
    file: Annotated[str | None, Field(description="The file whose first line is the key, where its table names one.")]
    description: str
    scopes: Annotated[list[keys.Scope], Field(description="But for those that others of them include.")]
    models: Annotated[list[str], Field(description="Globs over ids and aliases.", examples=[["*"]])]
    enabled: bool
    expires_at: Time | None
    isolate_cache: bool
    requests_per_minute: Annotated[int, Field(description="Over all models; 0: no limit.")]
    tokens_per_minute: Annotated[int, Field(description="As above, of prompts and answers together.")]
    tokens_per_day: Annotated[int, Field(description="As above, of a day in UTC.")]
    tokens_per_month: Annotated[int, Field(description="As above, of a month in UTC.")]
    max_in_flight: Annotated[int, Field(description="Requests at once, over all models; 0: no limit.")]
    max_output_tokens: Annotated[int, Field(description="Of one answer; 0: no limit.")]
    priority: Annotated[int, Field(description="Whose requests come first: the higher one's.")]
    weight: Annotated[float, Field(description="Its share among the keys of its priority.")]
    limits: Annotated[
        dict[str, KeyRate],
        Field(
            description="By globs over ids: for a model its id counts, else the longest that matches.",
            examples=[{"qwen-*": {"requests_per_minute": 0, "tokens_per_minute": 20000}}],
        ),
    ]


class NewKey(Key):
    """A key with the key itself, which is told this once."""

    key: Annotated[str | None, Field(description="Null where none was made, as a hash or a file was given.")]


class Keys(TypedDict):
    """All keys: those of the environment, then those of the file, then those of `server.keys_file`."""

    revision: Annotated[str, Field(description="Of both files together; `ETag` quotes it.")]
    keys: list[Key]


def key_of(key: keys.Key) -> Key:
    """A key, as it may be shown."""
    limits = key.limits
    return {
        "name": key.name,
        "id": key.digests[-1].hex()[:8] if key.digests else None,
        "hashes": len(key.digests),
        "source": key.source,
        "file": key.file,
        "description": key.description,
        "scopes": keys.without_included(key.scopes),
        "models": list(key.models),
        "enabled": key.enabled,
        "expires_at": None if key.expires_at is None else show_time(key.expires_at),
        "isolate_cache": key.isolate_cache,
        **_rate(limits.rate),
        "tokens_per_day": limits.tokens_per_day,
        "tokens_per_month": limits.tokens_per_month,
        "max_in_flight": limits.max_in_flight,
        "max_output_tokens": limits.max_output_tokens,
        "priority": limits.priority,
        "weight": limits.weight,
        "limits": {glob: _rate(rate) for glob, rate in limits.models},
    }


def _rate(rate: Rate) -> KeyRate:
    return {"requests_per_minute": rate.requests_per_minute, "tokens_per_minute": rate.tokens_per_minute}
