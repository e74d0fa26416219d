"""Starts that share a GPU go one after another."""

import asyncio
import itertools

import pytest

from tests.engine.virtual import FakeTenant, passes, settle, virtual
from vllm_proxy.domain.devices import unmanaged
from vllm_proxy.domain.ledger import Standing
from vllm_proxy.fleet.loop import FleetLoop
from vllm_proxy.fleet.room import Room

_numbers = itertools.count()


def begun() -> Room:
    """The room of a fleet loop that decides."""
    loop = FleetLoop()
    loop.room.unmanaged = lambda spec: unmanaged(str(device) for device in spec.devices or ())
    loop.start()
    return loop.room


class Start:
    """One engine that holds its devices from `admitted` until it is told to let go."""

    def __init__(self, room: Room, *devices: str) -> None:
        self.admitted = False
        self.let_go = asyncio.Event()
        self.tenant = FakeTenant(f"start{next(_numbers)}/0", *devices)
        self.task = asyncio.create_task(self._run(room))

    async def _run(self, room: Room) -> None:
        self.claim = room.ask(self.tenant)
        try:
            await self.claim.admission()
            self.admitted = True
            await self.let_go.wait()
        finally:
            self.claim.done()


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
    room = begun()
    starts = [Start(room, "0") for _ in range(300)]
    names = [start.tenant.name for start in starts]
    await passes(1)
    assert starts[1].tenant.told == [f"waits: {names[0]} loads on what it needs"]
    starts[0].let_go.set()
    await passes(1)
    assert starts[1].tenant.told == [f"waits: {names[0]} loads on what it needs", None]
    for start in starts[2:]:
        assert start.tenant.told[-1] == f"waits: {names[1]} loads on what it needs"
    for start in starts:
        start.let_go.set()
        await settle()
        assert start.admitted
    await settle()
    assert room.now().holds == []


@virtual
async def test_a_claim_withdrawn_in_the_moment_of_its_admission_is_gone() -> None:
    """The one behind it starts, and nothing is left of either."""
    room = begun()
    first, second = Start(room, "0"), Start(room, "0")
    await asyncio.sleep(0)
    while first.claim.standing is not Standing.COMES:
        await asyncio.sleep(0)
    assert not first.admitted, "it does not know yet"
    first.task.cancel()
    await settle()
    assert (first.task.cancelled(), second.admitted) == (True, True)
    second.let_go.set()
    await settle()
    assert (room.now().holds, room.now().asks) == ([], [])
