"""Turns of the event loop."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.engine.virtual import passes, virtual
from vllm_proxy.runtime import turns
from vllm_proxy.runtime.turns import LoopLag, in_batches, in_turns


def compute(seconds: float) -> None:
    """Use the processor for so long."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def others(seen: list[int]) -> None:
    """Somebody else who wants a turn again and again."""
    while True:
        seen.append(len(seen))
        await asyncio.sleep(0)


async def test_much_is_done_with_turns_for_everybody_else_in_between() -> None:
    """Each item comes once, in order, and nobody waits for more than a few of them."""
    seen: list[int] = []
    other = asyncio.create_task(others(seen))
    await asyncio.sleep(0)
    items, turns_before = [], len(seen)
    async for item in in_turns(range(20)):
        compute(0.003)
        items.append(item)
    other.cancel()
    assert items == list(range(20))
    assert len(seen) - turns_before >= 19


async def test_little_is_done_at_once() -> None:
    """A turn of the loop for each of a few quick items would cost more than they do."""
    seen: list[int] = []
    other = asyncio.create_task(others(seen))
    await asyncio.sleep(0)
    turns_before = len(seen)
    assert [item async for item in in_turns("ab")] == ["a", "b"]
    assert len(seen) == turns_before
    other.cancel()


@pytest.mark.parametrize("count", [0, 1, 50, 51, 500])
async def test_batches_yield_between_each_other_however_quick_they_are(count: int) -> None:
    """By their number and not by a clock: what is decided in them is the same in every run."""
    seen: list[int] = []
    other = asyncio.create_task(others(seen))
    await asyncio.sleep(0)
    turns_before = len(seen)
    batches = [some async for some in in_batches(range(count))]
    other.cancel()
    assert [item for some in batches for item in some] == list(range(count))
    assert len(seen) - turns_before == max(0, len(batches) - 1) == max(0, (count - 1) // 50)


def test_the_largest_lag_is_shown_for_a_minute_at_least() -> None:
    """Longer than two looks of Prometheus lie apart; then it is forgotten."""
    lag, start = LoopLag(), time.monotonic()
    lag.note(0.4, start)
    shown = []
    for second in range(1, 200):
        lag.note(0.01, start + second)
        shown.append(lag.most())
    assert shown[:60] == [0.4] * 60
    assert shown[-1] == 0.01
    assert sum(lag.seconds.counts) == 200
    assert sum(lag.seconds.counts[: lag.seconds.bounds.index(0.25) + 1]) == 199


@virtual
async def test_the_loop_is_looked_at_ten_times_a_second() -> None:
    """However many times it was late."""
    lag = LoopLag()
    watching = asyncio.create_task(lag.watch())
    await passes(10.05)
    watching.cancel()
    assert sum(lag.seconds.counts) == 100


async def test_a_turn_that_takes_long_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is that holds the loop."""
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(turns, "time", cast("Any", clock))
    monkeypatch.setattr(turns, "_BEAT_SECONDS", 0.0)
    lag = LoopLag()
    watching = asyncio.create_task(lag.watch())
    await asyncio.sleep(0)
    now[0] += 0.75
    while not lag.most():
        await asyncio.sleep(0)
    watching.cancel()
    assert lag.most() == 0.75
