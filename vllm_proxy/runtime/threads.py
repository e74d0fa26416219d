"""Threads for calls that block. Its one rule: a call that never comes back costs its thread, and nothing else.

Threads of `concurrent.futures` are waited for when the process ends, so one read from a dead NFS server would keep a
daemon that has stopped from going; and their number has an end, so a few of them would keep engines from being ended.
"""

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import structlog
import uvloop

log = structlog.get_logger()

_MOST_THREADS = 32


class Offload(Protocol):
    """Calls a function where it may block."""

    async def __call__[**P, T](self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns or raises."""


class DaemonThreads(ThreadPoolExecutor):
    """Threads that nobody waits for. One is made at once, more as they are needed.

    Where the system makes no more, calls wait for one that is there; where it made none at all, they are done at once.
    """

    def __init__(self, name: str, most: int = _MOST_THREADS) -> None:
        super().__init__(1)  # asyncio insists on the type; not one of its own threads is ever started
        self._name = name
        self._most = most
        self._made = 0
        self._free = 0  # threads that wait, less calls that do
        self._short = False  # the last one could not be made
        self._counting = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._running: dict[Future[Any], str] = {}
        _pools.add(self)
        self._make_one()

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a function called."""
        future: Future[T] = Future()
        call = partial(fn, *args, **kwargs)
        with self._counting:
            self._free -= 1
            wanted = self._free < 0 and self._made < self._most
        if wanted:
            self._make_one()
        if self._made:
            self._calls.put((future, call))
        else:
            self._do(future, call)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 - the signature is given
        """Let go of those that wait for calls. Nobody waits for the others: they end with the process."""
        for _ in range(self._made):
            self._calls.put(None)

    def running(self) -> list[str]:
        """The names of the functions that have not come back."""
        return list(self._running.values())

    def _make_one(self) -> None:
        try:
            threading.Thread(target=self._work, name=f"{self._name} {self._made}", daemon=True).start()
        except RuntimeError as error:
            if not self._short:
                log.warning("no thread can be made: calls wait for each other", threads=self._name, error=str(error))
            self._short = True
            return
        with self._counting:
            self._short = False
            self._made += 1
            self._free += 1

    def _work(self) -> None:
        while work := self._calls.get():
            self._do(*work)
            del work  # what it returned is nobody's here

    def _do(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if future.set_running_or_notify_cancel():
            function = getattr(call, "func", call)
            self._running[future] = getattr(function, "__qualname__", repr(function))
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - it is raised where somebody waits for it
                del self._running[future]
                future.set_exception(error)
            else:
                del self._running[future]
                future.set_result(result)
        with self._counting:
            self._free += 1


def can_make_threads(count: int) -> bool:
    """Whether the system makes so many threads at once, as of now."""
    over, made = threading.Event(), list[threading.Thread]()
    try:
        for _ in range(count):
            thread = threading.Thread(target=over.wait, daemon=True)
            thread.start()
            made.append(thread)
    except RuntimeError:
        return False
    finally:
        over.set()
        for thread in made:
            thread.join()
    return True


_pools: weakref.WeakSet[DaemonThreads] = weakref.WeakSet()


def running() -> list[str]:
    """The names of the functions that have not come back, of all threads here."""
    return sorted(name for pool in _pools for name in pool.running())


class Disk:
    """Calls what reads or writes files on disks that may not answer, in threads of its own.

    More than `most` wait for each other, whether somebody still waits for them or not.
    """

    def __init__(self, name: str, most: int = 8) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = DaemonThreads(name, most)
        self._room = asyncio.Semaphore(most)

    async def __call__[**P, T](self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns or raises. Whoever does not want to wait for it is cancelled."""
        await self._room.acquire()
        future = self._threads.submit(function, *args, **kwargs)
        future.add_done_callback(self._done)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Let go of the threads; a call that does not come back is left to itself."""
        self._threads.shutdown()

    def _done(self, _: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._room.release)


class DaemonLoop(uvloop.Loop):
    """An event loop that ends though a call in one of its threads does not."""

    def __init__(self) -> None:
        super().__init__()
        self.set_default_executor(DaemonThreads("work"))

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - the signature is given
        """Nobody waits for its threads."""
