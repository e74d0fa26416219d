"""What the daemons of the tests are watched by."""

import asyncio
import time
from collections.abc import Callable

import pytest
import uvloop

from tests.runtime.test_turns import compute
from tests.slow_turns import LIMIT_SECONDS, Watch


async def watched(*callbacks: Callable[[], object]) -> list[str]:
    """What is reported of callbacks that the loop runs in one turn each."""
    reports: list[str] = []
    watch = Watch(reports.append)
    for callback in callbacks:
        asyncio.get_running_loop().call_soon(callback)
        await asyncio.sleep(0.03)
    watch.stop()
    return reports


def too_long() -> None:
    """A callback that holds the loop."""
    compute(2 * LIMIT_SECONDS)


def in_one_call() -> None:
    """The same, in C: no other thread runs meanwhile."""
    end = time.thread_time() + 2 * LIMIT_SECONDS
    while time.thread_time() < end:
        sum(range(1_000_000))


@pytest.mark.parametrize("callback", [too_long, in_one_call])
def test_a_callback_that_computes_for_long_is_reported_with_its_stack(callback: Callable[[], None]) -> None:
    """Once, whatever it is busy with."""
    (report,) = uvloop.run(watched(callback))
    assert f"in {callback.__name__}\n" in report


def test_a_step_of_a_task_is_a_callback_and_its_steps_are_several() -> None:
    """A task that gives others a turn may compute as long as it likes."""

    async def steps(count: int, seconds: float) -> None:
        for _ in range(count):
            compute(seconds)
            await asyncio.sleep(0)

    async def run(count: int, seconds: float) -> list[str]:
        reports: list[str] = []
        watch = Watch(reports.append)
        await asyncio.create_task(steps(count, seconds))
        watch.stop()
        return reports

    assert uvloop.run(run(10, LIMIT_SECONDS / 3)) == []
    assert len(uvloop.run(run(3, LIMIT_SECONDS * 4))) == 3  # long enough to be seen on a busy machine, too


def test_many_short_callbacks_of_one_turn_are_none_that_is_long() -> None:
    """A crowd of requests is served in one turn."""

    def crowd() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(50):
            loop.call_soon(compute, LIMIT_SECONDS / 20)

    async def run() -> list[str]:
        reports: list[str] = []
        watch = Watch(reports.append)
        crowd()
        await asyncio.sleep(0.05)
        watch.stop()
        return reports

    assert uvloop.run(run()) == []


def test_a_machine_that_is_busy_elsewhere_makes_nothing_slow() -> None:
    """The clock goes on while the loop's thread gets no processor: that is not its fault."""
    assert uvloop.run(watched(lambda: time.sleep(2 * LIMIT_SECONDS))) == []
