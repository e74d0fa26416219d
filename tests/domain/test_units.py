"""Durations, sizes and times."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.units import parse_duration, parse_size, parse_time, show, show_duration, show_size, show_time


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (0, 0.0),
        (90, 90.0),
        (1.5, 1.5),
        ("90s", 90.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1h2m3s4ms", 3723.004),
        ("250ms", 0.25),
        ("0.5h", 1800.0),
        ("0s", 0.0),
    ],
)
def test_a_duration_is_seconds_or_a_string_with_units(written: object, seconds: float) -> None:
    """Numbers are seconds; strings add up hours, minutes, seconds and milliseconds."""
    assert parse_duration(written) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "written",
    [
        "",
        "90",
        "s",
        "5 m",
        "30m1h",
        "1d",
        "-5s",
        "5M",
        "1e3s",
        "5m\n",
        -1,
        -0.5,
        True,
        None,
        [],
        {},
        float("nan"),
        float("inf"),
        10**400,
        "9" * 400 + "s",
    ],
)
def test_anything_else_is_no_duration(written: object) -> None:
    """What is negative, infinite, out of order or without a unit is refused with examples of what is right."""
    with pytest.raises(ValueError, match='expected a duration such as 90, "90s", "5m" or "1h30m", got'):
        parse_duration(written)


@given(hours=st.integers(0, 99), minutes=st.integers(0, 99), seconds=st.integers(0, 999), millis=st.integers(0, 999))
def test_a_duration_is_the_sum_of_its_parts(hours: int, minutes: int, seconds: int, millis: int) -> None:
    """Whatever is written part by part is read back as the same number of seconds."""
    expected = hours * 3600 + minutes * 60 + seconds + millis / 1000
    assert parse_duration(f"{hours}h{minutes}m{seconds}s{millis}ms") == pytest.approx(expected)


@given(st.floats(0, 1e9) | st.integers(0, 10**9))
def test_a_number_of_seconds_is_kept(seconds: float) -> None:
    """A plain number is itself."""
    assert parse_duration(seconds) == seconds


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (0, 0),
        (1024, 1024),
        ("1024", 1024),
        ("12B", 12),
        ("1kB", 1000),
        ("1KB", 1000),
        ("64MiB", 64 * 2**20),
        ("64 MiB", 64 * 2**20),
        ("1.5KiB", 1536),
        ("10GB", 10**10),
        ("2TiB", 2**41),
        ("9007199254740993B", 9007199254740993),
    ],
)
def test_a_size_is_bytes_or_a_string_with_a_unit(written: object, size: int) -> None:
    """Powers of 1000 and of 1024 are told apart, and no byte is lost to a floating point number."""
    assert parse_size(written) == size


@pytest.mark.parametrize(
    "written", ["", "MiB", "64mib", "64Mi", "-1", "-1B", "1e3", "9" * 400 + "TiB", -1, 1.0, True, None, [], {}]
)
def test_anything_else_is_no_size(written: object) -> None:
    """What is negative, a fraction of no unit or in an unknown unit is refused with examples of what is right."""
    with pytest.raises(ValueError, match='expected a size such as 1048576 or "64MiB", got'):
        parse_size(written)


@given(st.integers(0, 10**25), st.sampled_from([("KiB", 2**10), ("MB", 10**6), ("GiB", 2**30), ("B", 1)]))
def test_a_size_survives_being_written(count: int, unit: tuple[str, int]) -> None:
    """A whole count of a unit is exactly that many bytes, however many."""
    assert parse_size(f"{count}{unit[0]}") == count * unit[1]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(True, "true"), (False, "false"), (5, "5"), ("a", '"a"'), ('a"b', '"a\\"b"'), ("a\nb", '"a\\nb"')],
)
def test_a_shown_value_looks_as_in_the_file(value: object, shown: str) -> None:
    """Messages show values as TOML spells them."""
    assert show(value) == shown


@given(st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.text()))
def test_a_shown_value_fits_on_a_line(value: object) -> None:
    """A message stays one line of a length that people read, whatever the value holds."""
    shown = show(value)
    assert "\n" not in shown
    assert len(shown) <= 80


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0s"), (0.25, "250ms"), (1.5, "1.5s"), (59.0, "59s"), (60.0, "1m"), (900.0, "15m"), (3723.0, "1h2m3s")],
)
def test_a_duration_is_shown_as_people_write_it(seconds: float, shown: str) -> None:
    """In the units in which it is short."""
    assert show_duration(seconds) == shown


@given(st.integers(0, 10**9) | st.integers(0, 10**9).map(lambda millis: millis / 1000))
def test_a_duration_that_is_shown_can_be_written_so(seconds: float) -> None:
    """It means the same."""
    assert parse_duration(show_duration(seconds)) == seconds


@given(st.floats(0, allow_infinity=False), st.floats(0, allow_infinity=False))
def test_durations_that_differ_look_different(one: float, other: float) -> None:
    """Else a plan would say "1s -> 1s"."""
    assert (show_duration(one) == show_duration(other)) is (one == other)


@pytest.mark.parametrize(("size", "shown"), [(0, "0B"), (1000, "1000B"), (64 * 2**20, "64MiB"), (3 * 2**30, "3GiB")])
def test_a_size_is_shown_in_the_largest_unit_that_divides_it(size: int, shown: str) -> None:
    """Nothing is rounded."""
    assert show_size(size) == shown


@given(st.integers(0, 2**60))
def test_a_size_that_is_shown_can_be_written_so(size: int) -> None:
    """It means the same."""
    assert parse_size(show_size(size)) == size


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("2027-01-01T00:00:00Z", datetime(2027, 1, 1, tzinfo=UTC)),
        ("2027-01-01t00:00:00z", datetime(2027, 1, 1, tzinfo=UTC)),
        ("2027-01-01 00:00:00-00:00", datetime(2027, 1, 1, tzinfo=UTC)),
        ("2027-01-01T05:45:00.25+05:45", datetime(2027, 1, 1, 0, 0, 0, 250_000, tzinfo=UTC)),
    ],
)
def test_a_time_has_an_offset(written: str, moment: datetime) -> None:
    """As RFC 3339 writes it."""
    assert parse_time(written) == moment


@pytest.mark.parametrize(
    "text",
    ["", "2027-01-01", "2027-01-01T00:00:00", "2027-01-01T00:00Z", "20270101T000000Z", "2027-W01-1T00:00:00Z",
     "2027-02-30T00:00:00Z", "2027-01-01T24:00:00Z", "2027-01-01T00:00:00+99:00", "2027-01-01T00:00:00+05:45:30",
     "٢027-01-01T00:00:00Z", "planted"],
)  # fmt: skip
def test_anything_else_is_no_time(text: str) -> None:
    """The message says what was expected, and not what stood there."""
    with pytest.raises(ValueError, match="expected a time with its offset, such as") as error:
        parse_time(text)
    assert "planted" not in str(error.value)


@given(st.datetimes(timezones=st.just(timezone(timedelta(hours=-8)))).map(lambda moment: moment.replace(microsecond=0)))
def test_a_time_is_shown_as_what_it_is(moment: datetime) -> None:
    """In UTC; what lies behind the last year is its end."""
    last = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert parse_time(show_time(moment.timestamp())) == min(moment, last)
