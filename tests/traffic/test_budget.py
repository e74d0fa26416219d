"""What bodies hold together, whatever the order in which they come and go."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.config import Server
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.relay import with_deadline

SERVER = Server(max_body_size=60, max_buffered=100)


class Body:
    """Who holds bytes."""

    held = 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 70)), max_size=40))
def test_no_more_is_held_than_is_allowed_and_all_of_it_is_given_back(pieces: list[tuple[int, int]]) -> None:
    """Each piece goes to one of five bodies; one that is refused ends, and all end in the end, perhaps twice."""
    budget, bodies = Budget(), [Body() for _ in range(5)]
    for number, size in pieces:
        body = bodies[number]
        if body.held + size <= SERVER.max_body_size and budget.held + size <= SERVER.max_buffered:
            budget.take(body, size, SERVER)
            continue
        with pytest.raises(RequestError) as refused:
            budget.take(body, size, SERVER)
        too_large = body.held > SERVER.max_body_size
        assert refused.value.code == ("request_too_large" if too_large else "overloaded")
        budget.release(body)
        assert budget.held == sum(body.held for body in bodies) <= SERVER.max_buffered
    for body in bodies * 2:
        budget.release(body)
    assert budget.held == 0


@pytest.mark.parametrize(
    ("held", "size", "code"),
    [(0, 60, None), (0, 61, "request_too_large"), (40, 60, None), (41, 60, "overloaded"), (100, 0, None)],
)
def test_a_declared_length_is_looked_at_first(held: int, size: int, code: str | None) -> None:
    """Nothing is counted for it."""
    budget = Budget()
    budget.held = held
    if code is None:
        budget.check_length(size, SERVER)
    else:
        with pytest.raises(RequestError) as refused:
            budget.check_length(size, SERVER)
        assert refused.value.code == code
    assert budget.held == held


async def _never() -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize("age", [0.95, 1.0, 3.0])
async def test_request_timeout_counts_from_the_head_on(age: float) -> None:
    """A body that took nearly all of it leaves the rest, one that took longer leaves nothing."""
    call: Any = SimpleNamespace(started_at=time.monotonic() - age, status=0)
    with pytest.raises(RequestError) as refused:
        await with_deadline(1.0, cast("Call", call), _never())
    assert (refused.value.code, refused.value.status) == ("request_timeout", 504)
