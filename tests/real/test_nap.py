"""A real engine that may sleep: at a socket of its own, and the same after each of many naps at both levels.

On a processor vLLM's routes pause it truly, and free nothing; level 2 loads its weights again all the same.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.harness import Daemon
from tests.real.sleepers import answer, record_of, under_daemon
from vllm_proxy.domain.address import UnixAddress, parse_address
from vllm_proxy.domain.canary import COMPLETIONS, Canary
from vllm_proxy.domain.command import Place
from vllm_proxy.engine.nap import HttpNap, Slept, Woke

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

LOAD_SECONDS = 600.0
MODEL = "two"
ASK = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 24, "temperature": 0}


@dataclass
class Sleeper:
    """The engine, beside its daemon."""

    running: Daemon
    place: Place
    nap: HttpNap
    canary: Canary | None = None

    async def sleep(self, level: int) -> None:
        """It falls asleep, and its answer is noted."""
        slept = await self.nap.sleep(self.place, level, self._note, _unmeasured)
        assert slept == Slept(self.canary, measured=False)

    def _note(self, canary: Canary | None) -> None:
        self.canary = canary

    async def wake(self, level: int) -> None:
        """It wakes, and answers as before."""
        assert await self.nap.wake(self.place, level, self.canary, LOAD_SECONDS) == Woke(verified=True)

    async def answers(self) -> str:
        """What a client gets."""
        return await answer(self.running, MODEL)


async def _unmeasured() -> None:
    return None


@pytest.fixture(scope="module")
async def sleeper(sleepers: Path) -> AsyncIterator[Sleeper]:
    """One engine for all; its daemon is not told of its naps."""
    async with under_daemon(sleepers) as running:
        assert await answer(running, MODEL)
        record = record_of(running, MODEL)
        address = parse_address(record["address"])
        place = Place(f"{MODEL}/0", record["own_name"], address, record["credential"], record["folder"])
        async with aiohttp.ClientSession(trust_env=False) as session:
            yield Sleeper(running, place, HttpNap(session))


async def test_it_is_reached_by_the_daemon_alone(sleeper: Sleeper) -> None:
    """At a socket in a folder of the daemon's user; clients come to it by the daemon, and to none of these routes."""
    instance = await sleeper.running.instance(MODEL)
    assert (instance["state"], instance["port"]) == ("ready", None)
    assert sleeper.place.address == UnixAddress(f"{sleeper.place.folder}/http.sock")
    assert Path(sleeper.place.folder).stat().st_mode & 0o777 == 0o700
    assert await sleeper.answers()
    for method, path in (
        ("POST", "/sleep"),
        ("POST", "/wake_up"),
        ("GET", "/is_sleeping"),
        ("POST", "/collective_rpc"),
    ):
        async with sleeper.running.session.request(method, path) as answer:
            assert answer.status in {404, 405}
    assert await sleeper.nap.is_sleeping(sleeper.place) is False


async def test_it_says_the_same_after_twenty_naps(sleeper: Sleeper) -> None:
    """Ten at each level, in turn: a whole greedy answer to a client, not its first token alone."""
    before = await sleeper.answers()
    for level in [1, 2] * 10:
        await sleeper.sleep(level)
        assert await sleeper.nap.is_sleeping(sleeper.place) is True
        await sleeper.wake(level)
        assert await sleeper.answers() == before
    assert sleeper.canary is not None
    assert sleeper.canary.route == COMPLETIONS


async def test_a_request_in_flight_is_answered_whole_before_it_sleeps(sleeper: Sleeper) -> None:
    """One that comes while it sleeps waits in the engine, is no error, and is answered once it woke."""
    before = await sleeper.answers()
    async with sleeper.running.session.post("/v1/completions", json={**ASK, "stream": True}) as stream:
        await stream.content.readline()  # it runs
        await sleeper.sleep(1)
        assert b"[DONE]" in await stream.content.read()
    late = asyncio.create_task(sleeper.answers())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await asyncio.shield(late)
    await sleeper.wake(1)
    assert await late == before


async def test_what_an_earlier_daemon_began_to_wake_wakes(sleeper: Sleeper) -> None:
    """It was killed behind the first of three calls: the engine still says that it sleeps, and all three are made."""
    before = await sleeper.answers()
    await sleeper.sleep(2)
    assert isinstance(sleeper.place.address, UnixAddress)
    connector = aiohttp.UnixConnector(sleeper.place.address.path)
    async with (
        aiohttp.ClientSession("http://localhost", connector=connector) as session,
        session.post("/wake_up?tags=weights") as answer,
    ):
        assert await answer.json() == {"status": "sleeping", "tags": ["weights"]}
    assert await sleeper.nap.is_sleeping(sleeper.place) is True
    await sleeper.wake(2)
    assert await sleeper.answers() == before


async def test_the_answer_of_one_that_never_slept_decides(sleeper: Sleeper) -> None:
    """It was to sleep, and its daemon was killed before it said so."""
    await sleeper.sleep(1)
    await sleeper.wake(1)
    assert await sleeper.nap.verify(sleeper.place, sleeper.canary) == Woke(verified=True)
