"""What fails in the background is seen, and goes on or tells its owner. In virtual time."""

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.engine.virtual import now, passes, settle, virtual
from vllm_proxy.runtime.background import keep_running, log_faults, notify, run_once, spawn


class PanicError(BaseException):
    """As a library in Rust raises it."""


@virtual
async def test_work_that_fails_is_begun_again_after_growing_pauses() -> None:
    """1, 2, 4 … seconds, a minute at most; a panic counts as any failure."""
    begun: list[float] = []

    async def work() -> None:
        begun.append(now())
        raise PanicError("no thread")

    with capture_logs() as logs:
        task = keep_running(work, "a beat")
        await passes(150)
        task.cancel()
        await asyncio.wait({task})
    assert begun == [0, 1, 3, 7, 15, 31, 63, 123]
    assert {entry["task"] for entry in logs} == {"a beat"}
    assert task.cancelled()


@virtual
async def test_only_the_first_of_the_same_failures_has_its_traceback() -> None:
    """A log is not flooded; another failure is told in full."""
    errors = iter([ValueError("one"), ValueError("one"), ValueError("two"), ValueError("two")])

    async def work() -> str:
        if error := next(errors, None):
            raise error
        return "done"

    with capture_logs() as logs:
        assert await keep_running(work, "a beat") == "done"
    assert [entry["exc_info"] is not None for entry in logs] == [True, False, True, False]


@virtual
async def test_work_that_went_well_for_a_while_has_short_pauses_again() -> None:
    """What failed an hour ago says nothing of now."""
    begun: list[float] = []

    async def work() -> None:
        begun.append(now())
        await asyncio.sleep(0 if len(begun) < 4 else 3600)
        raise ValueError

    with capture_logs():
        task = keep_running(work, "a beat")
        await passes(3610)
        task.cancel()
    assert begun == [0, 1, 3, 7, 3608]


@virtual
async def test_a_cancellation_of_what_it_waits_for_does_not_end_it() -> None:
    """Only who cancels the task itself ends it."""
    inner: list[asyncio.Future[None]] = []

    async def work() -> None:
        inner.append(asyncio.get_running_loop().create_future())
        await inner[-1]

    with capture_logs() as logs:
        task = keep_running(work, "a beat")
        await settle()
        inner[0].cancel()
        await passes(2)
        assert (len(inner), len(logs), task.done()) == (2, 1, False)
        task.cancel()
        await asyncio.wait({task})


@pytest.mark.parametrize("error", [ValueError("bad"), PanicError("bad")])
def test_what_ends_by_itself_tells_its_owner_that_it_failed(error: BaseException) -> None:
    """Once, after it was logged."""
    told: list[str] = []

    async def work() -> None:
        raise error

    @virtual
    async def run() -> None:
        with capture_logs() as logs:
            await run_once(work, "a check", lambda: told.append(logs[0]["task"]))

    run()
    assert told == ["a check"]


@virtual
async def test_a_task_that_nobody_holds_is_not_forgotten() -> None:
    """The event loop itself holds its tasks weakly."""
    done: list[str] = []

    async def work() -> None:
        ready = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(10, ready.set_result, None)
        await ready
        done.append("")

    run_once(work, "a check")
    await settle()
    gc.collect()
    await passes(11)
    assert done == [""]


def test_a_listener_that_fails_keeps_nobody_from_being_told() -> None:
    """It is named in the log."""
    told: list[str] = []

    def broken(_: str) -> None:
        raise ValueError

    with capture_logs() as logs:
        notify([told.append, broken, told.append], "news")
    assert told == ["news", "news"]
    assert "broken" in logs[0]["listener"]


def _timer() -> None:
    asyncio.get_running_loop().call_soon(_fail)


def _finished() -> None:
    asyncio.get_running_loop().create_future().add_done_callback(_fail)
    future = asyncio.get_running_loop().create_future()
    future.add_done_callback(_fail)
    future.set_result(None)


def _forgotten() -> None:
    async def work() -> None:
        raise ValueError

    spawn(work(), "nobody waits for it")


def _fail(_: object = None) -> None:
    raise ValueError


@pytest.mark.parametrize("fault", [_timer, _finished, _forgotten])
def test_a_callback_that_raises_is_logged_as_everything_else_is(fault: Callable[[], Any]) -> None:
    """And so is what a task raised that nobody waits for."""

    @virtual
    async def run() -> None:
        log_faults(asyncio.get_running_loop())
        with capture_logs() as logs:
            fault()
            await settle()
            gc.collect()
        assert isinstance(logs[0]["exc_info"], ValueError)

    run()
