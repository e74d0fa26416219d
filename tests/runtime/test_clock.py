"""What a process stood still for counts for nobody. On a virtual clock that somebody moves."""

import asyncio
import os
import time
from typing import cast

import pytest
from structlog.testing import capture_logs

from tests.engine.test_liveness import Waiting
from tests.engine.virtual import Stage, VirtualLoop, model, now, passes, settle, virtual
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.engine.proc import look_up
from vllm_proxy.errors import RequestError
from vllm_proxy.runtime import clock


def freeze(seconds: float) -> None:
    """The machine stands still for so long: nothing happens, and the clock has moved."""
    loop = cast("VirtualLoop", asyncio.get_running_loop())
    loop.jump(seconds)


@virtual
async def test_time_that_the_loop_did_not_run_is_not_counted() -> None:
    """It counts from then on; without a pulse nobody can tell."""
    began = now()
    with capture_logs() as logs, clock.Pulse():
        await passes(10)
        assert clock.elapsed(began) == 10
        freeze(1000)
        assert clock.elapsed(began) == 0
        await passes(10)
        assert clock.elapsed(began) == pytest.approx(10, abs=0.3)
    assert clock.elapsed(began) == 1020
    assert [entry["seconds"] for entry in logs] == [1000]


@virtual
async def test_a_loop_that_stands_still_again_and_again_is_worth_few_warnings() -> None:
    """One a minute, with how much it computed and how many were left out before."""
    with capture_logs() as logs, clock.Pulse():
        for _ in range(4):
            freeze(5)
            await passes(12)
        await passes(60)
        freeze(7)
        await passes(1)
    told = [(entry["seconds"], entry["unreported_before"]) for entry in logs]
    assert told == [(5, 0), (7, 3)]
    assert all(entry["computed_seconds"] < 5 for entry in logs)


@virtual
async def test_a_busy_loop_is_no_frozen_one() -> None:
    """Less than a second without a beat is counted as any other."""
    began = now()
    with clock.Pulse():
        for _ in range(10):
            await passes(1)
            freeze(0.5)
        assert clock.elapsed(began) == 15


@virtual
async def test_waits_and_sleeps_begin_anew() -> None:
    """Neither ends early, and a wait for something ends when it comes."""
    with clock.Pulse(), capture_logs():
        never = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(clock.wait({never}, 10))
        sleeping = asyncio.ensure_future(clock.sleep(10))
        await passes(9)
        freeze(3600)
        await passes(9)
        assert not waiting.done()
        assert not sleeping.done()
        await passes(2)
        assert await waiting is False
        assert sleeping.done()
        waiting = asyncio.ensure_future(clock.wait({never}, 10))
        await settle()
        freeze(3600)
        never.set_result(None)
        assert await waiting is True


@virtual
async def test_a_frozen_machine_ends_no_start() -> None:
    """`startup_timeout` is time in which the engine could have moved."""
    with clock.Pulse(), capture_logs():
        stage = Stage()
        chat = stage.supervisor(model(startup_timeout=60))
        chat.start()
        engine = await stage.engine()
        await passes(50)
        freeze(3600)
        await passes(50)
        assert (chat.state, engine.reaped_at) == (State.LOADING, None)
        await passes(20)
        assert chat.last_exit is not None
        assert chat.last_exit.diagnosis.reason is Reason.STARTUP_TIMEOUT


@virtual
async def test_a_frozen_machine_calls_no_engine_stalled_and_one_that_hangs_then_is() -> None:
    """Neither for its silence nor for its health; it has its whole `stall_timeout` again."""
    with clock.Pulse(), capture_logs():
        stage = Stage()
        chat = stage.supervisor(model(stall_timeout=300))
        chat.start()
        await stage.serving(chat)
        Waiting(chat)
        await passes(250)
        freeze(3600)
        await passes(250)
        assert chat.state is State.READY
        await stage.until(lambda: chat.phase is Phase.BACKOFF)
        assert now() == pytest.approx(250 + 3600 + 300, abs=20)


@virtual
async def test_a_frozen_machine_cuts_no_drain() -> None:
    """Requests in flight have their whole `drain_timeout` again."""
    with clock.Pulse(), capture_logs():
        stage = Stage()
        chat = stage.supervisor(model(drain_timeout=60))
        chat.start()
        engine = await stage.serving(chat)
        lease = await stage.registry.acquire("chat")
        stopped = chat.stop()
        await passes(50)
        freeze(3600)
        await passes(50)
        assert engine.reaped_at is None
        with lease:
            pass
        await stopped


@virtual
async def test_a_frozen_machine_fails_nobody_who_waits_and_calls_nobody_idle() -> None:
    """`queue_timeout` and `idle_timeout` too."""
    with clock.Pulse(), capture_logs():
        stage = Stage()
        chat = stage.supervisor(model(queue_timeout=60, max_in_flight=1))
        chat.start()
        await stage.serving(chat)
        lease = await stage.registry.acquire("chat")
        waiting = asyncio.ensure_future(stage.registry.acquire("chat"))
        await passes(50)
        freeze(3600)
        await passes(50)
        assert not waiting.done()
        with pytest.raises(RequestError, match="within 60 s"):
            await waiting
        with lease:
            pass
        freeze(3600)
        assert stage.registry.idle_seconds("chat") == 0


def test_the_age_of_a_process_is_told_without_the_wall_clock() -> None:
    """As /proc has its start: in ticks since boot. It is never negative."""
    me = look_up(os.getpid())
    assert me is not None
    age = clock.seconds_since_ticks(me.started)
    assert 0 < age <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert clock.seconds_since_ticks(me.started + 10**9) == 0
