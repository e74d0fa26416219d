"""Limits as values: which count for a model, and what a key that has none costs."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.limits import Limits, Rate

ONE, TWO, THREE = Rate(1), Rate(2), Rate(3)


def test_the_id_itself_counts_else_the_longest_glob() -> None:
    """Wherever they stand; of two that are as long the first."""
    limits = Limits(models=(("*", ONE), ("org/*", TWO), ("org/a", THREE)))
    assert [limits.of_model(name) for name in ("org/a", "org/ab", "chat")] == [THREE, TWO, ONE]
    assert Limits(models=(("c*", ONE), ("*t", TWO))).of_model("chat") == ONE
    assert Limits(models=(("[a]", ONE),)).of_model("[a]") == ONE
    assert Limits(models=(("Chat", ONE),)).of_model("chat") is None


@given(st.lists(st.tuples(st.text("ab*?", min_size=1, max_size=4), st.builds(Rate, st.integers(0, 3))), max_size=4))
def test_order_matters_only_between_globs_of_one_length(models: list[tuple[str, Rate]]) -> None:
    """Read backwards, an id has an entry of the same length, or none."""
    unique = tuple(dict(models).items())
    for name in ("a", "ab", "ba", "*"):
        found, other = (Limits(models=each).glob_of(name) for each in (unique, unique[::-1]))
        assert (found and len(found)) == (other and len(other))
        assert (found == name) == (name in dict(unique))


def test_a_key_without_limits_refuses_nothing_and_asks_for_no_order() -> None:
    """Each of them alone is one that can refuse; priority and weight only order."""
    assert not Limits().is_limited
    assert not Limits().wants_fairness
    assert not Limits(models=(("*", Rate()),)).is_limited
    assert Limits(models=(("*", Rate(0, 5)),)).is_limited
    for limits in (Limits(ONE), Limits(tokens_per_day=1), Limits(tokens_per_month=1), Limits(max_in_flight=1),
                   Limits(max_output_tokens=1)):  # fmt: skip
        assert limits.is_limited
        assert limits.wants_fairness
    for limits in (Limits(priority=-1), Limits(weight=2.0)):
        assert not limits.is_limited
        assert limits.wants_fairness
