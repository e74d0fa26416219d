"""Work that is done one at a time, in the order of the calls, for callers that wait no longer than a deadline.

What has begun is never abandoned, though its caller gives up: it keeps its turn until it has come to its end, since
work behind it could be undone by it. A disk may hang for ever; whoever waits for it is told so.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from vllm_proxy.errors import VllmProxyError
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import spawn

log = structlog.get_logger()


class NoAnswerError(Exception):
    """A deadline passed; `begun`: the work goes on, and may still succeed."""

    def __init__(self, *, begun: bool) -> None:
        super().__init__()
        self.begun = begun


class Exclusive:
    """One turn, for `what`: as messages name it."""

    def __init__(self, what: str, seconds: float) -> None:
        """`seconds`: a caller waits at most so long."""
        self._what = what
        self._seconds = seconds
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run[T](self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do work in turn; it goes on though the caller gives up.

        Raises:
            NoAnswerError: when it takes too long. What has begun goes on and keeps its turn, the rest is dropped.

        """
        begun = asyncio.Event()

        async def in_turn() -> T:
            async with self._turn:
                begun.set()
                return await work()

        task = spawn(in_turn(), f"a turn of {self._what}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        if await clock.wait({task}, self._seconds):
            return task.result()
        if not begun.is_set():
            task.cancel()
        raise NoAnswerError(begun=begun.is_set())

    async def close(self, seconds: float) -> bool:
        """Wait for what has begun, for so long at most; whether it has ended."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        return not self._tasks

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()  # its caller may have gone
        if error is not None and not isinstance(error, VllmProxyError):
            log.error("work in turn has failed", of=self._what, exc_info=error)
