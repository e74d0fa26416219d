"""An engine is ended when nothing of it is left: tried again, told once a change, given up by a daemon that stops."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

from structlog.testing import capture_logs

from tests.engine.virtual import now, passes, virtual
from vllm_proxy.engine.ending import LAST_TRIES_SECONDS, until_ended
from vllm_proxy.engine.state import EngineRecord

RECORD = EngineRecord("chat/0", "engine-1", 4242, 1, "127.0.0.1:8001", "secret", "/nowhere", "")


class Owner:
    """Who runs the engine, and what it heard."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def stop_timeout(self) -> float:
        """Seconds between SIGTERM and SIGKILL."""
        return 30

    def waits_for_port(self, why: str | None) -> None:
        """The start waits."""
        self.heard.append(f"waits: {why}")

    def not_ended(self, why: str) -> None:
        """The engine could not be ended."""
        self.heard.append(why)

    def gone(self) -> None:
        """None of its processes lives."""

    def ended(self) -> None:
        """Nothing is left of it."""
        self.heard.append("ended")


class Engine:
    """One whose tries end as a test says, the last of them again and again; None: it is gone."""

    def __init__(self, *outcomes: str | None, seconds: float = 0) -> None:
        self.outcomes: Sequence[str | None] = outcomes
        self.seconds = seconds
        self.tries: list[tuple[float, float]] = []  # when, and how long after SIGTERM SIGKILL comes

    async def end(self, grace: float) -> str | None:
        """Why some of it is left."""
        self.tries.append((now(), grace))
        await asyncio.sleep(self.seconds)
        return self.outcomes[min(len(self.tries), len(self.outcomes)) - 1]


@virtual
async def test_an_end_is_tried_again_without_end_with_growing_pauses() -> None:
    """Up to a minute between two tries, for hours; only the first one waits between SIGTERM and SIGKILL."""
    engine, owner = Engine(*["not ours"] * 100, None), Owner()
    with capture_logs():
        assert await until_ended(RECORD, engine.end, owner, asyncio.Event())
    times = [when for when, _ in engine.tries]
    pauses = [after - before for before, after in pairwise(times)]
    assert pauses == [1, 2, 4, 8, 16, 32, *[60] * 94]
    assert [grace for _, grace in engine.tries] == [30] + [0] * 100


@virtual
async def test_what_could_not_be_ended_is_told_once_a_change_and_goes_on_by_itself() -> None:
    """Neither the log nor the owner hears of every round."""
    engine, owner = Engine(*["not ours"] * 9, *["survives"] * 9, None), Owner()
    with capture_logs() as logs:
        assert await until_ended(RECORD, engine.end, owner, asyncio.Event())
    assert owner.heard == ["not ours", "survives", "ended"]
    assert [entry["event"] for entry in logs] == ["an engine cannot be ended"] * 2 + ["the engine is ended at last"]


@virtual
async def test_a_daemon_that_stops_tries_for_a_few_seconds_more_and_gives_up() -> None:
    """Also where it has waited for a while already; the owner never hears that the engine has ended."""
    engine, owner, stopping = Engine("not ours"), Owner(), asyncio.Event()
    with capture_logs() as logs:
        ending = asyncio.create_task(until_ended(RECORD, engine.end, owner, stopping))
        await passes(1000)
        before = len(engine.tries)
        stopping.set()
        assert not await ending
    assert now() <= 1000 + LAST_TRIES_SECONDS + 1
    assert len(engine.tries) > before
    assert owner.heard == ["not ours"]
    assert logs[-1]["event"] == "an engine is left to the next daemon: it cannot be ended"


@virtual
async def test_a_try_that_hangs_does_not_hold_a_daemon_that_stops() -> None:
    """One whole try it gets; what comes after is cut."""
    engine, owner, stopping = Engine("survives", seconds=45), Owner(), asyncio.Event()
    stopping.set()
    with capture_logs():
        assert not await until_ended(RECORD, engine.end, owner, stopping)
    assert now() == 45 + LAST_TRIES_SECONDS
