"""What an engine answers to one small question, and when two answers are the same."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.canary import COMPLETIONS, EMBEDDINGS, Canary, parse_canary, question, read_answer

NUMBERS = st.floats(-1e3, 1e3).map(lambda number: float(f"{number:.5g}"))
VECTORS = st.lists(NUMBERS, min_size=1, max_size=64).filter(lambda vector: math.hypot(*vector) > 1e-8).map(tuple)
CANARIES = st.builds(Canary, st.just(COMPLETIONS), st.text(max_size=200)) | st.builds(
    Canary, st.just(EMBEDDINGS), st.just(""), VECTORS
)


@given(CANARIES)
def test_what_is_on_record_is_what_was_answered(canary: Canary) -> None:
    """In one line of text; it is like itself."""
    assert "\n" not in str(canary)
    assert parse_canary(str(canary)) == canary
    assert parse_canary(str(canary)).is_like(canary)


@given(
    st.text() | st.sampled_from(["null", "5", "[]", "{}", "[" * 100_000, '{"route": "/x", "text": "", "vector": []}'])
)
def test_what_is_none_is_refused(text: str) -> None:
    """Whatever stands there, and with no other exception."""
    with pytest.raises(ValueError, match=r"no answer|something else|Expecting|Extra data|Invalid|Unterminated"):
        parse_canary(text)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Canary(COMPLETIONS, " G"), Canary(COMPLETIONS, "!"), False),
        (Canary(COMPLETIONS, " G"), Canary(COMPLETIONS, "G"), False),
        (Canary(COMPLETIONS, ""), Canary(COMPLETIONS, ""), True),
        (Canary(EMBEDDINGS, vector=(1.0, 0.0)), Canary(EMBEDDINGS, vector=(0.999, 0.02)), True),
        (Canary(EMBEDDINGS, vector=(1.0, 0.0)), Canary(EMBEDDINGS, vector=(1.0, 0.2)), False),
        (Canary(EMBEDDINGS, vector=(1.0, 0.0)), Canary(EMBEDDINGS, vector=(-1.0, 0.0)), False),
        (Canary(EMBEDDINGS, vector=(1.0, 0.0)), Canary(EMBEDDINGS, vector=(1.0, 0.0, 0.0)), False),
        (Canary(EMBEDDINGS, vector=(1.0,)), Canary(COMPLETIONS, ""), False),
    ],
)
def test_two_answers_are_of_the_same_weights_or_not(one: Canary, other: Canary, *, same: bool) -> None:
    """Of a token to the letter, of an embedding but for rounding."""
    assert one.is_like(other) is other.is_like(one) is same


def test_an_embedding_is_kept_as_far_as_it_is_needed() -> None:
    """Its beginning, so that a record stays small."""
    found = read_answer(EMBEDDINGS, {"data": [{"embedding": [0.1234567] * 4096}]})
    assert found.vector == (0.12346,) * 64
    assert len(str(found)) < 1000


@pytest.mark.parametrize("route", [COMPLETIONS, EMBEDDINGS])
def test_the_question_is_short_and_has_one_answer(route: str) -> None:
    """Too short for a block of the prefix cache (16 tokens), with no chance in it."""
    asked = question(route, "own")
    assert asked["model"] == "own"
    assert len(str(asked.get("prompt") or asked["input"])) < 16
    assert route == EMBEDDINGS or (asked["max_tokens"], asked["temperature"]) == (1, 0)
