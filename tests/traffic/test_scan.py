"""Finding members of a large JSON object without decoding it."""

import json
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.traffic.scan import find_members

MODEL = b"model"
NOTHING = object()


def find_member(text: bytes, name: bytes) -> Iterator[tuple[int, int] | None]:
    """As `find_members`, of one; None: it is not there."""
    for found in find_members(text, (name,)):
        yield found.get(name)


def found(text: bytes, name: bytes = MODEL) -> object:
    """The value of the member as JSON reads it, or NOTHING."""
    *_, span = find_member(text, name)
    return NOTHING if span is None else json.loads(text[slice(*span)])


def spelt(value: object, dice: random.Random) -> str:
    """A value as JSON, with spaces and escapes wherever JSON allows them."""

    def space() -> str:
        return "".join(dice.choices(" \t\r\n", k=dice.choice([0, 0, 0, 1, 3])))

    def text(string: str) -> str:
        plain = json.dumps(string)[1:-1] if dice.random() < 0.5 else json.dumps(string, ensure_ascii=False)[1:-1]
        if dice.random() < 0.5 and plain == string:
            plain = "".join(
                f"\\u{ord(char):04x}" if ord(char) < 0x80 and dice.random() < 0.4 else char for char in string
            )
        return f'"{plain}"'

    if isinstance(value, dict):
        members = (
            f"{space()}{text(key)}{space()}:{space()}{spelt(item, dice)}{space()}" for key, item in value.items()
        )
        return "{" + (",".join(members) or space()) + "}"
    if isinstance(value, list):
        return "[" + (",".join(space() + spelt(item, dice) + space() for item in value) or space()) + "]"
    return text(value) if isinstance(value, str) else json.dumps(value)


KEYS = st.sampled_from(["model", "Model", "model ", "models", "mode", '"model"', "m\\odel", "\u00e9"]) | st.text(
    max_size=8
)
TEXTS = st.text(max_size=20) | st.sampled_from(
    ['"model": "x"', '{"model": 1}', '\\"', "\\\\", "]}", ',"model":', "model"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(document=st.dictionaries(KEYS, VALUES, max_size=6), seed=st.integers(0, 2**32))
def test_it_finds_what_json_finds(document: dict[str, object], seed: int) -> None:
    """Whatever the document, its spaces and its escapes: the member of the outermost object, or nothing."""
    text = spelt(document, random.Random(seed))
    assert json.loads(text) == document
    assert found(text.encode()) == document.get("model", NOTHING)


@given(document=st.dictionaries(KEYS, VALUES, max_size=8), seed=st.integers(0, 2**32))
def test_several_members_are_found_in_one_pass(document: dict[str, object], seed: int) -> None:
    """Each as it is found alone."""
    names = frozenset({b"model", b"models", b"mode", b"m\\odel"})
    text = spelt(document, random.Random(seed)).encode("utf-8", "surrogatepass")
    *_, spans = find_members(text, names)
    alone = {name: span for name in names if (span := list(find_member(text, name))[-1]) is not None}
    assert spans == alone


@given(value=VALUES.filter(lambda value: not isinstance(value, dict)), seed=st.integers(0, 2**32))
def test_a_document_that_is_no_object_has_no_member(value: object, seed: int) -> None:
    """Lists of objects, texts and numbers hold none."""
    assert found(spelt(value, random.Random(seed)).encode()) is NOTHING


@given(text=st.binary(max_size=200) | st.text(alphabet='{}[]":,\\ \nmodel0', max_size=60).map(str.encode))
def test_any_text_gets_an_answer(text: bytes) -> None:
    """What is no JSON raises nothing and ends; a span lies inside the text."""
    for span in find_member(text, MODEL):
        assert span is None or 0 <= span[0] <= span[1] <= len(text)


@given(document=st.dictionaries(KEYS, VALUES, min_size=1, max_size=4), cut=st.floats(0, 1))
def test_a_document_that_is_cut_off_gets_an_answer(document: dict[str, object], cut: float) -> None:
    """Anywhere: in a text, an escape, a name or a number."""
    text = json.dumps(document).encode()
    *_, span = find_member(text[: int(len(text) * cut)], MODEL)
    assert span is None or span[1] <= len(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"model": "a", "model": "b"}', "b"),
        (b'{"model": "a", "mo\\u0064el": "b"}', "b"),
        (b'{"model": {"model": "inner"}, "x": {"model": "other"}}', {"model": "inner"}),
        (b'{"x": [{"model": "a"}], "y": "\\"model\\": \\"b\\""}', NOTHING),
        (b'  \n{"model":"a"}  ', "a"),
        (b'{"model":1e5}', 1e5),
        (b'{"model": ":,{}[]\\\\"}', ":,{}[]\\"),
        (b'[{"model": "a"}]', NOTHING),
        (b"{}", NOTHING),
        (b"", NOTHING),
        (b'"model"', NOTHING),
        (b'{"x": "model", "y": 1}', NOTHING),
        (b'{"\\u006dodel": "a"}', "a"),
        (b'{"\\u006Dodel": "a"}', "a"),
        (b'{"model\\u0000": "a"}', NOTHING),
    ],
)
def test_the_member_is_the_last_of_its_name_in_the_outermost_object(text: bytes, value: object) -> None:
    """As json.loads has it, however the name is spelt."""
    assert found(text) == value


@pytest.mark.parametrize(
    "text",
    [
        b'{"pad": "' + b"x" * 3_000_000 + b'", "model": "a"}',
        b'{"pad": "' + b'\\"' * 1_500_000 + b'", "model": "a"}',
        b'{"pad": "' + b"\\\\" * 1_500_000 + b'", "model": "a"}',
        b'{"pad": [' + b"1," * 1_000_000 + b'1], "model": "a"}',
        b'{"pad": ' + b" " * 3_000_000 + b'1, "model": "a"}',
        b'{"pad": ' + b"[" * 300_000 + b"]" * 300_000 + b', "model": "a"}',
        b"{" + b'"k": 1, ' * 300_000 + b'"model": "a"}',
        b'{"pad": [' + b'"",' * 500_000 + b'""], "model": "a"}',
        b'{"pad": ' + b"9" * 3_000_000 + b', "model": "a"}',
    ],
    ids="long-text quotes backslashes numbers spaces deep members empty-texts digits".split(),
)
def test_a_large_document_is_searched_in_many_short_steps(text: bytes) -> None:
    """The event loop gets its turn after each bounded piece, whatever the text is made of."""
    steps = list(find_member(text, MODEL))
    assert json.loads(text[slice(*(steps[-1] or (0, 0)))]) == "a"
    assert len(steps) >= len(text) / 2**18


@pytest.mark.parametrize("shift", range(12))
def test_an_escape_across_the_edge_of_a_step_is_read_as_one(shift: int) -> None:
    """A backslash that ends one piece and its quote that begins the next are one quote inside the text."""
    for escape in (b'\\"', b"\\\\", b"\\u0022"):
        pad = b"x" * (128 * 1024 - shift) + escape * 8 + b'", "model": "wrong", "z": "'.replace(b'"', b"'")
        assert found(b'{"pad": "' + pad + b'", "model": "right"}') == "right"
