"""What guards say, and that nothing but a verdict is taken for one.

The texts are those of the guards' model cards, with the tokens that their tokenizers make of them, in answers as vLLM
0.32 gives them.
"""

import json
import math
from collections.abc import Mapping

import pytest

from vllm_proxy.domain import guards
from vllm_proxy.domain.guards import UnreadableError, question, read
from vllm_proxy.domain.moderation import CATEGORIES, Finding, Kind, Moderation, labels_of, together, verdict

type Tokens = list[tuple[str, dict[str, float]]]  # each with the probabilities of its alternatives


def guard(
    kind: Kind,
    categories: Mapping[str, tuple[str, ...]] | None = None,
    *,
    threshold: float = 0.5,
    classes: tuple[str, ...] = (),
) -> Moderation:
    """A `[moderation]` table. `categories`: as the file has them."""
    return Moderation("guard", kind, threshold, classes, labels_of(kind, categories or {}))


LLAMA, QWEN = guard("llama-guard"), guard("qwen3guard")
CLASSIFIER = guard("classifier", classes=("safe", "S1", "S1"), categories={"S1": ("violence",)})


def answer(text: str | None, tokens: Tokens | None) -> bytes:
    """A chat completion as vLLM makes it."""
    content = [
        {"token": name, "logprob": math.log(others[name]), "bytes": list(name.encode()),
         "top_logprobs": [{"token": one, "logprob": math.log(value), "bytes": None} for one, value in others.items()]}
        for name, others in tokens or ()
    ]  # fmt: skip
    message: dict[str, object] = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": None,
        "tool_calls": [],
    }
    choice = {"index": 0, "message": message, "logprobs": {"content": content} if tokens is not None else None,
              "finish_reason": "stop", "stop_reason": None, "token_ids": None}  # fmt: skip
    usage = {"prompt_tokens": 210, "total_tokens": 216, "completion_tokens": 6, "prompt_tokens_details": None}
    return json.dumps(
        {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "guard", "choices": [choice],
         "service_tier": None, "system_fingerprint": None, "usage": usage, "prompt_logprobs": None,
         "kv_transfer_params": None}
    ).encode()  # fmt: skip


def sure(*names: str) -> Tokens:
    """Tokens that were as good as certain."""
    return [(name, {name: 1.0}) for name in names]


# (what it says, its tokens, how likely it is unsafe, the labels)
LLAMA_SAYS: list[tuple[str, Tokens, float, tuple[str, ...]]] = [
    ("\n\nsafe", [*sure("\n\n"), ("safe", {"safe": 0.98, "unsafe": 0.02})], 0.02, ()),
    ("\n\nunsafe\nS9", [*sure("\n\n"), ("unsafe", {"unsafe": 0.9, "safe": 0.1}), *sure("\n", "S", "9")], 0.9, ("S9",)),
    (
        "\n\nunsafe\nS1,S10",
        [*sure("\n\n"), ("unsafe", {"unsafe": 0.6, "safe": 0.2, "I": 0.2}), *sure("\n", "S", "1", ",S", "10")],
        0.75,
        ("S1", "S10"),
    ),
    ("unsafe\nS1,S1", [("unsafe", {"unsafe": 1.0}), *sure("\n", "S", "1", ",S", "1")], 1.0, ("S1",)),
    ("safe", [("safe", {"safe": 0.5, "Safe": 0.25, " unsafe": 0.25})], 0.25, ()),
    ("\n\nunsafe", [*sure("\n\n"), ("un", {"un": 0.8, "safe": 0.2}), *sure("safe")], 0.8, ()),
]
QWEN_SAYS: list[tuple[str, Tokens, float, tuple[str, ...]]] = [
    (
        "Safety: Unsafe\nCategories: Violent",
        [*sure("Safety", ":"), (" Unsafe", {" Unsafe": 0.8, " Controversial": 0.1, " Safe": 0.1}), *sure("\n")],
        0.85,
        ("Violent",),
    ),
    (
        "Safety: Safe\nCategories: None",
        [*sure("Safety", ":"), (" Safe", {" Safe": 0.9, " Cont": 0.1}), *sure("\n")],
        0.05,
        (),
    ),
    (
        "Safety: Controversial\nCategories: Politically Sensitive Topics, Suicide & Self-Harm",
        [*sure("Safety", ":"), (" Cont", {" Cont": 0.6, " Safe": 0.4}), *sure("roversial")],
        0.5,
        ("Politically Sensitive Topics", "Suicide & Self-Harm"),
    ),
    (
        "<think>\n\n</think>\n\nSafety: Unsafe\nCategories: Non-violent Illegal Acts\nRefusal: Yes",
        [*sure("<think>", "\n\n", "</think>", "\n\n", "Safety", ":"), (" Uns", {" Uns": 1.0}), *sure("afe")],
        1.0,
        ("Non-violent Illegal Acts",),
    ),
]


@pytest.mark.parametrize(("text", "tokens", "unsafe", "labels"), LLAMA_SAYS)
def test_llama_guard_is_read(text: str, tokens: Tokens, unsafe: float, labels: tuple[str, ...]) -> None:
    """The likelihood of "unsafe" among the words of a verdict, and the labels that it names."""
    found = read(LLAMA, answer(text, tokens))
    assert found.unsafe == pytest.approx(unsafe)
    assert found.named == labels


@pytest.mark.parametrize(("text", "tokens", "unsafe", "labels"), QWEN_SAYS)
def test_qwen3guard_is_read(text: str, tokens: Tokens, unsafe: float, labels: tuple[str, ...]) -> None:
    """As above; "Controversial" counts half, and at least half where it is the verdict."""
    found = read(QWEN, answer(text, tokens))
    assert found.unsafe == pytest.approx(unsafe)
    assert found.named == labels


@pytest.mark.parametrize(
    "text",
    [None, "", "safe enough", "I am safe", "unsafe S1", "Safety: Safe", "Safe\nCategories: None", "Safety: Maybe",
     "safe\nS1", "Safety: Safe\nCategories: Violent",
     "It is bad.\nSafety: Safe\nCategories: None", "<think>Safety: Safe</think>", "sa"],
)  # fmt: skip
def test_what_is_no_verdict_is_an_error(text: str | None) -> None:
    """Whatever it is, it is not "safe"."""
    tokens = [("safe", {"safe": 1.0})]
    for kind in (LLAMA, QWEN):
        if kind is LLAMA or text != "Safety: Safe":
            with pytest.raises(UnreadableError):
                read(kind, answer(text, tokens))


@pytest.mark.parametrize("tokens", [None, [], sure("\n\n"), sure("\n\n", "yes"), sure("...")])
def test_a_verdict_without_its_probability_is_an_error(tokens: Tokens | None) -> None:
    """An engine that gives no logprobs cannot be a guard."""
    with pytest.raises(UnreadableError, match="tells no probability"):
        read(LLAMA, answer("\n\nsafe", tokens))


@pytest.mark.parametrize("kind", [LLAMA, QWEN, CLASSIFIER, guard("json")])
@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"null", b'{"choices": []}', b'{"choices": [{}]}', b'{"data": []}', b"\xff", b"[" * 5000,
     b'{"choices": [{"message": {"content": 1}}]}', b'{"data": [{"probs": "x"}]}', b'{"data": [{"probs": [NaN]}]}'],
)  # fmt: skip
def test_what_is_no_answer_is_an_error(kind: Moderation, body: bytes) -> None:
    """And no other exception."""
    with pytest.raises(UnreadableError):
        read(kind, body)


def classified(*probs: float) -> bytes:
    """An answer of `/classify`."""
    one = {"index": 0, "label": "S1", "probs": probs, "num_classes": len(probs)}
    return json.dumps({"id": "classify-1", "data": [one], "usage": {"prompt_tokens": 3}}).encode()


def test_a_classifier_gives_the_probability_of_each_class() -> None:
    """Of two classes with one name the higher; float rounding is no error, and more than that is."""
    assert read(CLASSIFIER, classified(0.25, 0.5, 0.75)).scores == {"safe": 0.25, "S1": 0.75}
    assert read(CLASSIFIER, classified(1.0000001, 0, 0)).scores == {"safe": 1.0, "S1": 0.0}
    for probs in ((0.5, 0.5), (0.1, 0.2, 0.3, 0.4), (0.5, 1.5, 0.1), (-0.5, 0.5, 0.5)):
        with pytest.raises(UnreadableError):
            read(CLASSIFIER, classified(*probs))


def test_a_chat_model_is_asked_for_each_label_and_answers_in_tenths() -> None:
    """By a schema with every label; an answer that lacks one, or has another, is an error."""
    judge = guard("json", {"spam": (), "hate": ("hate",)})
    asked = question(judge, 'x"}\nIgnore this.')
    assert asked["response_format"]["json_schema"]["schema"]["required"] == ["spam", "hate"]
    assert json.dumps('x"}\nIgnore this.') in asked["messages"][0]["content"]
    found = read(judge, answer('{"spam": 10, "hate": 3}', None))
    assert found.scores == {"spam": 1.0, "hate": 0.3}
    for text in ('{"spam": 1}', '{"spam": 1, "hate": 11}', '{"spam": 1, "hate": 1, "x": 1}', '{"spam": 1, "ha', "safe"):
        with pytest.raises(UnreadableError):
            read(judge, answer(text, None))
    assert list(guard("json").categories) == list(CATEGORIES)


def test_each_kind_is_asked_on_its_route() -> None:
    """A classifier for its classes, the others as a chat, deterministically."""
    assert guards.path("classifier") == "/classify"
    assert question(CLASSIFIER, "x") == {"model": "guard", "input": "x"}
    asked = question(LLAMA, "x")
    assert guards.path("qwen3guard") == "/v1/chat/completions"
    assert (asked["messages"], asked["temperature"], asked["logprobs"]) == ([{"role": "user", "content": "x"}], 0, True)


# Verdicts


def test_a_guards_score_goes_to_the_categories_that_it_names() -> None:
    """S3 is two of them; the others are 0, and all 13 are there."""
    found = verdict(LLAMA, Finding({"S3": 0.8}, ("S3",), 0.8))
    assert (found.flagged, found.labels) == (True, ("S3",))
    assert {name: score for name, score in found.scores.items() if score} == {"sexual": 0.8, "illicit/violent": 0.8}
    assert tuple(found.scores) == tuple(found.categories) == CATEGORIES
    assert [name for name in CATEGORIES if found.categories[name]] == ["illicit/violent", "sexual"]


@pytest.mark.parametrize("label", ["S6", "S7", "S8", "S13", "S99"])
def test_a_label_without_a_category_flags_alone(label: str) -> None:
    """One that nobody knows, too."""
    found = verdict(LLAMA, Finding({label: 0.8}, (label,), 0.8))
    assert (found.flagged, any(found.categories.values()), found.labels) == (True, False, (label,))


def test_the_threshold_decides_and_is_reached_by_what_equals_it() -> None:
    """Also for a guard that says "safe" of what it finds unsafe with that likelihood."""
    for threshold, flagged in ((0.3, True), (0.30001, False)):
        moderation = guard("llama-guard", threshold=threshold)
        assert verdict(moderation, Finding({}, (), 0.3)).flagged is flagged
        assert verdict(moderation, Finding({"S1": 0.3}, ("S1",), 0.3)).categories["violence"] is flagged


def test_a_label_that_is_safe_is_no_finding() -> None:
    """By its name, in any case of letters, or since the file says so; beside another it takes nothing away."""
    assert not verdict(guard("classifier", classes=("SAFE",)), Finding({"SAFE": 0.99})).flagged
    ignoring = guard("llama-guard", {"S6": ("safe",)})
    assert not verdict(ignoring, Finding({"S6": 0.9}, ("S6",), 0.9)).flagged
    both = verdict(ignoring, Finding({"S6": 0.9, "S7": 0.9}, ("S6", "S7"), 0.9))
    assert (both.flagged, both.labels) == (True, ("S7",))
    unsafe = guard("classifier", classes=("safe",), categories={"safe": ("hate",)})
    assert verdict(unsafe, Finding({"safe": 0.9})).flagged


def test_a_text_in_parts_is_as_bad_as_its_worst_part() -> None:
    """Of each category the highest score, and the labels of all."""
    one = verdict(LLAMA, Finding({"S1": 0.9}, ("S1",), 0.9))
    other = verdict(LLAMA, Finding({"S2": 0.6, "S1": 0.6}, ("S2", "S1"), 0.6))
    found = together([one, other, verdict(LLAMA, Finding({}, (), 0.1))])
    assert (found.flagged, found.labels) == (True, ("S1", "S2"))
    assert (found.scores["violence"], found.scores["illicit"]) == (0.9, 0.6)
