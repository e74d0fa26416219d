"""TOML values: how they are written, and which mean the same."""

import tomllib
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.toml import dotted, rendered, same

VALUES = ["1", "1.0", "true", "'1'", "[1]", "[1.0]", "{ a = 1 }", "{ a = 1.0 }", "{ a = true }", "0.0", "-0.0", "nan",
          "2026-01-01T12:00:00Z", "2026-01-01T14:00:00+02:00", "2026-01-01", "[]", "{}", "''"]  # fmt: skip
texts = st.text(st.characters(codec="utf-8"))
values = st.recursive(
    texts | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | st.dates() | st.times(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("path", "written"),
    [
        (("models", "a-b_1"), "models.a-b_1"),
        (("a", "b.c", ""), 'a."b.c".""'),
        (('"', "\n"), r'''"\""."\n"'''),
        (("ü",), '"ü"'),
    ],
)
def test_a_path_is_written_as_toml_does(path: tuple[str, ...], written: str) -> None:
    """Parts are quoted where TOML needs it, and stay on one line."""
    assert dotted(path) == written


@given(values)
def test_a_value_is_written_as_what_it_is(value: object) -> None:
    """In one line, and tomllib reads the same."""
    written = rendered(value)
    assert "\n" not in written
    assert same(tomllib.loads(f"x = {written}")["x"], value)


@pytest.mark.parametrize("one", VALUES)
def test_only_what_is_one_value_for_vllm_is_the_same(one: str) -> None:
    """Python takes 1, 1.0 and true for equal, and two moments of one time; read twice, each is the same, `nan` too."""

    def read(text: str) -> Any:  # noqa: ANN401 - a TOML value
        return tomllib.loads(f"x = {text}")["x"]

    assert [other for other in VALUES if same(read(one), read(other))] == [one]


def test_values_of_the_configuration_can_be_compared_too() -> None:
    """Its lists are tuples, and what is not given is None."""
    assert same((0, "GPU-1"), (0, "GPU-1"))
    assert not same((1,), (True,))
    assert not same(None, 0)
    assert not same(datetime(2026, 1, 1), None)  # noqa: DTZ001 - as TOML has it
