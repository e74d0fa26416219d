"""`[moderation]` in the file: what it means, and every problem in it."""

import json

import pytest

from vllm_proxy.domain.config import Config, revision_of
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.moderation import CATEGORIES
from vllm_proxy.domain.plan import Kind, plan
from vllm_proxy.domain.references import NoFiles
from vllm_proxy.errors import ConfigError

MODELS = '[models.guard]\nmodel = "models/guard"\n[models.chat]\nmodel = "org/chat"\n'
LLAMA = '[moderation]\nmodel = "guard"\nkind = "llama-guard"\n'
CLASSIFIER = '[moderation]\nmodel = "guard"\nkind = "classifier"\n'
REFERENCE = "models/guard/config.json"


class Folder(NoFiles):
    """The files beside the configuration. `elsewhere`: none is looked at."""

    def __init__(self, data: bytes | None, *, elsewhere: bool = False) -> None:
        self.data, self.elsewhere = data, elsewhere

    def read(self, text: str) -> bytes:
        """The configuration of the guard."""
        if self.data is None or text != REFERENCE:
            return super().read(text)
        return self.data

    def is_elsewhere(self, _text: str) -> bool:
        """As it was told."""
        return self.elsewhere


def parse(text: str, data: bytes | None = None, *, elsewhere: bool = False) -> Config:
    """The meaning of a file."""
    return parse_config((text + MODELS).encode(), "f", files=Folder(data, elsewhere=elsewhere))


def problems(text: str, data: bytes | None = None) -> list[str]:
    """Its problems, without lines."""
    with pytest.raises(ConfigError) as found:
        parse(text, data)
    return [f"{problem.path}: {problem.message}" for problem in found.value.problems]


def test_a_guard_has_the_categories_of_its_kind_and_those_of_the_file() -> None:
    """What the file says of a label is stronger, label by label."""
    assert parse("").moderation is None
    found = parse(
        LLAMA + "threshold = 0.7\n[moderation.categories]\nS10 = ['hate', 'harassment']\nS99 = []\n"
    ).moderation
    assert found is not None
    assert (found.model, found.kind, found.threshold, found.classes) == ("guard", "llama-guard", 0.7, ())
    assert found.categories["S10"] == ("hate", "harassment")
    assert found.categories["S1"] == ("violence",)
    assert found.categories["S99"] == ()
    assert len(found.categories) == 15
    assert all(set(names) <= set(CATEGORIES) for names in found.categories.values())
    qwen = parse(LLAMA.replace("llama-guard", "qwen3guard")).moderation
    assert qwen is not None
    assert qwen.categories["Unethical Acts"] == ("harassment", "hate")
    assert len(qwen.categories) == 9


def test_classes_that_the_file_does_not_name_are_those_of_the_folder() -> None:
    """In the order of their numbers; another content of that file is another configuration."""
    data = json.dumps({"id2label": {"1": "toxic", "0": "safe", "2": "threat"}, "hidden_size": 64}).encode()
    config = parse(CLASSIFIER, data)
    assert config.moderation is not None
    assert config.moderation.classes == ("safe", "toxic", "threat")
    assert config.attached == {REFERENCE: revision_of(data)}
    assert config.fingerprint != parse(CLASSIFIER, data + b" ").fingerprint
    named = parse(CLASSIFIER + "classes = ['a', 'b']\n")
    assert named.moderation is not None
    assert (named.moderation.classes, named.attached) == (("a", "b"), {})
    elsewhere = parse(CLASSIFIER, elsewhere=True).moderation  # of a text that may have no file looked at
    assert elsewhere is not None
    assert elsewhere.classes == ()


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"id2label": {}}', b'{"id2label": {"1": "x"}}', b'{"id2label": {"0": ""}}', b"\xff"]
)
def test_a_folder_that_names_no_classes_is_a_problem(data: bytes) -> None:
    """With the file that was read; once it is mended, it is read again."""
    (found,) = problems(CLASSIFIER, data)
    assert found.startswith("moderation.classes: expected the guard's classes in the order of its probabilities")
    assert found.endswith(f"{REFERENCE} names none")
    with pytest.raises(ConfigError) as error:
        parse(CLASSIFIER)
    assert error.value.attached == {REFERENCE: ""}
    assert "cannot read" in str(error.value.problems[0].message)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("moderation = 3\n", "moderation: expected a table, got 3"),
        ("[moderation]\nkind = 'json'\n", "moderation.model: missing: this table needs it"),
        ("[moderation]\nmodel = 'guard'\n", "moderation.kind: missing: this table needs it"),
        ("[moderation]\nmodel = 'guard'\nkind = 'shield'\n",
         'moderation.kind: expected one of "llama-guard", "qwen3guard", "classifier", "json", got "shield"'),
        ("[moderation]\nmodel = 'gard'\nkind = 'json'\n",
         'moderation.model: expected the id of a model of this file, got "gard"'),
        (LLAMA + "threshold = 0\n", "moderation.threshold: expected more than 0.0, got 0"),
        (LLAMA + "threshold = 1.5\n", "moderation.threshold: expected at most 1.0, got 1.5"),
        (LLAMA + "treshold = 1\n", "moderation.treshold: unknown key; did you mean threshold?"),
        (LLAMA + "classes = ['a']\n",
         'moderation.classes: expected none: a guard of kind "llama-guard" names its labels itself'),
        (LLAMA + "[moderation.categories]\nS1 = ['violent']\n",
         'moderation.categories.S1.0: expected one of "harassment"'),
        (LLAMA + "[moderation.categories]\nS1 = ['safe', 'hate']\n", 'moderation.categories.S1: expected "safe" alone'),
        (LLAMA + "[moderation.categories]\nS1 = 'hate'\n", "moderation.categories.S1: expected a list"),
        (CLASSIFIER + "classes = ['a', 'b']\n[moderation.categories]\nc = []\n",
         'moderation.categories.c: expected one of the classes: "a", "b"'),
    ],
)  # fmt: skip
def test_each_problem_is_told_with_what_was_expected(text: str, problem: str) -> None:
    """At its place."""
    assert any(found.startswith(problem) for found in problems(text)), problems(text)


def test_a_moderated_model_needs_a_guard_and_a_guard_is_not_moderated() -> None:
    """By the model's own key and by the defaults, at the place where it stands."""
    (found,) = problems(MODELS.replace("[models.guard]", "[models.x]\nmodel = 'x'\nmoderate = true\n#").split("#")[0])
    assert found.startswith("models.x.moderate: expected a guard that checks its requests: write [moderation]")
    (found,) = problems("[defaults]\nmoderate = true\n")
    assert found.startswith("defaults.moderate: expected a guard")
    inherited = parse(LLAMA + "[defaults]\nmoderate = true\n").models
    assert [spec.policy.moderate for spec in inherited.values()] == [False, True]
    text = LLAMA + MODELS.replace("models/guard", "models/guard'\nmoderate = true\n#").replace('"models', "'models")
    with pytest.raises(ConfigError, match="1 problem") as error:
        parse_config(text.encode(), "f")
    assert error.value.problems[0].path == "models.guard.moderate"


def test_moderation_is_live() -> None:
    """Another guard changes nothing that runs; `moderate` is an update."""
    assert plan(parse(LLAMA).models, parse("").models) == ()
    (step,) = plan(parse(LLAMA + "[defaults]\nmoderate = true\n").models, parse("").models)
    assert (step.kind, step.model, step.reason) == (Kind.UPDATE, "chat", "moderate false -> true")
