"""Moderation: what `[moderation]` asks for, and the verdict on a text from what its guard finds in it.

A guard names its own labels; `[moderation.categories]` says which of OpenAI's categories each of them is. How guards
are asked and what their answers mean is in `guards`, the schema of the table in `moderation_table`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

type Kind = Literal["llama-guard", "qwen3guard", "classifier", "json"]
type Category = Literal[
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
]

CATEGORIES: tuple[Category, ...] = Category.__value__.__args__  # the 13 of OpenAI's API, all of them in every answer
SAFE = "safe"  # in the place of categories: this label is no finding

# Source: the model cards of Llama Guard 3 and 4, and of Qwen3Guard-Gen. A label without a category flags alone.
_LLAMA_GUARD: Mapping[str, tuple[str, ...]] = {
    "S1": ("violence",),
    "S2": ("illicit",),
    "S3": ("sexual", "illicit/violent"),
    "S4": ("sexual/minors",),
    "S5": ("harassment",),
    "S6": (),
    "S7": (),
    "S8": (),
    "S9": ("illicit/violent",),
    "S10": ("hate",),
    "S11": ("self-harm",),
    "S12": ("sexual",),
    "S13": (),
    "S14": ("illicit",),
}
_QWEN3GUARD: Mapping[str, tuple[str, ...]] = {
    "Violent": ("violence",),
    "Non-violent Illegal Acts": ("illicit",),
    "Sexual Content or Sexual Acts": ("sexual",),
    "Suicide & Self-Harm": ("self-harm",),
    "Unethical Acts": ("harassment", "hate"),
    "PII": (),
    "Politically Sensitive Topics": (),
    "Copyright Violation": (),
    "Jailbreak": (),
}
_JSON: Mapping[str, tuple[str, ...]] = {name: (name,) for name in CATEGORIES}
_DEFAULTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {"llama-guard": _LLAMA_GUARD, "qwen3guard": _QWEN3GUARD}


@dataclass(frozen=True, slots=True)
class Moderation:
    """`[moderation]` of a valid file."""

    model: str  # the id of the guard
    kind: Kind
    threshold: float = 0.5  # from this score on a text is flagged
    classes: tuple[str, ...] = ()  # of a classifier, in the order of its probabilities
    categories: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # by label: those of OpenAI, or SAFE

    def is_safe(self, label: str) -> bool:
        """Whether a label is no finding: one that is called so, unless the file says otherwise."""
        return SAFE in self.categories.get(label, (SAFE,) if label.casefold() == SAFE else ())


@dataclass(frozen=True, slots=True)
class Finding:
    """What a guard says of one text, in its own labels."""

    scores: Mapping[str, float]  # by label, 0 to 1
    named: tuple[str, ...] | None = None  # the labels that it said; None: those whose score reaches the threshold
    unsafe: float = 0.0  # how likely the text is unsafe, whatever it is called


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is answered about one text."""

    flagged: bool
    scores: Mapping[Category, float]  # all of them
    categories: Mapping[Category, bool]  # whether the score reaches the threshold
    labels: tuple[str, ...]  # what the guard calls it


def labels_of(kind: Kind, given: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
    """The categories of each label. `given`: what the file says; of a chat model the labels that it is asked for."""
    if kind == "json":
        return given or _JSON
    return {**_DEFAULTS.get(kind, {}), **given}


def verdict(moderation: Moderation, finding: Finding) -> Verdict:
    """What a finding means."""
    threshold = moderation.threshold
    counts = {label: score for label, score in finding.scores.items() if not moderation.is_safe(label)}
    scores: dict[Category, float] = dict.fromkeys(CATEGORIES, 0.0)
    for label, score in counts.items():
        for category in moderation.categories.get(label, ()):
            scores[category] = max(scores[category], score)  # type: ignore[index] # SAFE has no score
    all_safe = bool(finding.scores) and not counts
    highest = max([0.0 if all_safe else finding.unsafe, *counts.values()])
    named = tuple(finding.scores) if finding.named is None else finding.named
    return Verdict(
        flagged=highest >= threshold,
        scores=scores,
        categories={name: score >= threshold for name, score in scores.items()},
        labels=tuple(
            label for label in named if label in counts and (finding.named is not None or counts[label] >= threshold)
        ),
    )


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a text in several parts: of each category the highest score."""
    found = list(verdicts)
    if len(found) == 1:
        return found[0]
    return Verdict(
        flagged=any(one.flagged for one in found),
        scores={name: max(one.scores[name] for one in found) for name in CATEGORIES},
        categories={name: any(one.categories[name] for one in found) for name in CATEGORIES},
        labels=tuple(dict.fromkeys(label for one in found for label in one.labels)),
    )
