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
    """Of each of its devices, with half a GiB around them, and never more than it has there: the rest is not moved."""
    gib = 2**30
    assert estimate({"0": 100 * gib, "1": 100 * gib}, weights=10 * gib) == int(2 * 10.5 * 1.3 * gib)
    assert estimate({"0": 100 * gib, "1": 5 * gib}, weights=10 * gib) == int(15.5 * 1.3 * gib)


def test_the_small_model_of_the_measured_gpu_is_counted_for_no_less_than_it_moved() -> None:
    """vLLM 0.32 on an H200: 0.26 GiB of weights by its own words, 0.50 GiB backed up, 76.5 GiB freed."""
    assert 0.50 * 2**30 <= estimate({"0": int(77.3 * 2**30)}, weights=int(0.26 * 2**30)) <= 2**30


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
