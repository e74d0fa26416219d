"""What a report is asked for and what it looks like."""

import csv
import io
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.usage import DAY, HOUR, Bucket, Counts, Query, added, as_csv, month_start, query, rows

NOW = datetime(2026, 11, 24, 12, 30, tzinfo=UTC).timestamp()
NOON = int(NOW) // HOUR * HOUR
counts = st.builds(Counts, *[st.integers(0, 2**40)] * 7)
buckets = st.builds(
    Bucket,
    st.integers(NOON // HOUR - 60, NOON // HOUR + 2).map(lambda hour: hour * HOUR),
    st.sampled_from(["ci", "web"]),
    st.sampled_from(["chat", "org/x"]),
)


def test_without_a_time_it_is_of_the_last_24_hours_by_key_and_model() -> None:
    """In whole hours: the one that runs, and the one that began before."""
    assert query(NOW, None, None, None) == Query(NOON - DAY, NOON + HOUR, ("key", "model"))


def test_the_hour_that_begins_now_is_part_of_it() -> None:
    """On the full hour too."""
    assert query(float(NOON), None, None, None).last == NOON + HOUR


def test_times_are_widened_to_whole_hours() -> None:
    """Nothing is kept of less."""
    asked = query(NOW, NOW - 7200, NOW - 3600, "hour")
    assert (asked.first, asked.last) == (NOON - 7200, NOON)


@pytest.mark.parametrize("by", ["user", "key,key", "day,hour", "key;model"])
def test_a_wrong_by_is_refused(by: str) -> None:
    """With what may stand there."""
    with pytest.raises(ValueError, match="key, model, and day or hour"):
        query(NOW, None, None, by)


def test_a_time_that_ends_before_it_begins_is_refused() -> None:
    """It would be empty, and look as if nothing had been used."""
    with pytest.raises(ValueError, match="not before"):
        query(NOW, NOW, NOW - DAY, None)


@given(found=st.lists(st.tuples(buckets, counts)), by=st.sampled_from(["", "key", "model,day", "key,model,hour"]))
def test_a_report_sums_up_each_bucket_once(found: list[tuple[Bucket, Counts]], by: str) -> None:
    """All that lies in its time is in exactly one row."""
    asked = query(NOW, NOW - 2 * DAY, NOW, by)
    groups: dict[tuple[str | int, ...], Counts] = {}
    added(groups, found, asked)
    inside = [counts for bucket, counts in found if asked.first <= bucket.hour < asked.last]
    report = rows(asked, groups)
    assert sum(row["prompt_tokens"] for row in report) == sum(one.prompt for one in inside)
    assert sum(row["limited"] for row in report) == sum(one.limited for one in inside)
    names = [(row.get("hour"), row.get("day"), row["key"], row["model"]) for row in report]
    assert len(set(names)) == len(names)


def test_rows_say_what_they_are_of() -> None:
    """Key and model always, null where nobody asked; hour and day where asked. In the order of time."""
    asked = query(NOW, None, None, "model,day")
    groups: dict[tuple[str | int, ...], Counts] = {
        ("b", NOON // DAY * DAY): Counts(1),
        ("a", NOON // DAY * DAY): Counts(2),
    }
    groups["c", NOON // DAY * DAY - DAY] = Counts(3, 4, 5, 6, 7, 8, 9)
    first, *others = rows(asked, groups)
    assert first == {
        "key": None, "model": "c", "day": "2026-11-23", "requests": 3, "prompt_tokens": 4, "completion_tokens": 5,
        "cached_tokens": 6, "estimated_tokens": 7, "failed": 8, "limited": 9,
    }  # fmt: skip
    assert [row["model"] for row in others] == ["a", "b"]


@given(found=st.dictionaries(buckets, counts, max_size=9))
def test_csv_has_what_json_has(found: dict[Bucket, Counts]) -> None:
    """Line for line, under the same names."""
    asked = query(NOW, NOW - 90 * HOUR, NOW + DAY, "key,model,hour")
    groups: dict[tuple[str | int, ...], Counts] = {}
    added(groups, found.items(), asked)
    report = rows(asked, groups)
    read = list(csv.DictReader(io.StringIO(as_csv(asked.by, report))))
    assert read == [{name: str(value) for name, value in row.items()} for row in report]


def test_the_month_begins_at_midnight_utc() -> None:
    """Wherever the machine stands."""
    assert month_start(NOW) == datetime(2026, 11, 1, tzinfo=UTC).timestamp()


def test_cached_tokens_are_not_charged_twice_and_estimated_ones_are_charged() -> None:
    """Cached ones are part of the prompt."""
    assert Counts(requests=1, prompt=10, completion=5, cached=8, estimated=3).tokens == 18
