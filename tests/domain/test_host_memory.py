"""What sleepers have of the machine's memory, and who ends where that is too much."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.host_memory import Sleeper, estimate, fits, to_end


def test_those_end_that_have_slept_longest() -> None:
    """No more of them than have to; who is awake counts, and stays."""
    sleepers = {"a": Sleeper(40, 3.0), "b": Sleeper(30, 1.0), "c": Sleeper(20, 2.0), "d": Sleeper(10)}
    assert to_end(sleepers, 100) == []
    assert to_end(sleepers, 99) == ["b"]
    assert to_end(sleepers, 60) == ["b", "c"]
    assert to_end(sleepers, 0) == ["b", "c", "a"]


def test_what_one_takes_that_has_not_slept_is_a_third_more_than_it_has() -> None:
    """Of all of its devices."""
    assert estimate({"0": 100, "1": 100}) == 260
    assert (fits(260, 260), fits(261, 260)) == (True, False)


def test_of_one_that_has_named_its_weights_only_they_count() -> None:
    """Of each of its devices, and never more than it has there: nothing else is moved at level 1."""
    assert estimate({"0": 100, "1": 100}, weights=10) == 26
    assert estimate({"0": 100, "1": 5}, weights=10) == 19


SLEEPERS = st.dictionaries(
    st.text("abc", min_size=1, max_size=2), st.builds(Sleeper, st.integers(0, 100), st.none() | st.floats(0, 100))
)


@given(SLEEPERS, st.integers(0, 300))
def test_the_rest_is_within_the_budget_or_awake_and_nobody_ends_for_nothing(
    sleepers: dict[str, Sleeper], budget: int
) -> None:
    """Whoever ends has something, and was needed."""
    ends = to_end(sleepers, budget)
    left = {name: one for name, one in sleepers.items() if name not in ends}
    assert sum(one.bytes for one in left.values()) <= budget or not any(
        one.asleep_since is not None and one.bytes for one in left.values()
    )
    if ends:
        assert sum(one.bytes for one in left.values()) + sleepers[ends[-1]].bytes > budget
