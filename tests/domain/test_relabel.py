"""Expositions of several engines as one, held against Prometheus' own parser."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.fake_metrics import RECORDED
from vllm_proxy.domain import relabel
from vllm_proxy.domain.relabel import Merged

VLLM = RECORDED.read_bytes()
GAUGE = b"# HELP vllm:a A.\n# TYPE vllm:a gauge\n"

type Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def series(text: bytes) -> Series:
    """Value by name and labels; no family is there twice, and none of its samples elsewhere."""
    families = list(text_string_to_metric_families(text.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    found = [one for family in families for one in family.samples]
    by_name = {(one.name, frozenset(one.labels.items())): one.value for one in found}
    assert len(by_name) == len(found)
    return by_name


def merged(*texts: bytes, prefix: str = "vllm:") -> bytes:
    """Those of the replicas of one model."""
    result = Merged(prefix, "model", "replica")
    for number, text in enumerate(texts):
        result.add(text, "chat", str(number))
    return result.text()


def scraped(*texts: bytes, prefix: str = "vllm:") -> bytes:
    """The last of several scrapes of one engine, each with what is known of the one before."""
    before = None
    for text in texts:
        result = Merged(prefix, "model", "replica", before=before)
        result.add(text, "chat", "0")
        found, before = result.text(), result
        result.forget()
    return found


def of_replica(found: Series, number: int) -> Series:
    """Its series, without the labels that it was given."""
    own = frozenset({("model", "chat"), ("replica", str(number))})
    return {(name, labels - own): value for (name, labels), value in found.items() if own <= labels}


def test_an_engine_with_thousands_of_families_is_left_out_and_the_others_are_not() -> None:
    """Each takes its time on the event loop."""
    flood = b"".join(b"# HELP vllm:a%d x\n# TYPE vllm:a%d gauge\nvllm:a%d 1\n" % (n, n, n) for n in range(5001))
    assert {dict(labels)["replica"] for _, labels in series(merged(flood, VLLM))} == {"1"}
    fits = flood.rpartition(b"# HELP")[0]
    assert len(series(merged(fits))) == 5000


def test_each_engine_keeps_its_series_under_its_own_labels() -> None:
    """Nothing of vLLM's is lost, changed or mixed up; when counters were made, and what is not vLLM's, is left out."""
    before = {key: value for key, value in series(VLLM).items() if key[0].startswith("vllm:")}
    before = {key: value for key, value in before.items() if not key[0].endswith("_created")}
    found = series(merged(VLLM, VLLM.replace(b"} 1.0\n", b"} 7.0\n")))
    assert len(before) > 300
    assert of_replica(found, 0) == before
    assert of_replica(found, 1) == {key: 7.0 if value == 1.0 else value for key, value in before.items()}
    assert len(found) == 2 * len(before)


def test_with_no_prefix_all_of_it_is_there() -> None:
    """Series that had no label get the two, as those of the process."""
    assert of_replica(series(merged(VLLM, VLLM, prefix="")), 1) == series(VLLM)


def test_each_family_is_explained_once() -> None:
    """A second explanation would make Prometheus refuse all of it."""
    text = merged(VLLM, VLLM)
    assert text.count(b"# HELP vllm:num_requests_running ") == text.count(b"# TYPE vllm:num_requests_running ") == 1


def test_labels_of_an_engine_with_our_names_are_renamed_as_prometheus_does() -> None:
    """A label that is there twice would make it refuse all of it."""
    found = series(merged(GAUGE + b'vllm:a{model="x",submodel="y",replica="7"} 1\n'))
    (labels,) = [dict(labels) for _, labels in found]
    assert labels == {
        "model": "chat", "replica": "0", "exported_model": "x", "exported_replica": "7", "submodel": "y",
    }  # fmt: skip


UNUSUAL = [
    b'vllm:a{x="{}"} 1', b'vllm:a{x=",y=\\"z\\",",y="{x="} 1', b'vllm:a{x="a\\"} 2,b="} 1',
    b'vllm:a{x="model=\\"y\\""} +Inf', b"vllm:a 1", b"vllm:a{} NaN",
    b'vllm:a{x="y"} 1 1700000000000', b'vllm:a{x="y",} 1', b'vllm:a{x="y"} 1.5e+299', b'vllm:a{x="y"} -2e-308',
    b'vllm:a{x="y"} 18446744073709551616.0', b"vllm:a -Inf",
]  # fmt: skip
NO_SAMPLES = [
    b"vllm:a{x} 1", b'vllm:a{x="y} 1', b"vllm:a{x=y} 1", b'vllm:a{x="y"}', b'vllm:a{x="y"} one two', b"<html>",
    b'vllm:a{x="y"} 1 # {} 2', b'vllm:a{x="y"} 1\r', b"\xff", b'vllm:a{x="y"model="w"} 1', b'vllm:a{__name__="b"} 1',
    b'vllm:a{x="y"} 1 99999999999999999999999', b'vllm:a{x="y"} 1e999', b'vllm:a{x="y"} 10e299', b"vllm:a 1e999",
    b'vllm:a{x="y",z="",x="y"} 1', b'vllm:a{x="y"} +NaN', b'vllm:a{x="y"} -NaN',
    b'vllm:a{model="y",exported_model="z"} 1',
]  # fmt: skip


@pytest.mark.parametrize("line", UNUSUAL)
def test_what_is_unusual_and_valid_is_kept(line: bytes) -> None:
    """Braces and quotes in labels, no labels, times, a last comma."""
    (((_, labels), _),) = series(merged(GAUGE + line + b"\n")).items()
    assert {("model", "chat"), ("replica", "0")} <= labels


@pytest.mark.parametrize("line", NO_SAMPLES)
def test_what_is_no_sample_harms_no_other_engine(line: bytes) -> None:
    """Its family is left out, of that engine alone."""
    found = series(merged(GAUGE + b'vllm:a{x="y"} 2\n' + line + b"\n", GAUGE + b'vllm:a{x="y"} 3\n'))
    assert [*found.values()] == [3.0]


def test_a_family_of_the_daemon_s_own_names_is_left_out() -> None:
    """The daemon explains those itself, and twice is an error."""
    assert merged(GAUGE.replace(b"vllm:a", b"vllm_proxy_a") + b"vllm_proxy_a 1\n", prefix="") == b""


def test_engines_that_differ_about_a_type_are_not_mixed() -> None:
    """As two versions of vLLM may; the first one is shown."""
    other = GAUGE.replace(b"gauge", b"counter") + b'vllm:a{x="y"} 3\n'
    assert [*series(merged(GAUGE + b'vllm:a{x="y"} 2\n', other)).values()] == [2.0]


@given(st.binary(max_size=200), st.integers(0, len(VLLM)))
def test_whatever_an_engine_answers_the_others_can_be_read(garbage: bytes, at: int) -> None:
    """Garbage, and an answer that breaks off or has garbage in it: what is no text is left out as a whole."""
    for text in (garbage, VLLM[:at], VLLM[:at] + garbage + VLLM[at:]):
        result = merged(text, GAUGE + b'vllm:a{x="y"} 3\n')
        assert b'vllm:a{model="chat",replica="1",x="y"} 3\n' in result
        list(text_string_to_metric_families(result.decode()))


@pytest.mark.parametrize(
    "line", [*UNUSUAL, *NO_SAMPLES, b"", b'vllm:a{x="y"} ', b'vllm:a{x="z"} 1', b"# HELP vllm:b B.", b"5"]
)
def test_what_is_known_of_a_scrape_changes_nothing_in_the_next(line: bytes) -> None:
    """Whatever stands where a sample stood before, and the other way round: it is as if no scrape had been before."""
    plain = GAUGE + b'vllm:a{x="y"} 2\n'
    for prefix in ("vllm:", ""):
        for second in (GAUGE + line + b"\n", plain + line + b"\n", line, GAUGE.replace(b"A.", line) + plain[-16:]):
            for texts in ((plain, second), (second, plain), (second, second), (plain, second, plain)):
                assert scraped(*texts, prefix=prefix) == merged(texts[-1], prefix=prefix)


@given(st.data())
def test_scrapes_of_a_vllm_that_works_are_those_of_one_that_is_not_known(data: st.DataObject) -> None:
    """Other numbers, other series, a family that is gone, and bytes that no vLLM writes."""
    lines, texts = VLLM.splitlines(keepends=True), [VLLM]
    for _ in range(3):
        at = data.draw(st.integers(0, len(lines) - 1))
        change = data.draw(st.sampled_from(["number", "twice", "gone", "mixed", "garbage"]))
        if change == "number":
            other = data.draw(st.floats(allow_nan=True))
            lines[at] = lines[at].rpartition(b" ")[0] + b" " + repr(other).encode() + b"\n"
        elif change == "garbage":
            lines[at] = data.draw(st.binary(max_size=9)) + lines[at][data.draw(st.integers(0, 9)) :]
        else:
            lines[at : at + 1] = {"twice": [lines[at]] * 2, "gone": [], "mixed": [lines[at], lines[0]]}[change]
        texts.append(b"".join(lines))
        assert scraped(*texts) == merged(texts[-1])


def test_nothing_is_remembered_of_an_engine_that_says_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held for the next scrape has a bound."""
    monkeypatch.setattr(relabel, "_MOST_REMEMBERED", 10)
    assert scraped(VLLM, VLLM) == merged(VLLM)
