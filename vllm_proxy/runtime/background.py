"""Background tasks, callbacks and listeners whose failures are logged instead of lost.

All tasks of the daemon are created here, which tests/test_house.py checks, in one of three ways:

- `keep_running`: a loop, such as a watch. After a failure it is restarted, with backoff.
- `run_once`: work that ends by itself. Its owner is notified of a failure.
- `spawn`: work whose result the caller awaits. The caller gets the exception.

A callback that raises (a timer, a descriptor, a signal, a finished task) is logged by `log_faults`. `notify` calls
listeners so that one that raises does not keep the others from being called.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import structlog

log = structlog.get_logger()

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0  # work that ran for longer than this has recovered
_NO_FAULT = (KeyboardInterrupt, SystemExit, GeneratorExit)

_tasks: set[asyncio.Task[Any]] = set()  # the event loop itself holds only weak references


def keep_running[T](work: Callable[[], Coroutine[Any, Any, T]], name: str) -> asyncio.Task[T]:
    """Run `work` until it is cancelled or returns. A failure is logged, and `work` is retried.

    The backoff doubles from a second to a minute; of the same failure only the first is logged with its traceback.
    """
    return _begin(_restarting(work, name), name)


def run_once(
    work: Callable[[], Coroutine[Any, Any, None]], name: str, failed: Callable[[], None] | None = None
) -> asyncio.Task[None]:
    """Begin what ends by itself. A failure is logged, and `failed` is called after it."""
    return _begin(_once(work, name, failed), name)


def spawn[T](work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Begin work that the caller awaits, who gets its exceptions; `log_faults` logs what is never retrieved."""
    return _begin(work, name)


def notify[*A](listeners: Iterable[Callable[[*A], None]], *news: *A) -> None:
    """Call each listener with the news."""
    for listener in listeners:
        try:
            listener(*news)
        except Exception:
            log.exception("a listener failed", listener=getattr(listener, "__qualname__", repr(listener)))


def log_faults(loop: asyncio.AbstractEventLoop) -> None:
    """Log what is raised in a callback, or by a task that nobody awaits."""

    def fault(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        log.error("a fault on the event loop", what=context["message"], exc_info=context.get("exception"))

    loop.set_exception_handler(fault)


def _begin[T](work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    task = asyncio.create_task(work, name=name)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


async def _restarting[T](work: Callable[[], Coroutine[Any, Any, T]], name: str) -> T:
    loop, pause, reported = asyncio.get_running_loop(), _FIRST_PAUSE_SECONDS, ""
    while True:
        began = loop.time()
        try:
            return await work()
        except BaseException as error:  # a panic in a library need not be an Exception
            if _ends_this_task(error):
                raise
            if loop.time() - began > _LONGEST_PAUSE_SECONDS:
                pause, reported = _FIRST_PAUSE_SECONDS, ""
            log.error("a background task failed and is begun again", task=name, seconds=pause, error=repr(error),
                      exc_info=None if reported == repr(error) else error)  # fmt: skip
            reported = repr(error)
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


async def _once(work: Callable[[], Coroutine[Any, Any, None]], name: str, failed: Callable[[], None] | None) -> None:
    try:
        await work()
    except BaseException as error:
        if _ends_this_task(error):
            raise
        log.exception("a background task failed", task=name)
        if failed is not None:
            failed()


def _ends_this_task(error: BaseException) -> bool:
    """Whether this task itself is cancelled. A cancellation of something that it awaited is a failure like others."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0
    return isinstance(error, _NO_FAULT)
