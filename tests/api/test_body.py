"""The model's name in a JSON body, and the body with another one."""

import asyncio
import json
import random
from unittest.mock import ANY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.domain.test_scan import KEYS, VALUES, spelt
from vllm_proxy.api.body import LARGE, model_name, model_name_of_large, with_model
from vllm_proxy.errors import RequestError

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
    "body", [b"", b"{", b'{"model": "chat"', b'{"model": "chat"} x', b"{'model': 'chat'}", b"\xff"]
)
def test_a_small_body_that_is_no_json_is_refused(body: bytes) -> None:
    """Before anything is routed."""
    assert name_of(body) == "refused: invalid_json"


@given(document=DOCUMENTS, name=st.text(min_size=1, max_size=9), seed=st.integers(0, 2**32))
def test_small_and_large_bodies_name_the_same_model(document: dict[str, object], name: str, seed: int) -> None:
    """Whatever else is in them, and however they are written."""
    body = spelt(document | {"model": name}, random.Random(seed)).encode("utf-8", "surrogatepass")
    assert name_of(body) == name_of(body, large=True) == name


@given(document=DOCUMENTS, seed=st.integers(0, 2**32))
def test_another_name_changes_no_other_value(document: dict[str, object], seed: int) -> None:
    """Every other member means what it meant, and the new name is found."""
    body = spelt(document | {"model": "an-alias"}, random.Random(seed)).encode()
    renamed = with_model(body, 'the "id"')
    assert json.loads(renamed) == document | {"model": 'the "id"'}
    assert name_of(renamed) == 'the "id"'


def test_another_name_keeps_the_bytes_of_every_other_value() -> None:
    """Numbers that no float holds, escapes and the spaces inside values stay as they were written."""
    body = rb'{"n":1.00000000000000000001e400,"model":"x","s":"\u00e9\/","o":{"b" : [1 , 2]},"z":null}'
    assert with_model(body, "chat") == body.replace(b'"model":"x"', b'"model":"chat"')


@pytest.mark.parametrize("rest", [b', "x": 1.50}', b', "x": tru}', b"} trailing"])
async def test_another_name_in_a_large_body_changes_nothing_else(rest: bytes) -> None:
    """Where the name stands is known from the search: every other byte stays, also of what only the engine reads."""
    body = b'{"pad": "' + b"x" * LARGE + b'", "model":  "an-alias"' + rest
    name, place = await model_name_of_large(body)
    assert name == "an-alias"
    assert with_model(body, "chat", place) == body.replace(b'  "an-alias"', b'"chat"')


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
