"""Starts that share a GPU go one after another."""

import asyncio
import itertools

import pytest

from tests.engine.virtual import passes, settle, virtual
from vllm_proxy.domain.decide import ClaimState, NotNow
from vllm_proxy.domain.devices import Allocation
from vllm_proxy.fleet.loop import FleetLoop
from vllm_proxy.fleet.room import Room

_numbers = itertools.count()


def begun() -> Room:
    """The room of a fleet loop that decides."""
    loop = FleetLoop()
    loop.start()
    return loop.room


class Start:
    """One engine that holds its devices from `admitted` until it is told to let go."""

    def __init__(self, room: Room, *devices: str) -> None:
        self.admitted = False
        self.let_go = asyncio.Event()
        self.task = asyncio.create_task(self._run(room, frozenset(devices)))

    async def _run(self, room: Room, devices: frozenset[str]) -> None:
        async with room.hold(f"start/{next(_numbers)}", Allocation(devices)):
            self.admitted = True
            await self.let_go.wait()


@virtual
async def test_one_device_is_held_by_one_at_a_time_in_the_order_they_came() -> None:
    """First come, first served."""
    room = begun()
    starts = [Start(room, "0") for _ in range(3)]
    for number, start in enumerate(starts, start=1):
        await settle()
        assert [start.admitted for start in starts] == [True] * number + [False] * (3 - number)
        start.let_go.set()


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (["0"], ["1"], True),
        ([], [], True),
        ([], ["0"], True),
        (["GPU-a"], ["GPU-b"], True),
        (["0"], ["0"], False),
        (["0", "1"], ["1", "2"], False),
        (["0"], ["GPU-a"], False),
        (["0", "GPU-a"], ["1", "GPU-b"], False),
    ],
)
@virtual
async def test_only_sets_that_cannot_name_the_same_device_start_together(
    one: list[str], other: list[str], *, together: bool
) -> None:
    """No devices at all never conflict; an index and a UUID may be the same GPU."""
    room = begun()
    first = Start(room, *one)
    await settle()
    assert first.admitted
    second = Start(room, *other)
    await settle()
    assert second.admitted is together


@virtual
async def test_who_waits_for_two_devices_is_not_starved_by_who_wants_one() -> None:
    """A later start on a device that somebody already waits for stands behind."""
    room = begun()
    first, both, second = Start(room, "0"), Start(room, "0", "1"), Start(room, "1")
    await settle()
    assert (first.admitted, both.admitted, second.admitted) == (True, False, False)
    first.let_go.set()
    await settle()
    assert (both.admitted, second.admitted) == (True, False)


@virtual
async def test_a_cancelled_waiter_leaves_the_line() -> None:
    """Who stood behind only because of it goes on at once."""
    room = begun()
    Start(room, "0")
    both, second = Start(room, "0", "1"), Start(room, "1")
    await settle()
    both.task.cancel()
    await settle()
    assert (both.admitted, second.admitted) == (False, True)


@virtual
async def test_a_holder_that_fails_lets_the_next_one_in() -> None:
    """The devices are free however the block ends, a cancellation in the moment of admission included."""
    room = begun()
    first, second, third = (Start(room, "0") for _ in range(3))
    await settle()
    first.let_go.set()
    first.task.add_done_callback(lambda _: second.task.cancel())
    await settle()
    assert second.task.cancelled()
    assert third.admitted


@virtual
async def test_everybody_who_waits_is_told_for_whom_and_told_again_when_that_is_another_one() -> None:
    """Hundreds of them, a few in each turn of the loop; and that nothing is in the way any more."""
    loop = FleetLoop()
    loop.start()
    told: dict[int, list[str | None]] = {number: [] for number in range(300)}
    begun_at: list[int] = []

    async def start(number: int) -> None:
        def tell(why: NotNow | None) -> None:
            told[number].append(why.because if why else None)

        async with loop.room.hold(f"m{number}/0", Allocation(frozenset("0")), on_change=tell):
            begun_at.append(number)
            await passes(10)

    starts = [asyncio.create_task(start(number)) for number in range(300)]
    await passes(15)
    assert told[1] == ["m0/0 loads on what it needs", None]
    assert {tuple(told[number]) for number in range(2, 300)} == {
        ("m0/0 loads on what it needs", "m1/0 loads on what it needs")
    }
    await asyncio.wait(starts)
    assert begun_at == list(range(300))
    assert loop.room.claims() == ()


@virtual
async def test_a_claim_withdrawn_in_the_moment_of_its_admission_is_gone() -> None:
    """The one behind it starts, and nothing is left of either."""
    room = begun()
    first, second = Start(room, "0"), Start(room, "0")
    await asyncio.sleep(0)
    while room.claims()[0].state is not ClaimState.LOADING:
        await asyncio.sleep(0)
    assert not first.admitted, "it does not know yet"
    first.task.cancel()
    await settle()
    assert (first.task.cancelled(), second.admitted) == (True, True)
    second.let_go.set()
    await settle()
    assert room.claims() == ()
