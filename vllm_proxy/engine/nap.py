"""Puts an engine to sleep and wakes it, each step verified. The engine takes no requests of clients meanwhile.

vLLM's own word is worth little: a failed `/sleep` leaves an engine that says it is awake over memory that is gone, a
failed `/wake_up` one that is half there for good, and a wake of level 2 without its weights answers 200 with nonsense.
So nothing but clean answers throughout counts as done; anything else is `Failed`, and whoever gets that ends the engine
(tests/engine/test_nap.py). Source: `entrypoints/serve/dev/sleep` and `v1/engine/core.py` of vLLM 0.32.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal, Protocol

import aiohttp

from vllm_proxy.domain import canary
from vllm_proxy.domain.canary import Canary
from vllm_proxy.domain.command import Place
from vllm_proxy.engine.http_client import UncleanError, answer_to, json_of, within

SLEEP_SECONDS = WAKE_SECONDS = 60.0
CANARY_SECONDS = 30.0
STATE_SECONDS = 5.0  # for `/is_sleeping`
# What a model of another kind answers on a route: it is not there, or not for such a model.
_NOT_OFFERED = frozenset({400, 404, 405, 422, 501})

type Operation = Literal["sleep", "wake"]
type Noted = Callable[[Canary | None], None]
type Freed = Callable[[], Awaitable[bool | None]]


@dataclass(frozen=True, slots=True)
class Slept:
    """It sleeps. `canary`: what it said before, None where it has no route to be asked on."""

    canary: Canary | None
    measured: bool  # whether its memory was seen to come back; else vLLM's word is all there is


@dataclass(frozen=True, slots=True)
class Woke:
    """It serves again. `verified`: it answers as before it slept; else it has no route to be asked on."""

    verified: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """Nobody knows what it has of its memory and its weights: it has to be ended."""

    operation: Operation
    why: str

    @property
    def message(self) -> str:
        """For people."""
        what = "put the engine to sleep" if self.operation == "sleep" else "wake the engine"
        return f"cannot {what}: {self.why}"


class Nap(Protocol):
    """Sleep of engines."""

    async def sleep(self, place: Place, level: int, note: Noted, freed: Freed) -> Slept | Failed:
        """Put one to sleep that is drained.

        `note`: called before it is asked to, with what it answers while it is awake, so that this goes on record.
        `freed`: whether its memory has come back, None where that cannot be measured.
        """

    async def wake(self, place: Place, level: int, expected: Canary | None, reload_seconds: float) -> Woke | Failed:
        """Wake one that sleeps at this level.

        `expected`: what it answered before. `reload_seconds`: how long it may take to load its weights again.
        """

    async def is_sleeping(self, place: Place) -> bool | None:
        """Whether one says that it sleeps; None: it gives no clean answer."""

    async def verify(self, place: Place, expected: Canary | None) -> Woke | Failed:
        """Whether one serves that says it is awake, though it was to sleep; where nobody can tell, it has failed."""


class HttpNap:
    """Over HTTP, at the engine's port or Unix socket. The session must not share its connections with requests."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def sleep(self, place: Place, level: int, note: Noted, freed: Freed) -> Slept | Failed:
        """Ask for the canary, then `POST /sleep`: 200, it says that it sleeps, and its memory has come back."""
        try:
            before = await self._canary(place)
            note(before)
            await self._ask(
                place, "POST", f"/sleep?level={level}&mode=wait", SLEEP_SECONDS
            )  # mode: a body's is ignored
            await self._expect_state(place, sleeping=True)
        except UncleanError as error:
            return Failed("sleep", str(error))
        measured = await freed()
        if measured is False:
            return Failed("sleep", "it says that it sleeps, and its memory has not come back")
        return Slept(before, measured is not None)

    async def wake(self, place: Place, level: int, expected: Canary | None, reload_seconds: float) -> Woke | Failed:
        """Level 1: `/wake_up`. Level 2: map the weights, load them, then the KV cache: only then may it be awake."""
        try:
            if level == 1:
                await self._wake_up(place, "", "awake")
            else:
                await self._wake_up(place, "?tags=weights", "sleeping")
                await self._reload(place, reload_seconds)
                await self._wake_up(place, "?tags=kv_cache", "awake")
            await self._expect_state(place, sleeping=False)
            await self._expect_canary(place, expected)
        except UncleanError as error:
            return Failed("wake", str(error))
        return Woke(expected is not None)

    async def is_sleeping(self, place: Place) -> bool | None:
        """What `GET /is_sleeping` says."""
        try:
            return await self._state(place)
        except UncleanError:
            return None

    async def verify(self, place: Place, expected: Canary | None) -> Woke | Failed:
        """Ask for the canary."""
        if expected is None:
            return Failed("wake", "it was to sleep, and whether it serves cannot be told")
        try:
            await self._expect_canary(place, expected)
        except UncleanError as error:
            return Failed("wake", str(error))
        return Woke(verified=True)

    async def _wake_up(self, place: Place, query: str, status: str) -> None:
        path = f"/wake_up{query}"
        found = await self._ask(place, "POST", path, WAKE_SECONDS)
        if not isinstance(found, dict) or found.get("status") != status:
            said = found.get("status") if isinstance(found, dict) else None
            raise UncleanError(f"{path} should leave it {status}, and it says {_shown(said)}")

    async def _reload(self, place: Place, seconds: float) -> None:
        path = "/collective_rpc"
        found = await self._ask(place, "POST", path, seconds, {"method": "reload_weights"})
        if not isinstance(found, dict) or not isinstance(found.get("results"), list):
            raise UncleanError(f"{path} says nothing of its weights")

    async def _expect_state(self, place: Place, *, sleeping: bool) -> None:
        if await self._state(place) is not sleeping:
            raise UncleanError(f"it says that it is {'awake' if sleeping else 'asleep'} afterwards")

    async def _state(self, place: Place) -> bool:
        found = await self._ask(place, "GET", "/is_sleeping", STATE_SECONDS)
        state = found.get("is_sleeping") if isinstance(found, dict) else None
        if not isinstance(state, bool):
            raise UncleanError("/is_sleeping does not say whether it sleeps")
        return state

    async def _expect_canary(self, place: Place, expected: Canary | None) -> None:
        if expected is None:
            return
        found = await self._answer_on(expected.route, place)
        if found is None:
            raise UncleanError(f"{expected.route} is not there any more")
        if not found.is_like(expected):
            raise UncleanError(f"it answered {expected.shown} before it slept, and {found.shown} now")

    async def _canary(self, place: Place) -> Canary | None:
        """What it answers now; None where it has no route for that."""
        return await self._answer_on(canary.COMPLETIONS, place) or await self._answer_on(canary.EMBEDDINGS, place)

    async def _answer_on(self, route: str, place: Place) -> Canary | None:
        """None where the model has no such route, or the route refuses the question."""
        status, found = await self._call(place, "POST", route, CANARY_SECONDS, canary.question(route, place.own_name))
        if status in _NOT_OFFERED:
            return None
        if status != HTTPStatus.OK:
            raise UncleanError(f"{route} answers {status}")
        try:
            return canary.read_answer(route, found)
        except ValueError as error:
            raise UncleanError(f"{route}: {error}") from error

    async def _ask(
        self, place: Place, method: str, path: str, seconds: float, body: dict[str, object] | None = None
    ) -> object:
        """The JSON of a good answer."""
        status, found = await self._call(place, method, path, seconds, body)
        if status != HTTPStatus.OK:
            raise UncleanError(f"{path} answers {status}")
        return found

    async def _call(
        self, place: Place, method: str, path: str, seconds: float, body: dict[str, object] | None
    ) -> tuple[int, object]:
        """Status and JSON of an answer; of another status than 200 it is not read."""

        async def call() -> tuple[int, object]:
            async with answer_to(
                self._session, place.address, method, path, credential=place.credential, body=body
            ) as answer:
                good = answer.status == HTTPStatus.OK
                return answer.status, await json_of(answer) if good else None

        return await within(call(), seconds, path)


def _shown(said: object) -> str:
    return repr(said)[:80]
