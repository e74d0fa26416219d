"""Whose turn it is among requests that wait: the smallest number's, past whose key has as much in flight as it may."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.virtual import settle, virtual
from tests.traffic.test_registry import opened, registry_of, release
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.lease import Lease
from vllm_proxy.traffic.queue import Queue, Waiter
from vllm_proxy.traffic.registry import Registry


class Caller:
    """Who may have so many requests in flight."""

    def __init__(self, most: int) -> None:
        self.left = most


class Turn:
    """One of a caller's requests."""

    def __init__(self, caller: Caller, number: int = 0) -> None:
        self.caller = caller
        self.number = number

    def may_go(self) -> bool:
        """Whether the caller has one left."""
        return self.caller.left > 0

    def go(self) -> None:
        """It has an endpoint."""
        self.caller.left -= 1

    def wait(self, queue_size: int) -> None:
        """None may where there is no queue."""
        if not queue_size:
            raise RequestError("rate_limit_exceeded", "no room")


async def asked(registry: Registry, turn: Turn | None) -> asyncio.Task[Lease]:
    """A request that has come as far as it can."""
    route = registry.find("chat")

    async def acquire() -> Lease:
        return registry.lease(route, turn) or await registry.wait(route, turn=turn)

    task = asyncio.create_task(acquire())
    await settle()
    return task


@given(st.lists(st.integers(-3, 3), max_size=12))
@virtual
async def test_the_smallest_number_is_next_and_of_one_number_who_came_first(numbers: list[int]) -> None:
    """As sorting does it that keeps the order of equals."""
    queue, free = Queue(), Caller(len(numbers))
    for place, number in enumerate(numbers):
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        queue.add(Waiter(str(place), float(place), future, Turn(free, number)))  # type: ignore[arg-type]
    assert queue.since == (0.0 if numbers else None)
    taken = [waiter.caller for _ in numbers if (waiter := queue.take())]
    assert taken == [str(place) for place, _ in sorted(enumerate(numbers), key=lambda each: each[1])]
    assert len(queue) == 0


@virtual
async def test_who_has_as_much_in_flight_as_it_may_waits_although_an_endpoint_is_free() -> None:
    """Until one of its own requests has ended; whoever comes behind it is served at once."""
    registry, one = registry_of(), Caller(1)
    endpoint = opened(registry)
    first, second = await asked(registry, Turn(one)), await asked(registry, Turn(one))
    other = await asked(registry, Turn(Caller(1)))
    unlimited = await asked(registry, None)
    assert [task.done() for task in (first, second, other, unlimited)] == [True, False, True, True]
    assert endpoint.in_flight == 3
    release(first.result())
    registry.next_turn("chat")
    await settle()
    assert not second.done()  # its caller's permit is not back yet
    one.left += 1
    registry.next_turn("chat")
    await settle()
    assert second.result().endpoint is endpoint


@virtual
async def test_a_free_endpoint_goes_past_who_may_not_to_who_may() -> None:
    """And back to the first one, once that may."""
    registry, one = registry_of(max_in_flight=1), Caller(0)
    opened(registry)
    busy = await asked(registry, None)
    held_up, free = await asked(registry, Turn(one, -5)), await asked(registry, Turn(Caller(1), 5))
    release(busy.result())
    await settle()
    assert (held_up.done(), free.done()) == (False, True)
    one.left = 1
    release(free.result())
    await settle()
    assert held_up.done()


@virtual
async def test_a_turn_may_refuse_to_wait() -> None:
    """Before it stands in the queue."""
    registry = registry_of(queue_size=0)
    opened(registry)
    task = await asked(registry, Turn(Caller(0)))
    with pytest.raises(RequestError, match="no room"):
        task.result()
    assert registry.counts("chat") == (0, 0)


@virtual
async def test_a_queue_is_not_full_of_those_who_wait_for_their_own_keys_requests() -> None:
    """However many of one key wait: others are served, and wait where the engine is busy."""
    registry, one = registry_of(queue_size=2, max_in_flight=2), Caller(1)
    opened(registry)
    mine = [await asked(registry, Turn(one)) for _ in range(6)]
    assert [task.done() for task in mine] == [True] + [False] * 5
    other = await asked(registry, None)
    assert other.done()
    waiting = [await asked(registry, None) for _ in range(2)]
    full = await asked(registry, None)
    assert isinstance(full.exception(), RequestError)
    assert not any(task.done() for task in waiting)
    for task in (*mine[1:], *waiting):
        task.cancel()


@virtual
async def test_who_leaves_the_queue_takes_no_endpoint_along() -> None:
    """A cancelled one with the smallest number: the next one is served, and all counts come back."""
    registry = registry_of(max_in_flight=1)
    endpoint = opened(registry)
    busy = await asked(registry, None)
    gone, next_one = await asked(registry, Turn(Caller(1), -1)), await asked(registry, Turn(Caller(1)))
    gone.cancel()
    release(busy.result())
    await settle()
    assert gone.cancelled()
    release(next_one.result())
    assert (endpoint.in_flight, registry.counts("chat")) == (0, (0, 0))


def test_a_queue_that_is_cleared_holds_nobody() -> None:
    """Whoever was in it is told by the caller."""
    loop = asyncio.new_event_loop()
    queue = Queue()
    waiter = Waiter("", 1.0, loop.create_future())
    queue.add(waiter)
    assert queue.clear() == [waiter]
    assert (len(queue), queue.since, queue.take()) == (0, None, None)
    loop.close()
