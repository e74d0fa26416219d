"""OpenMetrics: held against prometheus_client's parsers, the strict one and that of Prometheus' own text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as strict
from prometheus_client.parser import text_string_to_metric_families as plain

from vllm_proxy.domain.exposition import Exposition, Family
from vllm_proxy.domain.histogram import Histogram
from vllm_proxy.domain.openmetrics import Exemplar, OpenMetrics, is_preferred, with_exemplars

ENDS = Family("ends_total", "counter", 'What "ended", in C:\\new.', ("how",))
TIMES = Family("times_seconds", "histogram", "Times.", ("one",))
BOUNDS = (0.00005, 0.5, 1.0, 10.0)
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


def families(text: bytes) -> list[Metric]:
    """Those of a text in this format, which raises where that is not valid."""
    return list(strict(text.decode()))  # type: ignore[no-untyped-call]


def written(lines: str) -> bytes:
    """A text with these lines of a histogram."""
    text = OpenMetrics([ENDS])
    text.add(TIMES, lines)
    return text.text()


def test_a_counter_is_explained_without_the_end_of_its_name() -> None:
    """Its samples keep it; quotes and backslashes of what it means are as this format wants them."""
    text = OpenMetrics([ENDS])
    text.add(ENDS, ENDS.line(3, "so"))
    lines = text.text().decode().splitlines()
    assert lines[1:] == ["# TYPE ends counter", 'ends_total{how="so"} 3', "# EOF"]
    (family,) = families(text.text())
    assert (family.name, family.documentation, family.samples[0].value) == ("ends", ENDS.meaning, 3)


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 2**128 - 1), st.floats(0, 2**32)), max_size=20))
def test_an_exemplar_is_found_at_its_bucket_and_the_series_are_those_of_the_plain_text(
    requests: list[tuple[float, int, float]],
) -> None:
    """The last one of each bucket, with its time to the millisecond."""
    histogram, kept = Histogram(BOUNDS), {}
    for seconds, trace, at in requests:
        histogram.add(seconds)
        bucket = next((index for index, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))
        kept[bucket] = Exemplar(f"{trace:032x}", seconds, at)
    lines, classic = TIMES.lines(histogram, 'a # {b="c"}\n%s'), Exposition([ENDS])
    classic.add(TIMES, lines)
    _, family = families(written(with_exemplars(lines, kept)))
    _, known = plain(classic.text().decode())
    assert [one[:3] for one in family.samples] == [one[:3] for one in known.samples]
    found = {index: one.exemplar for index, one in enumerate(family.samples) if one.exemplar}
    assert found.keys() == kept.keys()
    for index, one in found.items():
        assert one.labels == {"trace_id": kept[index].trace_id}
        assert one.value == kept[index].seconds <= float(family.samples[index].labels["le"])
        assert one.timestamp is not None
        assert float(one.timestamp) == pytest.approx(kept[index].at, abs=0.000_6)


def test_without_exemplars_a_histogram_is_as_in_the_plain_text() -> None:
    """To the byte."""
    lines = TIMES.lines(Histogram(BOUNDS), "x")
    assert with_exemplars(lines, {}) == lines


@pytest.mark.parametrize(
    ("accept", "preferred"),
    [
        (PROMETHEUS, True),
        (PROMETHEUS_2, True),
        ('Application/OpenMetrics-Text; Version="1.0.0"; charset=utf-8 ; Q=0.5 , text/plain;q=0.5', True),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;q=0.5, text/plain;q=0.1, */*;q=1", True),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.3", False),
        ("application/openmetrics-text;q=0.2,text/*;q=0.3", False),
        ("application/openmetrics-text;q=0.2,*/*", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.000,text/plain;q=0", False),
        ("application/openmetrics-text;version=2.0.0,text/plain;q=0.5", False),
        ("application/openmetrics-text;version=2.0.0,application/openmetrics-text;version=1.0.0;q=0.6,*/*;q=0.1", True),
        ("application/openmetrics-text;q=nan", False),
        ("application/openmetrics-text;q=-1", False),
        ("application/openmetrics-text;q=7,text/plain", False),
        ("*/*", False),
        ("text/plain", False),
        ("", False),
        (";;,=,q=1", False),
    ],
)  # fmt: skip
def test_it_is_what_who_asks_for_it_by_name_gets(accept: str, *, preferred: bool) -> None:
    """Unless the plain text is wanted more, or another version."""
    assert is_preferred(accept) is preferred
