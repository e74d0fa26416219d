"""Load and trouble together, then rest, then the end: what must hold is checked at each."""

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.chaos.crowd import Crowd
from tests.chaos.environment import Environment, Surrounded, small_disk
from tests.chaos.trouble import Fleet, Trouble, nothing_is_wrong
from tests.harness import memory, vllm_proxy

MOST_GROWTH = 48 * 2**20  # bytes of a daemon at rest over one that has just started

type Enough = Callable[[Counter[str], Counter[str]], bool]  # of faults and of outcomes


async def chaos(
    folder: Path, port_start: int, enough: Enough, clients: int, seed: int, *, around: bool = False
) -> dict[str, Counter[str]]:
    """Make trouble until it is enough, under the load of so many clients; returns the faults and the outcomes.

    `around`: trouble with what is around the daemon, too.

    Raises:
        AssertionError: when an answer lied, a request got none, or something was left.

    """
    with small_disk(folder / "state") if around else contextlib.nullcontext():
        if around:
            surrounded = Surrounded(folder, port_start)
            return await _chaos(surrounded, Environment(surrounded, seed), enough, clients, seed)
        fleet = Fleet(folder, port_start)
        return await _chaos(fleet, Trouble(fleet, seed), enough, clients, seed)


async def _chaos(fleet: Fleet, trouble: Trouble, enough: Enough, clients: int, seed: int) -> dict[str, Counter[str]]:
    crowd = Crowd(fleet.url, clients, seed)
    try:
        await fleet.start()
        await fleet.daemon.until(lambda status: status.startswith("2 of 2 models ready"))
        before = memory(fleet.daemon.process.pid)
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.run())
            try:
                await trouble.make(lambda: enough(trouble.made, crowd.outcomes))
            finally:
                crowd.enough.set()
        await nothing_is_wrong(fleet)
        assert memory(fleet.daemon.process.pid) < before + MOST_GROWTH
    finally:
        await fleet.end(signal.SIGTERM)
        status, out, _ = await vllm_proxy(fleet.folder, "stop", "--all", env=fleet.places)
        print(out, end="")
    assert status == 0
    assert fleet.strays(set()) == []
    assert not list((fleet.folder / "run").glob("vp-*"))
    return {"faults": trouble.made, "outcomes": crowd.outcomes}
