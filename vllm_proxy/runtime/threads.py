"""Threads for calls that block, and that may hang for ever without keeping the daemon from working or exiting.

The threads of `concurrent.futures` are joined at exit, so one read from a dead NFS server would keep a stopped daemon
from exiting; and there are few of them, so some hung calls would keep engines from being ended. The threads here are
never joined, and each disk has a pool of its own.
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
    """Threads that are never joined. One is started at once, more on demand.

    Where the system makes no more threads, calls are queued; where it made none at all, they are done by the caller.
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
        self._start_thread()

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a function called."""
        future: Future[T] = Future()
        call = partial(fn, *args, **kwargs)
        with self._counting:
            self._free -= 1
            wanted = self._free < 0 and self._made < self._most
        if wanted:
            self._start_thread()
        if self._made:
            self._calls.put((future, call))
        else:
            self._call(future, call)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 - the signature is given
        """End idle threads. Busy ones are not joined: they end with the process."""
        for _ in range(self._made):
            self._calls.put(None)

    def running(self) -> list[str]:
        """The names of the functions that have not come back."""
        return list(self._running.values())

    def _start_thread(self) -> None:
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
            self._call(*work)
            del work  # do not keep what it returned alive

    def _call(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if future.set_running_or_notify_cancel():
            function = getattr(call, "func", call)
            self._running[future] = getattr(function, "__qualname__", repr(function))
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
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
    """Calls functions that read or write a disk that may hang, in a pool of its own (a bulkhead).

    At most `most` run at once, hung and abandoned ones included; more are queued.
    """

    def __init__(self, name: str, most: int = 8) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = DaemonThreads(name, most)
        self._slots = asyncio.Semaphore(most)

    async def __call__[**P, T](self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns or raises. Whoever does not want to wait for it is cancelled."""
        await self._slots.acquire()
        future = self._threads.submit(function, *args, **kwargs)
        future.add_done_callback(self._done)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the threads; a hung call is abandoned."""
        self._threads.shutdown()

    def _done(self, _: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._slots.release)


class DaemonLoop(uvloop.Loop):
    """An event loop that ends though a call in one of its threads does not."""

    def __init__(self) -> None:
        super().__init__()
        self.set_default_executor(DaemonThreads("work"))

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - the signature is given
        """Join no threads."""
