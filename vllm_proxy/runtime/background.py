"""Background tasks and callbacks. Its one rule: what fails in one is logged with its name, and never the end of it all.

Nothing else in this package makes a task (a test looks). Three kinds, by what an exception must lead to:

- `keep_running`: a watch, a beat. It is begun again, after growing pauses.
- `run_once`: work that ends by itself. Its owner is told that it failed.
- `ask`: somebody waits for the result, and gets the exception.

A callback that raises (a timer, a descriptor, a signal, a finished task) is logged by `log_faults`; a listener that
raises keeps no other listener from being told, by `tell`.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import structlog

log = structlog.get_logger()

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0  # and what runs for longer than this has recovered
_NO_FAULT = (KeyboardInterrupt, SystemExit, GeneratorExit)

_tasks: set[asyncio.Task[Any]] = set()  # the event loop itself would forget them


def keep_running[T](work: Callable[[], Coroutine[Any, Any, T]], name: str) -> asyncio.Task[T]:
    """Begin what goes on until it is cancelled, or has its result. A failure is logged, and `work` is called again.

    The pause before that doubles, from a second to a minute; of the same failure only the first has its traceback.
    """
    return _begin(_again_and_again(work, name), name)


def run_once(
    work: Callable[[], Coroutine[Any, Any, None]], name: str, failed: Callable[[], None] | None = None
) -> asyncio.Task[None]:
    """Begin what ends by itself. A failure is logged, and `failed` is called after it."""
    return _begin(_once(work, name, failed), name)


def ask[T](work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Begin what its caller waits for, who gets its exceptions; one that nobody takes is logged by `log_faults`."""
    return _begin(work, name)


def tell[*A](listeners: Iterable[Callable[[*A], None]], *news: *A) -> None:
    """Call each listener with the news."""
    for listener in listeners:
        try:
            listener(*news)
        except Exception:
            log.exception("a listener failed", listener=getattr(listener, "__qualname__", repr(listener)))


def log_faults(loop: asyncio.AbstractEventLoop) -> None:
    """Have what was raised in a callback, or by a task that nobody waits for, logged as everything else is."""

    def fault(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        log.error("a fault on the event loop", what=context["message"], exc_info=context.get("exception"))

    loop.set_exception_handler(fault)


def _begin[T](work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    task = asyncio.create_task(work, name=name)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


async def _again_and_again[T](work: Callable[[], Coroutine[Any, Any, T]], name: str) -> T:
    loop, pause, told = asyncio.get_running_loop(), _FIRST_PAUSE_SECONDS, ""
    while True:
        began = loop.time()
        try:
            return await work()
        except BaseException as error:  # a panic in a library need not be an Exception
            if _ends_us(error):
                raise
            if loop.time() - began > _LONGEST_PAUSE_SECONDS:
                pause, told = _FIRST_PAUSE_SECONDS, ""
            log.error("a background task failed and is begun again", task=name, seconds=pause, error=repr(error),
                      exc_info=None if told == repr(error) else error)  # fmt: skip
            told = repr(error)
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


async def _once(work: Callable[[], Coroutine[Any, Any, None]], name: str, failed: Callable[[], None] | None) -> None:
    try:
        await work()
    except BaseException as error:
        if _ends_us(error):
            raise
        log.exception("a background task failed", task=name)
        if failed is not None:
            failed()


def _ends_us(error: BaseException) -> bool:
    """Whether somebody ends this very task. A cancellation of something that it waited for is a failure like others."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0
    return isinstance(error, _NO_FAULT)
