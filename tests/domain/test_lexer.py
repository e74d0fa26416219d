"""TOML's syntax: values, entries and comments in texts that tomllib takes."""

import tomllib
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from tests.domain.test_locate import EXAMPLE, documents
from vllm_proxy.domain.file.lexer import comments, entries, pieces, value_span
from vllm_proxy.domain.toml import rendered, same


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("a = 1", "1"),
        ("  a.b = 'x # y' # z\n", "'x # y'"),
        ("a = 1979-05-27 07:32:00\t\r\n", "1979-05-27 07:32:00"),
        ("a=[ # one\n 1, # two\n ] # three\n", "[ # one\n 1, # two\n ]"),
        ("a = {b = [1], c = {}}# x", "{b = [1], c = {}}"),
        ('a = """\n# no comment\n"""\n', '"""\n# no comment\n"""'),
        ('"a=b" = ""', '""'),
    ],
)
def test_a_value_ends_in_front_of_what_is_blank_or_a_comment(line: str, value: str) -> None:
    """However many lines it takes."""
    begin, end = value_span(line)
    assert line[begin:end] == value


def test_there_is_no_value_where_there_is_no_key() -> None:
    """A header, a comment."""
    for line in ("[a]\n", "# a = 1\n", ""):
        with pytest.raises(ValueError, match="no key"):
            value_span(line)


def test_the_entries_of_a_table_in_one_line_are_told_apart() -> None:
    """Whatever is in their values."""
    table = "{ a = 1, b.c=[1, 2] , 'd' = { e = ',' },\"}\" = '#' }"
    found = [(entry.path, table[entry.start : entry.value], table[entry.value : entry.end]) for entry in entries(table)]
    assert found == [
        (("a",), "a = ", "1"), (("b", "c"), "b.c=", "[1, 2]"), (("d",), "'d' = ", "{ e = ',' }"),
        (("}",), '"}" = ', "'#'"),
    ]  # fmt: skip
    assert entries("{}") == []


def test_comments_are_found_where_they_are_comments() -> None:
    """Not in strings; their places are those of their marks."""
    found = list(comments(EXAMPLE))
    assert [text for _, text in found] == [
        "# [not.a.table]", "# [nor.this]", "# [x]", "# ]", "# comment",
    ]  # fmt: skip
    assert all(EXAMPLE.startswith(text, at) for at, text in found)


@given(documents)
def test_the_value_of_each_key_of_a_random_document_is_found(document: dict[str, Any]) -> None:
    """It reads as what tomllib reads there."""
    text = tomli_w.dumps(document)
    read = tomllib.loads(text)
    for piece in pieces(text):
        if piece.kind == "key":
            begin, end = value_span(text, piece.start)
            value: Any = read
            for part in piece.path:
                value = value[part]
            assert same(tomllib.loads(f"x = {text[begin:end]}")["x"], value)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.text() | st.lists(st.integers(-9, 9))))
def test_the_entries_of_any_table_are_its_keys(table: dict[str, Any]) -> None:
    """In their order, with their values."""
    text = rendered(table)
    found = entries(text)
    assert [entry.path for entry in found] == [(key,) for key in table]
    for entry in found:
        assert same(tomllib.loads(f"x = {text[entry.value : entry.end]}")["x"], table[entry.path[0]])


@given(st.text(st.sampled_from("a.=[]{}\"'#\\\n\r ,1"), max_size=40))
def test_no_text_makes_it_fail_or_hang(text: str) -> None:
    """Even what is no TOML is in pieces without gaps."""
    assert "".join(text[piece.start : piece.end] for piece in pieces(text)) == text
    list(comments(text))
    entries(text)
