"""Load and trouble together, then rest, then the end: what must hold is checked at each."""

import asyncio
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.chaos.crowd import Crowd
from tests.chaos.trouble import Fleet, Trouble, nothing_is_wrong
from tests.harness import vllm_proxy

type Enough = Callable[[Counter[str], Counter[str]], bool]  # of faults and of outcomes


async def chaos(folder: Path, port_start: int, enough: Enough, clients: int, seed: int) -> dict[str, Counter[str]]:
    """Make trouble until it is enough, under the load of so many clients; returns the faults and the outcomes.

    Raises:
        AssertionError: when an answer lied, a request got none, or something was left.

    """
    fleet = Fleet(folder, port_start)
    trouble, crowd = Trouble(fleet, seed), Crowd(fleet.url, clients, seed)
    try:
        await fleet.start()
        await fleet.daemon.until(lambda status: status.startswith("2 of 2 models ready"))
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.run())
            try:
                await trouble.make(lambda: enough(trouble.made, crowd.outcomes))
            finally:
                crowd.enough.set()
        await nothing_is_wrong(fleet)
    finally:
        await fleet.end(signal.SIGTERM)
        status, out, _ = await vllm_proxy(folder, "stop", "--all")
        print(out, end="")
    assert status == 0
    assert fleet.strays(set()) == []
    assert not list((folder / "run").glob("vp-*"))
    return {"faults": trouble.made, "outcomes": crowd.outcomes}
