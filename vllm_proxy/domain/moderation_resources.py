"""The JSON of `/v1/moderations` as types, from which OpenAPI is generated: as OpenAI's API has it, and `labels`."""

from typing import Annotated, Literal, NotRequired, TypedDict

from pydantic import Field

from vllm_proxy.domain.moderation import CATEGORIES, Verdict


class TextPart(TypedDict):
    """A part of a text."""

    type: Literal["text"]
    text: str


class ModerationRequest(TypedDict):
    """What is to be checked."""

    input: Annotated[
        str | list[str] | list[TextPart],
        Field(
            description="A text; a list of texts, each with a result of its own; or the parts of one text, 1024 at "
            "most.",
            examples=["I want to hurt them."],
        ),
    ]
    model: NotRequired[Annotated[str | None, Field(description="Not looked at: the guard of `[moderation]` is asked.")]]


class ModerationResult(TypedDict):
    """The verdict on one text."""

    flagged: bool
    categories: Annotated[
        dict[str, bool], Field(description="Of OpenAI's categories, all 13: whether the score reaches the threshold.")
    ]
    category_scores: Annotated[dict[str, float], Field(description="0 to 1, of all 13.")]
    category_applied_input_types: Annotated[
        dict[str, list[Literal["text"]]], Field(description="`text`, of all 13: a guard reads nothing else.")
    ]
    labels: Annotated[list[str], Field(description="What the guard itself calls it.", examples=[["S1"]])]


class Moderations(TypedDict):
    """The verdicts, in the order of the texts."""

    id: str
    model: Annotated[str, Field(description="The id of the guard.", examples=["guard"])]
    results: list[ModerationResult]


def result(found: Verdict) -> ModerationResult:
    """A verdict as it is answered."""
    return {
        "flagged": found.flagged,
        "categories": {name: found.categories[name] for name in CATEGORIES},
        "category_scores": {name: found.scores[name] for name in CATEGORIES},
        "category_applied_input_types": {name: ["text"] for name in CATEGORIES},
        "labels": list(found.labels),
    }
