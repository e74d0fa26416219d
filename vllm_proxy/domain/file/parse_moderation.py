"""Parses `[moderation]`, and what models with `moderate = true` need of it.

The classes of a classifier are read from the `config.json` of its folder where the file does not name them: over HTTP
an engine tells the name of the likeliest class alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from vllm_proxy.domain.config import ModelSpec, TomlTable, revision_of
from vllm_proxy.domain.file.validate import Found, validate
from vllm_proxy.domain.moderation import Moderation, labels_of
from vllm_proxy.domain.moderation_table import ModerationTable
from vllm_proxy.domain.references import Files
from vllm_proxy.domain.secrets import show

_AT = ("moderation",)
_CLASSES = (*_AT, "classes")
_MOST_CLASSES = 10_000
_WRITE = "write [moderation], with the model that is the guard"


class _ModelConfig(msgspec.Struct):
    """Of a folder as Hugging Face writes it."""

    id2label: dict[str, str] | None = None


def moderation_of(
    document: TomlTable, models: Sequence[ModelSpec], files: Files, attached: dict[str, str], found: list[Found]
) -> Moderation | None:
    """What the file asks for; None where it asks for none, or something is wrong with it, which is appended to `found`.

    `attached`: gets the revision of the file that the classes are read from.
    """
    table = document.get("moderation")
    if table is None:
        found += _without_guard(models, document)
        return None
    if not isinstance(table, Mapping):
        found.append((_AT, f"expected a table, got {show(table)}"))
        return None
    valid = validate(ModerationTable, table, _AT, found)
    if valid is None:
        return None
    wrong: list[Found] = []
    tables = document.get("models", {})
    if not isinstance(tables, Mapping) or valid.model not in tables:
        wrong.append(((*_AT, "model"), f"expected the id of a model of this file, got {show(valid.model)}"))
    classes = valid.classes
    if valid.kind != "classifier":
        if classes:
            wrong.append((_CLASSES, f"expected none: a guard of kind {show(valid.kind)} names its labels itself"))
    elif not classes and not wrong:
        classes = _classes_of(_spec(models, valid.model), files, attached, wrong)
    wrong += _checks_itself(models, valid.model)
    wrong += (
        ((*_AT, "categories", label), f"expected one of the classes: {', '.join(map(show, classes[:20]))}")
        for label in valid.categories
        if classes and label not in classes
    )
    found += wrong
    if wrong:
        return None
    categories = labels_of(valid.kind, valid.categories)
    return Moderation(valid.model, valid.kind, valid.threshold, classes, categories)


def _spec(models: Sequence[ModelSpec], name: str) -> ModelSpec | None:
    return next((spec for spec in models if spec.id == name), None)


def _classes_of(guard: ModelSpec | None, files: Files, attached: dict[str, str], wrong: list[Found]) -> tuple[str, ...]:
    """The classes of a classifier, by its own configuration."""
    if guard is None:  # it has a problem of its own
        return ()
    reference = f"{guard.engine.model}/config.json"
    if files.is_elsewhere(reference):
        return ()
    expected = (
        "expected the guard's classes in the order of its probabilities, as `id2label` of its config.json has them"
    )
    try:
        data = files.read(reference)
    except OSError as error:
        attached[reference] = ""
        wrong.append((_CLASSES, f"{expected}; cannot read {files.place(reference)}: {error.strerror}"))
        return ()
    attached[reference] = revision_of(data)
    classes = _ordered(data)
    if not classes:
        wrong.append((_CLASSES, f"{expected}; {files.place(reference)} names none"))
    return classes


def _ordered(data: bytes) -> tuple[str, ...]:
    """The labels by their numbers; none where a number is missing."""
    try:
        labels = msgspec.json.decode(data, type=_ModelConfig).id2label or {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    if len(labels) > _MOST_CLASSES:
        return ()
    names: list[Any] = [labels.get(str(number)) for number in range(len(labels))]
    return tuple(names) if all(names) else ()


def _without_guard(models: Sequence[ModelSpec], document: TomlTable) -> Iterator[Found]:
    for spec in models:
        if spec.policy.moderate:
            yield _place_of(spec, document), f"expected a guard that checks its requests: {_WRITE}"


def _place_of(spec: ModelSpec, document: TomlTable) -> tuple[str, ...]:
    """Where `moderate` stands that a model has."""
    defaults = document.get("defaults", {})
    inherited = isinstance(defaults, Mapping) and "moderate" in defaults and "moderate" not in spec.written
    return ("defaults", "moderate") if inherited else ("models", spec.id, "moderate")


def _checks_itself(models: Sequence[ModelSpec], guard: str) -> Iterator[Found]:
    spec = _spec(models, guard)
    if spec is not None and spec.written.get("moderate"):
        yield ("models", guard, "moderate"), "expected false: this is the guard itself, which [moderation] names"
