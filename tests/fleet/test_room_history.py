"""What the metrics say of those who waited for room, beside what happened. In virtual time."""

import asyncio
from dataclasses import replace

import pytest

from tests.engine.virtual import Stage, now, passes, virtual
from tests.fleet.test_giving_way import GIB, Gpus, answered, engine_of, model
from tests.fleet.test_model import begun
from vllm_proxy.domain.inventory import Foreign
from vllm_proxy.domain.ledger import Depth
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.fleet.room_history import Counted, Doing, How

MODELS = {"chat", "code", "late"}


def counted(stage: Stage) -> Counted:
    """Until now."""
    return stage.loop.room.history.counted(now(), MODELS, {"0", "1"})


def wanted(stage: Stage) -> dict[Doing, float]:
    """Seconds that somebody waited for the first GPU, by what it did meanwhile."""
    return {doing: round(seconds, 2) for (device, doing), seconds in counted(stage).wanted.items() if device == "0"}


async def swapped(stage: Stage) -> None:
    """Chat serves, and gives way to code."""
    with await answered(stage, "chat"):
        pass
    with await answered(stage, "code"):
        pass


@virtual
async def test_a_swap_is_counted_with_who_gave_way_how_far_and_for_whom() -> None:
    """Once it serves; a start that found its room is none."""
    stage = Stage(Gpus())
    begun(stage, model("chat")), begun(stage, model("code"))
    with await answered(stage, "chat"):
        assert counted(stage).swaps == {}
    await swapped(stage)
    await swapped(stage)
    found = counted(stage)
    assert found.evictions == {("chat", Depth.STOP, "code"): 2, ("code", Depth.STOP, "chat"): 1}
    assert found.swaps == {("chat", How.COLD): 1, ("code", How.COLD): 2}
    assert sum(found.swap_seconds[How.COLD].counts) == 3


@virtual
async def test_the_overhead_of_a_swap_is_what_neither_engine_took() -> None:
    """Not the time that the one before is left alone, its last requests, its end, nor the own start."""
    stage = Stage(Gpus())
    chat, _ = begun(stage, model("chat")), begun(stage, model("code"))
    stage.launcher.teardown_seconds = 7
    running = await answered(stage, "chat")
    asked = now()
    waiting = asyncio.create_task(answered(stage, "code"))
    await stage.until(lambda: chat.state is State.UNLOADING)
    assert now() - asked == pytest.approx(30)
    await passes(20)
    running.__exit__()
    stage.launcher.no_port = "all are in use"
    with await waiting:
        found = counted(stage)
    assert found.swap_seconds[How.COLD].total == pytest.approx(30 + 20 + 7 + 60, abs=1)
    assert found.overhead_seconds[How.COLD].total == pytest.approx(60, abs=0.01), (
        "it was the daemon's, for want of a port"
    )


@virtual
async def test_a_device_that_somebody_waits_for_is_counted_by_what_it_does_and_no_second_is_lost() -> None:
    """First it serves, since it is to be left alone and then is busy; then it drains, an engine goes, another comes."""
    stage = Stage(Gpus())
    chat, code = begun(stage, model("chat")), begun(stage, model("code"))
    begun(stage, model("late", queue_timeout=10**6))
    stage.launcher.teardown_seconds = 7
    running = await answered(stage, "chat")
    await passes(100)
    assert wanted(stage) == {}, "nobody waits"
    waiting = asyncio.create_task(stage.registry.acquire("code"))
    await stage.until(lambda: chat.state is State.UNLOADING)
    await passes(20)
    running.__exit__()
    await stage.until(lambda: code.instances[0].engine is not None)
    late = asyncio.create_task(stage.registry.acquire("late"))
    await passes(3)
    assert wanted(stage) == {Doing.SERVING: 30, Doing.DRAINING: 20, Doing.GOING: 7, Doing.COMING: 3}
    engine_of(stage, "code").listens = True
    with await waiting:
        pass
    (await stage.engine(3)).listens = True
    with await late:
        assert wanted(stage).get(Doing.IDLE, 0) == 0


@virtual
async def test_a_device_that_waits_for_another_one_of_its_set_is_not_called_idle() -> None:
    """Who wants both waits for the busy one."""
    stage = Stage(Gpus(count=2))
    chat = begun(stage, model("chat", keys={"devices": (0,)}))
    begun(stage, model("wide", keys={"tensor_parallel_size": 2}))
    running = await answered(stage, "chat")
    waiting = asyncio.create_task(answered(stage, "wide"))
    await stage.until(lambda: chat.state is State.UNLOADING)
    await passes(20)
    found = stage.loop.room.history.counted(now(), {"chat", "wide"}, {"0", "1"}).wanted
    assert {device for device, _ in found} == {"0", "1"}
    assert not any(doing is Doing.IDLE for _, doing in found)
    running.__exit__()
    with await waiting:
        pass


@virtual
async def test_the_wait_for_room_ends_with_the_admission() -> None:
    """Of every start, one that finds its room at once too."""
    stage = Stage(Gpus())
    begun(stage, model("chat")), begun(stage, model("code"))
    await swapped(stage)
    waits = counted(stage).waits
    assert (sum(waits["chat"].counts), sum(waits["code"].counts)) == (1, 1)
    assert (waits["chat"].total, waits["code"].total) == pytest.approx((0, 10), abs=1)


@pytest.mark.parametrize(("gib", "foreign"), [(10, 6), (4, 0)])
@virtual
async def test_what_nobody_can_give_is_no_time_lost(gib: int, foreign: int) -> None:
    """A model waits for what other programs have, or for more than there is: its device is not called idle."""
    gpus = Gpus(gib=gib)
    gpus.seen["0"] = replace(gpus.seen["0"], foreign=(Foreign(7, "python", foreign * GIB),))
    stage = Stage(gpus)
    chat = begun(stage, model("chat"))
    task = asyncio.create_task(stage.registry.acquire("chat"))
    await passes(5)
    assert chat.waits is not None
    await passes(20)
    assert wanted(stage) == {}
    await asyncio.wait({task})


@virtual
async def test_nothing_is_kept_of_models_and_devices_that_are_gone() -> None:
    """As who gave way, as for whom, and as what served: however many there were, the series are those of the file."""
    stage = Stage(Gpus())
    begun(stage, model("chat")), begun(stage, model("code"))
    await swapped(stage)
    found = stage.loop.room.history.counted(now(), {"chat"}, {"1"})
    assert (found.evictions, found.swaps, [*found.waits], found.wanted) == ({}, {}, ["chat"], {})


@virtual
async def test_a_start_that_fails_is_no_swap() -> None:
    """Who gave way for it is counted all the same; the next start, which finds the room free, is none either."""
    stage = Stage(Gpus())
    begun(stage, model("chat")), begun(stage, model("code"))
    with await answered(stage, "chat"):
        pass
    task = asyncio.create_task(stage.registry.acquire("code"))
    (await stage.engine(2)).die()
    (await stage.engine(3)).listens = True
    with await task:
        found = counted(stage)
    assert (sum(found.evictions.values()), found.swaps) == (1, {})


@virtual
async def test_a_swap_that_wakes_is_another_one_than_a_cold_start() -> None:
    """Both models sleep for each other; of a wake, what the engine itself took is no overhead."""
    stage = Stage(Gpus(gib=12))
    for name in ("chat", "code"):
        begun(stage, model(name, 8, {"sleep": 1}))
    stage.nap.seconds = 3
    await swapped(stage)
    await swapped(stage)
    found = counted(stage)
    assert found.evictions == {("chat", Depth.SLEEP, "code"): 2, ("code", Depth.SLEEP, "chat"): 1}
    assert found.swaps == {("code", How.COLD): 1, ("chat", How.WAKE): 1, ("code", How.WAKE): 1}
    assert found.overhead_seconds[How.WAKE].total == pytest.approx(0, abs=0.1)
    assert found.swap_seconds[How.WAKE].total > 2 * 2 * 3


@virtual
async def test_a_wake_that_fails_is_a_cold_start_among_the_swaps() -> None:
    """Its engine was started anew under the same grant."""
    stage = Stage(Gpus(gib=12))
    for name in ("chat", "code"):
        begun(stage, model(name, 8, {"sleep": 1}))
    await swapped(stage)
    stage.nap.failures = ["wake"]
    with await answered(stage, "chat"):
        pass
    assert counted(stage).swaps == {("code", How.COLD): 1, ("chat", How.COLD): 1}
