"""Rates of the past: bounded, aligned, and only of who had any."""

from vllm_proxy.domain.series import POINTS, Series


def test_a_name_that_comes_later_has_zeros_in_front() -> None:
    """All that is told is of one length, and of one time."""
    series = Series(2)
    series.add({"chat": (1.0, 10.0)})
    series.add({"chat": (2.0, 0.0), "embed": (0.5, 0.0)})
    assert series.last(5) == {"chat": ([1.0, 2.0], [10.0, 0.0]), "embed": ([0.0, 0.5], [0.0, 0.0])}
    assert series.last(1) == {"chat": ([2.0], [0.0]), "embed": ([0.5], [0.0])}


def test_a_name_without_a_rate_in_that_time_is_not_told() -> None:
    """Nor is one kept that never had any."""
    series = Series(1)
    series.add({"chat": (1.0,), "idle": (0.0,)})
    series.add({})
    assert series.last(1) == {}
    assert series.last(2) == {"chat": ([1.0, 0.0],)}


def test_what_is_kept_is_bounded() -> None:
    """An hour of ten seconds each; who was at rest for so long is forgotten, and may come again."""
    series = Series(1)
    series.add({"gone": (1.0,)})
    for number in range(POINTS + 5):
        series.add({"chat": (float(number + 1),)})
    told = series.last(POINTS * 2)
    assert set(told) == {"chat"}
    assert told["chat"][0] == [float(number + 6) for number in range(POINTS)]
    series.add({"gone": (3.0,)})
    assert series.last(2)["gone"] == ([0.0, 3.0],)
