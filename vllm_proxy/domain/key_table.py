"""The schema of `[keys.NAME]`: what `config` is of the rest of the file. All of it is live.

What a table means is a `Key`, with its `Limits`; `file/parse_keys.py` makes them.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field, Strict

from vllm_proxy.domain.config import Table
from vllm_proxy.domain.keys import HASH_PREFIX, MOST_HASHES
from vllm_proxy.domain.value_types import NonEmptyText, Reference, Text

_HASH = re.compile(re.escape(HASH_PREFIX) + r"[0-9a-f]{64}")


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _hash(text: str) -> str:
    if text.startswith("vp-"):
        msg = "this is the key itself, and it stands in a file now: make another, and write the hash that comes with it"
        raise ValueError(msg)
    if not _HASH.fullmatch(text):
        msg = "expected sha256: and 64 hex digits in lower case; `vllm-proxy keys new` makes a key and its hash"
        raise ValueError(msg)
    return text


Amount = Annotated[int, Field(ge=0, le=10**15)]  # JSON keeps it exact, and so do sums of it
Hashes = Annotated[
    tuple[Annotated[str, AfterValidator(_hash)], ...],
    Strict(strict=False),
    BeforeValidator(_one_or_more),
    Field(min_length=1, max_length=MOST_HASHES),
]
Scopes = Annotated[tuple[Literal["inference", "metrics", "read", "operate", "admin"], ...], Strict(strict=False)]
Globs = Annotated[tuple[NonEmptyText, ...], Strict(strict=False)]


class RateTable(Table):
    """`[keys.NAME.limits."GLOB"]`: how much of the models that a glob matches. 0: no limit."""

    requests_per_minute: Amount = 0
    tokens_per_minute: Amount = 0


class KeyTable(Table):
    """`[keys.NAME]`: who may do what, and how much. Either `hash` or `file`; `[keys.anonymous]` has neither."""

    hash: Hashes | None = None
    file: Reference | None = None
    description: Text = ""
    scopes: Scopes = ("inference",)
    models: Globs = ("*",)
    enabled: bool = True
    expires_at: AwareDatetime | None = None
    isolate_cache: bool = False
    requests_per_minute: Amount = 0
    tokens_per_minute: Amount = 0
    tokens_per_day: Amount = 0
    tokens_per_month: Amount = 0
    max_in_flight: Amount = 0
    max_output_tokens: Amount = 0
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    limits: dict[NonEmptyText, RateTable] = Field(default={})
