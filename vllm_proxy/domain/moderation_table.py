"""The schema of `[moderation]`: what `config` is of the rest of the file. All of it is live.

What the table means is a `Moderation`; `file/parse_moderation.py` makes it.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict

from vllm_proxy.domain.config import Table
from vllm_proxy.domain.moderation import CATEGORIES, SAFE
from vllm_proxy.domain.secrets import show
from vllm_proxy.domain.value_types import NonEmptyText


def _category(name: str) -> str:
    if name not in {*CATEGORIES, SAFE}:
        msg = f'expected one of {", ".join(map(show, CATEGORIES))}, or "{SAFE}" for no finding, got {show(name)}'
        raise ValueError(msg)
    return name


def _safe_alone(names: tuple[str, ...]) -> tuple[str, ...]:
    if SAFE in names and len(names) > 1:
        msg = f'expected "{SAFE}" alone, or categories: a label cannot be both'
        raise ValueError(msg)
    return names


Classes = Annotated[tuple[NonEmptyText, ...], Strict(strict=False)]
Categories = Annotated[
    tuple[Annotated[str, AfterValidator(_category)], ...], Strict(strict=False), AfterValidator(_safe_alone)
]


class ModerationTable(Table):
    """`[moderation]`: the model that checks texts, for `/v1/moderations` and for models with `moderate = true`."""

    model: NonEmptyText
    kind: Literal["llama-guard", "qwen3guard", "classifier", "json"]
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    classes: Classes = ()
    categories: dict[NonEmptyText, Categories] = Field(default={})
