"""A call that never comes back costs its thread and nothing else. With real threads."""

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from tests.harness import AS_NOBODY
from vllm_proxy.runtime.threads import DaemonThreads, Disk, running


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What hanging calls wait for; they are let go of in the end."""
    event = threading.Event()
    yield event
    event.set()


@contextlib.contextmanager
def threads(most: int = 32) -> Iterator[DaemonThreads]:
    """Let go of behind the block."""
    pool = DaemonThreads("test", most)
    try:
        yield pool
    finally:
        pool.shutdown()


def test_calls_get_their_results_and_their_errors() -> None:
    """As those of any executor."""
    with threads() as pool:
        assert pool.submit(divmod, 7, 2).result(20) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 7, 0).result(20)


def test_a_hanging_call_holds_up_no_other(hanging: threading.Event) -> None:
    """Another thread is made for what comes next; the calls that have not come back are known by name."""
    with threads() as pool:
        for _ in range(3):
            pool.submit(hanging.wait)
        assert pool.submit(divmod, 7, 2).result(20) == (3, 1)
        while running().count("Event.wait") < 3:  # which of four threads runs first, nobody knows
            pass


def test_as_many_threads_are_made_as_are_needed_and_no_more(hanging: threading.Event) -> None:
    """One that is free again is used again; more calls than threads wait."""
    with threads(2) as pool:
        for _ in range(20):
            pool.submit(divmod, 7, 2).result(20)
        pool.submit(hanging.wait)
        second = pool.submit(hanging.wait)
        third = pool.submit(divmod, 7, 2)
        assert not third.done()
        hanging.set()
        second.result(20)
        assert third.result(20) == (3, 1)
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("test ")]
        assert set(names) <= {"test 0", "test 1"}


HANGS = """
import asyncio, threading
import uvloop
from vllm_proxy.runtime.threads import DaemonLoop, Disk

async def main():
    disk = Disk("disk")
    for call in asyncio.to_thread(threading.Event().wait), disk(threading.Event().wait):
        asyncio.ensure_future(call)
    await asyncio.sleep(0)
    print(await asyncio.to_thread(lambda: "done"))

uvloop.run(main(), loop_factory=DaemonLoop)
"""


def test_a_process_ends_though_its_calls_do_not() -> None:
    """Those of the loop's own executor, and those of disks."""
    found = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "done\n", "")


SHORT = """
import asyncio, resource
import uvloop
from vllm_proxy.runtime.threads import DaemonLoop, DaemonThreads, Disk

def limit(most):
    resource.setrlimit(resource.RLIMIT_NPROC, (most, 1000))

async def main():
    limit(1)
    print(await asyncio.gather(*(asyncio.to_thread(divmod, 7, 2) for _ in range(5))))
    print(DaemonThreads("none at all").submit(divmod, 7, 2).result(0))
    limit(1000)
    print(await asyncio.to_thread(divmod, 7, 2))
    limit(1)

uvloop.run(main(), loop_factory=DaemonLoop)
"""


def test_where_no_thread_can_be_made_calls_are_made_all_the_same() -> None:
    """One after another by the one that is there, or at once where there is none; the process ends in order."""
    command = [*AS_NOBODY, sys.executable, "-c", SHORT]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    warnings = [line for line in found.stdout.splitlines() if "no thread can be made" in line]
    results = [line for line in found.stdout.splitlines() if line not in warnings]
    assert results == [str([(3, 1)] * 5), "(3, 1)", "(3, 1)"]
    assert len(warnings) == 2, "each pool says it once"


async def test_calls_of_a_disk_that_hangs_are_bounded_and_it_comes_back(hanging: threading.Event) -> None:
    """Whoever gives up leaves its thread to the call; more wait, and are served when the disk answers."""
    disk = Disk("disk", most=2)
    with capture_logs():
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await disk(hanging.wait)
        third = asyncio.ensure_future(disk(divmod, 7, 2))
        await asyncio.sleep(0)
        given_up = asyncio.ensure_future(disk(divmod, 7, 0))
        await asyncio.sleep(0)
        given_up.cancel()
        assert not third.done()
        hanging.set()
        assert await third == (3, 1)
    disk.close()
