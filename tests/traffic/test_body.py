"""The model's name in a JSON body, and the body with another one."""

import asyncio
import json
import random
from unittest.mock import ANY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.traffic.test_scan import KEYS, VALUES, spelt
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.body import LARGE, model_name, model_name_of_large, with_model, with_salt

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DEEP = 500_000  # Python 3.13 goes down 10,000 levels, 3.14 as far as its stack reaches
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=5)


def name_of(body: bytes, *, large: bool = False) -> str:
    """The name as a small body's is found, or a large one's; the code of the refusal where there is none."""
    try:
        return asyncio.run(model_name_of_large(body))[0] if large else model_name(body)
    except RequestError as error:
        return f"refused: {error.code}"


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model": "chat"}', "chat"),
        (b'{"stream": null, "n": 1e999, "model": "a/b:c@d"}', "a/b:c@d"),
        (b'{"model": "a", "model": "b"}', "b"),
        (b'{"mod\\u0065l": "\\u0063hat"}', "chat"),
        (b'{"model": ""}', "refused: missing_model"),
        (b'{"model": 1}', "refused: missing_model"),
        (b'{"model": ["chat"]}', "refused: missing_model"),
        (b'{"model": {"model": "chat"}}', "refused: missing_model"),
        (b'{"messages": [{"model": "chat"}]}', "refused: missing_model"),
        (b"{}", "refused: missing_model"),
        (b'["model", "chat"]', "refused: missing_model"),
        (b'"model"', "refused: missing_model"),
        (b"null", "refused: missing_model"),
        (b'{"model": "\xff"}', "refused: invalid_json"),
        (b'{"model": "\\ud800"}', "refused: invalid_json"),
        (b'{"model": "\0"}', "refused: invalid_json"),
        (b'{"model": "a\\u0000"}', "a\0"),
        (b'\xef\xbb\xbf{"model": "chat"}', "chat"),
        (b'\xef\xbb\xbf\n {"model": "chat"}', "chat"),
        (b'{"model": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "refused: invalid_json"),
        (b'{"model": tru}', "refused: invalid_json"),
        (b'{"model": }', "refused: invalid_json"),
    ],
)
def test_the_name_is_the_last_model_of_the_outermost_object(
    body: bytes,
    expected: str,
    large: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """A small body and a large one are read alike."""
    assert name_of(body, large=large) == expected


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model": "chat"', b'{"model": "chat"} x', b"{'model': 'chat'}", b"\xff", BYTE_ORDER_MARK,
     b'\xef\xbb{"model": "chat"}', BYTE_ORDER_MARK * 2_000 + b'{"model": "chat"}', b'{"model": "chat"}\0',
     b'{"model": "chat", "a": ' + b"[" * DEEP + b"]" * DEEP + b"}", b'{"a":' * DEEP + b"1" + b"}" * DEEP],
    ids=lambda body: str(body[:20]),
)  # fmt: skip
def test_a_small_body_that_is_no_json_is_refused(body: bytes) -> None:
    """Before anything is routed."""
    assert name_of(body) == "refused: invalid_json"


@given(document=DOCUMENTS, name=st.text(min_size=1, max_size=9), seed=st.integers(0, 2**32))
def test_small_and_large_bodies_name_the_same_model(document: dict[str, object], name: str, seed: int) -> None:
    """Whatever else is in them, and however they are written."""
    body = spelt(document | {"model": name}, random.Random(seed)).encode("utf-8", "surrogatepass")
    assert name_of(body) == name_of(body, large=True) == name


@given(document=DOCUMENTS, seed=st.integers(0, 2**32), marked=st.booleans())
def test_another_name_changes_no_other_byte(document: dict[str, object], seed: int, *, marked: bool) -> None:
    """Whatever the spaces, the escapes and the order, behind a byte order mark too: only the name is replaced."""
    body = BYTE_ORDER_MARK * marked + spelt(document | {"model": "an-alias"}, random.Random(seed)).encode()
    renamed = asyncio.run(with_model(body, 'the "id"', None))
    assert json.loads(renamed) == document | {"model": 'the "id"'}
    assert name_of(renamed) == 'the "id"'
    before, found, behind = renamed.partition(rb'"the \"id\""')
    assert found
    assert body.startswith(before)
    assert body.endswith(behind)
    assert json.loads(body[len(before) : len(body) - len(behind)]) == "an-alias"


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        (rb' {"n":1e400, "model" : "x" ,"s":"\u00e9\/"} ', rb' {"n":1e400, "model" : "id" ,"s":"\u00e9\/"} '),
        (b'{"model":"other","a":1,\n"model":"x"}\n', b'{"model":"other","a":1,\n"model":"id"}\n'),
        (b'{"\xff":"\xfe","model":"x","a":"\xff"}', b'{"\xff":"\xfe","model":"id","a":"\xff"}'),
        (rb'{"mod\u0065l":"\u0078","m":{"model":"x"}}', rb'{"mod\u0065l":"id","m":{"model":"x"}}'),
        (b'\xef\xbb\xbf{"model":"x"}', b'\xef\xbb\xbf{"model":"id"}'),
    ],
)
async def test_the_name_is_replaced_in_place(body: bytes, changed: bytes) -> None:
    """The last of several counts, as for engines; bytes that are no text are the engine's to refuse."""
    assert model_name(body) == "x"
    assert await with_model(body, "id", None) == changed


@pytest.mark.parametrize("rest", [b', "x": 1.50}', b', "x": tru}', b"} trailing"])
async def test_another_name_in_a_large_body_changes_nothing_else(rest: bytes) -> None:
    """Where the name stands is known from the search: every other byte stays, also of what only the engine reads."""
    body = b'{"pad": "' + b"x" * LARGE + b'", "model":  "an-alias"' + rest
    name, place = await model_name_of_large(body)
    assert name == "an-alias"
    assert await with_model(body, "chat", place) == body.replace(b'"an-alias"', b'"chat"')


async def test_a_search_of_a_large_body_lets_others_run() -> None:
    """Between its slices the event loop serves other streams."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    try:
        assert await model_name_of_large(b'{"pad": "' + b"x" * 8_000_000 + b'", "model": "chat"}') == ("chat", ANY)
    finally:
        task.cancel()
    assert turns >= 32


@given(
    body=st.binary(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                b'{"model":',
                b'"x"',
                b",",
                b"}",
                b'"\\ud800"',
                b"\xff",
                BYTE_ORDER_MARK,
                b"[",
                b"]",
                b" ",
                b"1",
                b'"mo\\u0064el"',
                b":",
                b"\0",
            ]
        )
    ).map(b"".join)
)
def test_no_body_is_a_fault(body: bytes) -> None:
    """Whatever its bytes are: it names a model, which can then be replaced, or it is refused with a reason."""
    if not (name := name_of(body)).startswith("refused: "):
        assert name_of(body, large=True) == name
        assert name_of(asyncio.run(with_model(body, "id", None))) == "id"


@given(
    document=st.dictionaries(KEYS | st.just("cache_salt"), VALUES, max_size=5),
    seed=st.integers(0, 2**32),
    marked=st.booleans(),
    renamed=st.booleans(),
)
def test_a_salt_is_the_last_member_and_changes_no_other(
    document: dict[str, object], seed: int, *, marked: bool, renamed: bool
) -> None:
    """Whatever a client sends as its own; with an alias that was replaced, behind a mark, with spaces at the end."""
    text = spelt(document | {"model": "chat"}, random.Random(seed)).encode("utf-8", "surrogatepass")
    body = BYTE_ORDER_MARK * marked + text + b" \r\n\t" * (seed % 3)
    if renamed:
        body = asyncio.run(with_model(body, "id", None))
    salted = with_salt(body, b"s" * 64)
    assert json.loads(salted) == json.loads(body) | {"cache_salt": "s" * 64}
    assert name_of(salted) == name_of(salted, large=True) == ("id" if renamed else "chat")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("large", [False, True])
def test_a_body_in_another_encoding_is_refused(encoding: str, large: bool) -> None:  # noqa: FBT001 - a parameter
    """Engines would read it, and take no salt behind it: read as UTF-8, the same bytes may name a model as well."""
    hidden, pad = b'", "model": "chat", "y": "'.decode("utf-16-le"), "x" * (LARGE if large else 1)
    text = f'{{"model": "other", "x": "{hidden}", "pad": "{pad}"}}'
    assert json.loads(text.encode(encoding))["model"] == "other"
    assert name_of(text.encode(encoding), large=large) == "refused: invalid_json"


@pytest.mark.parametrize("end", [b"", b"]", b'"', b"} x", b"}\0"])
def test_what_does_not_end_as_an_object_takes_no_salt(end: bytes) -> None:
    """It is refused, rather than passed on without one: a large body is not read as a whole."""
    with pytest.raises(RequestError, match="expected an object"):
        with_salt(b'{"model": "chat"' + end, b"s")
