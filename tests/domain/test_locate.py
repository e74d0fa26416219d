"""Lines of keys."""

import tomllib
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_proxy.domain.file.locate import key_lines, line_of
from vllm_proxy.domain.toml import KeyPath

EXAMPLE = '''\
# [not.a.table]
top = 1 # [nor.this]
"quoted key" = "a = 1"
'single.quoted' = 'x # no comment'
a . "b.c" . d = { inner = 1, more = [1, 2] }
"tab\\there" = 1

text = """
[no.table]
no = "key"
"""
raw = \'\'\'
also_no = "key"
\'\'\'\'
list = [ # [x]
  "]", # ]
  1, [2,
  { x = "}" } ],
  [3],
  ["""a"""", "[b"],
]

[models.chat]  # comment
model = "x"

  [ models . "org/chat" . args ]
  indented = -1.5e3
[[many]]
one = 1
[[many]]
two = 1979-05-27 07:32:00
'''
LINES = {
    ("top",): 2,
    ("quoted key",): 3,
    ("single.quoted",): 4,
    ("a",): 5,
    ("a", "b.c"): 5,
    ("a", "b.c", "d"): 5,
    ("tab\there",): 6,
    ("text",): 8,
    ("raw",): 12,
    ("list",): 15,
    ("models", "chat"): 23,
    ("models", "chat", "model"): 24,
    ("models",): 23,
    ("models", "org/chat"): 26,
    ("models", "org/chat", "args"): 26,
    ("models", "org/chat", "args", "indented"): 27,
    ("many",): 28,
    ("many", "one"): 29,
    ("many", "two"): 31,
}

keys = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(["models", "a.b", "[x]", "#", '"', "'", "="])
scalars = (
    st.text(st.characters(codec="utf-8"), max_size=12)
    | st.integers(-(2**63), 2**63 - 1)
    | st.booleans()
    | st.dates()
    | st.sampled_from(['"""', "'''", "[a]\nb = 1", "\r\n[x]\r\n", "\\", '\\"', "# no comment", '""""\n'])
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
documents = st.recursive(
    st.dictionaries(keys, values, max_size=4),
    lambda inner: st.dictionaries(keys, values | inner, max_size=4),
    max_leaves=6,
)


def leaves(table: Mapping[str, Any], at: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every value that is no table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key)


def numbered(table: Mapping[str, Any], numbers: Iterator[int]) -> dict[str, Any]:
    """The same table, each whole number in it another one: so no two lines are alike."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            result[key] = numbered(value, numbers)
        else:
            result[key] = next(numbers) if type(value) is int else value
    return result


def at(document: Mapping[str, Any], path: KeyPath) -> Any:  # noqa: ANN401 - any TOML value
    """What stands at a path; a KeyError where nothing does."""
    value: Any = document
    for part in path:
        value = value[part]
    return value


def test_each_key_of_a_text_with_everything_has_its_line() -> None:
    """Comments, quotes, multi-line strings and lists, inline tables and dotted keys neither hide nor invent a key."""
    tomllib.loads(EXAMPLE)
    assert key_lines(EXAMPLE) == LINES


def test_crlf_counts_as_one_line_end() -> None:
    """A file from Windows has the same lines as one from elsewhere."""
    text = EXAMPLE.replace("\n", "\r\n")
    tomllib.loads(text)
    assert key_lines(text) == LINES


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        (r'"a\"b"', 'a"b'),
        (r'"\u00e4\U0001F600"', "\u00e4\U0001f600"),
        (r'"\\"', "\\"),
        (r'"\b\t\n\f\r"', "\b\t\n\f\r"),
        (r"'\n'", r"\n"),
        ('""', ""),
        ("1979-05-27", "1979-05-27"),
    ],
)
def test_a_quoted_key_means_what_tomllib_says(key: str, meaning: str) -> None:
    """Escapes in keys are read as TOML reads them."""
    text = f"\n{key} = 1\n"
    assert list(tomllib.loads(text)) == [meaning]
    assert key_lines(text) == {(meaning,): 2}


def test_a_table_of_its_own_beats_a_deeper_header_above_it() -> None:
    """`[a]` below `[a.b]` is where `a` stands; without it, `[a.b]` is."""
    assert key_lines("[a.b]\n[a]\n") == {("a",): 2, ("a", "b"): 1}
    assert key_lines("\n[a.b]\n") == {("a",): 2, ("a", "b"): 2}


def test_the_line_of_what_is_not_there_is_that_of_what_is_around_it() -> None:
    """A missing key has the line of its table, a missing table none."""
    lines = {("a",): 3, ("a", "b"): 5}
    assert [line_of(lines, path) for path in [("a", "b", "c"), ("a", "x"), ("y",), ()]] == [5, 3, 0, 0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "# only a comment",
        "a = 1 # no newline",
        'a = """x"""',
        'a = """"""',
        "a = ''''''",
        'a = """""x"""""',
        "a=[\n\n]",
        "\r\n\r\na=1",
        "[a]",
        "a.b.c=[[],[[]]]",
        'a = """\\\n  b = 1\n"""',
        "a = [ # ]\n]",
        "a='''\n'b'''",
    ],
)
def test_odd_texts_are_walked_to_their_end(text: str) -> None:
    """What tomllib accepts is never too odd: each of its top keys has a line within the text."""
    lines = key_lines(text)
    for key in tomllib.loads(text):
        assert 1 <= lines[key,] <= text.count("\n") + 1


def test_a_key_of_many_parts_costs_no_memory() -> None:
    """Only the upper parts of an absurdly long dotted key are remembered."""
    assert len(key_lines(".".join("a" * 20_000) + " = 1")) == 64


@given(document=documents, multiline=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=60)
def test_every_leaf_of_a_random_document_has_its_line(*, document: dict[str, Any], multiline: bool, end: str) -> None:
    """The line found for a value is the one that tomli_w wrote it on, and nothing is found that is not there."""
    written = tomli_w.dumps(numbered(document, count(1000)), multiline_strings=multiline)
    text = "# [a comment]\n" + written.replace("\r\n", "\n")
    lines = key_lines(text.replace("\n", end))
    read = tomllib.loads(text)
    for path in leaves(read):
        value = at(read, path)
        start = tomli_w.dumps({path[-1]: value if type(value) is int else 0})[: None if type(value) is int else -2]
        assert (text.split("\n")[lines[path] - 1] + "\n").startswith(start)
    for path in lines:
        at(read, path)


@given(st.text(st.sampled_from("a.=[]{}\"'#\\\n\r ,1"), max_size=40))
def test_no_text_makes_the_walk_fail_or_hang(text: str) -> None:
    """Even what is no TOML is walked to its end; every line found lies in the text."""
    assert all(1 <= line <= text.count("\n") + 1 for line in key_lines(text).values())
