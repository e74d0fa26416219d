"""Falling asleep and waking, of fabricated servers that answer well, wrongly or not at all."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.engine import virtual
from tests.harness import at_unix_socket
from vllm_proxy.domain.address import Address, TcpAddress, UnixAddress
from vllm_proxy.domain.canary import COMPLETIONS, EMBEDDINGS, Canary
from vllm_proxy.domain.command import Place
from vllm_proxy.engine.nap import Failed, HttpNap, Slept, Woke

TOKEN = {"choices": [{"text": " 5", "finish_reason": "length"}]}
VECTOR = {"data": [{"embedding": [0.6, -0.8, 0.0]}]}
AWAKE = Canary(COMPLETIONS, " 5")
SLEEP = "/sleep?level=1&mode=wait"
HANGS = "hangs"

type Answers = int | str | object  # a status, "hangs", or the JSON of a good answer


@dataclass
class Engine:
    """A server that sleeps as vLLM does, but for what `instead` says: by path with its query."""

    kind: str = COMPLETIONS  # the route that it has; "": neither
    instead: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    weights: bool = True  # mapped
    kv_cache: bool = True
    loaded: bool = True  # what is mapped is right

    def app(self) -> web.Application:
        """As a server."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        return app

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer secret"
        path, body = request.path_qs, await request.text()
        self.asked.append(path)
        answer = self._answer(path, json.loads(body) if body else {})
        given = self.instead.get(path, answer)
        if given is HANGS:
            await asyncio.Event().wait()
        if isinstance(given, int):
            return web.Response(status=given, text="Internal Server Error" * 100)
        return web.Response(text=given if isinstance(given, str) else json.dumps(given))

    def _answer(self, path: str, body: dict[str, Any]) -> Answers:
        match path:
            case "/sleep?level=1&mode=wait" | "/sleep?level=2&mode=wait":
                self.weights = self.kv_cache = False
                self.loaded = "level=1" in path
                return {"status": "sleeping", "level": 1 if self.loaded else 2}
            case "/wake_up" | "/wake_up?tags=weights" | "/wake_up?tags=kv_cache":
                self.weights |= "kv_cache" not in path
                self.kv_cache |= "weights" not in path
                return {"status": "awake" if self.weights and self.kv_cache else "sleeping", "tags": None}
            case "/collective_rpc":
                assert body == {"method": "reload_weights"}
                self.loaded = self.weights and path not in self.instead
                return {"results": [None]}
            case "/is_sleeping":
                return {"is_sleeping": not (self.weights and self.kv_cache)}
            case "/v1/completions" | "/v1/embeddings" if path == self.kind:
                assert body["model"] == "own"
                if not self.loaded:
                    return {"choices": [{"text": "!"}]} if path == COMPLETIONS else {"data": [{"embedding": [1, 1, 1]}]}
                return TOKEN if path == COMPLETIONS else VECTOR
        return 404


@dataclass
class Naps:
    """What is asked of one engine, and what was noted of it."""

    nap: HttpNap
    place: Place
    noted: list[Canary | None] = field(default_factory=list)

    async def sleep(self, level: int = 1, *, freed: bool | None = None) -> Slept | Failed:
        """Put it to sleep. `freed`: whether its memory comes back."""

        async def comes_back() -> bool | None:
            return freed

        return await self.nap.sleep(self.place, level, self.noted.append, comes_back)

    async def wake(self, level: int = 1, expected: Canary | None = AWAKE) -> Woke | Failed:
        """Wake it."""
        return await self.nap.wake(self.place, level, expected, 600)


@asynccontextmanager
async def naps(engine: Engine, at: Path | None = None) -> AsyncIterator[Naps]:
    """An engine at a port, or at a socket in a folder."""
    async with aiohttp.ClientSession(trust_env=False) as session:

        def made(address: Address) -> Naps:
            return Naps(HttpNap(session), Place("chat/0", "own", address, "secret", "/nowhere"))

        if at is not None:
            async with at_unix_socket(engine.app(), at / "s") as address:
                yield made(address)
            return
        async with TestServer(engine.app()) as server:
            assert server.port is not None
            yield made(TcpAddress("127.0.0.1", server.port))


# As it should be


@pytest.mark.parametrize("unix", [False, True])
async def test_level_1_sleeps_and_wakes_with_the_same_answer(tmp_path: Path, *, unix: bool) -> None:
    """At a port as at a Unix socket; the canary before, the state after each, the canary again."""
    engine = Engine()
    async with naps(engine, tmp_path if unix else None) as it:
        assert await it.sleep(1, freed=True) == Slept(AWAKE, measured=True)
        assert it.noted == [AWAKE]
        assert await it.nap.is_sleeping(it.place) is True
        assert await it.wake(1) == Woke(verified=True)
        assert await it.nap.is_sleeping(it.place) is False
    assert engine.asked == [
        COMPLETIONS, SLEEP, "/is_sleeping", "/is_sleeping", "/wake_up", "/is_sleeping", COMPLETIONS, "/is_sleeping",
    ]  # fmt: skip


async def test_level_2_loads_its_weights_before_it_is_awake(tmp_path: Path) -> None:
    """Weights are mapped, loaded, and only then the cache is mapped, with which vLLM takes requests again."""
    engine = Engine()
    async with naps(engine, tmp_path) as it:
        assert await it.sleep(2) == Slept(AWAKE, measured=False)
        del engine.asked[:]
        assert await it.wake(2) == Woke(verified=True)
    assert engine.asked == [
        "/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache", "/is_sleeping", COMPLETIONS,
    ]  # fmt: skip


async def test_the_answer_is_noted_before_it_sleeps(tmp_path: Path) -> None:
    """A daemon that dies meanwhile leaves on record what the next one has to know."""
    engine = Engine()
    async with naps(engine, tmp_path) as it:

        async def unmeasured() -> None:
            return None

        await it.nap.sleep(it.place, 1, lambda _: engine.asked.append("noted"), unmeasured)
    assert engine.asked[:3] == [COMPLETIONS, "noted", SLEEP]


async def test_an_embedding_is_compared_but_for_rounding(tmp_path: Path) -> None:
    """What another batch or another kernel rounds otherwise is the same; another direction is not."""
    engine = Engine(EMBEDDINGS)
    async with naps(engine, tmp_path) as it:
        slept = await it.sleep(2)
        assert isinstance(slept, Slept)
        assert slept.canary == Canary(EMBEDDINGS, vector=(0.6, -0.8, 0.0))
        engine.instead[EMBEDDINGS] = {"data": [{"embedding": [0.601, -0.799, 0.001]}]}
        assert await it.wake(2, slept.canary) == Woke(verified=True)
        engine.instead = {"/collective_rpc": {"results": [None]}}  # it says so, and loads nothing
        await it.sleep(2)
        assert await it.wake(2, slept.canary) == Failed(
            "wake", "it answered an embedding before it slept, and an embedding now"
        )


async def test_who_has_neither_route_sleeps_unverified(tmp_path: Path) -> None:
    """A reranker, say: the result says so, and that it woke is vLLM's word alone."""
    async with naps(Engine(""), tmp_path) as it:
        assert await it.sleep(freed=True) == Slept(None, measured=True)
        assert it.noted == [None]
        assert await it.wake(expected=None) == Woke(verified=False)


@pytest.mark.parametrize("status", [400, 404, 405, 422, 501])
async def test_a_route_that_is_not_for_its_model_is_no_fault(tmp_path: Path, status: int) -> None:
    """The other one is asked."""
    async with naps(Engine(EMBEDDINGS, {COMPLETIONS: status}), tmp_path) as it:
        slept = await it.sleep()
        assert isinstance(slept, Slept)
        assert slept.canary is not None
        assert slept.canary.route == EMBEDDINGS


# As it should not be

DAMAGED = (500, 503, "", "{", "null", "[]", "5", '"sleeping"', "{}", "[" * 100_000, '{"status": null}', " " * 2**21)


@pytest.mark.parametrize("wrong", [500, 404, 400, "", "{"])
async def test_a_sleep_that_is_not_answered_well_has_failed(tmp_path: Path, wrong: Answers) -> None:
    """A 500 may have freed all of its memory; a 404 says that nobody can put it to sleep."""
    engine = Engine(instead={SLEEP: wrong})
    async with naps(engine, tmp_path) as it:
        found = await it.sleep(freed=True)
    assert isinstance(found, Failed)
    assert found.operation == "sleep"
    assert found.message.startswith(f"cannot put the engine to sleep: {SLEEP}")
    assert engine.asked[-1] == SLEEP


@pytest.mark.parametrize("wrong", [{"is_sleeping": False}, {"is_sleeping": 1}, {"is_sleeping": "true"}, *DAMAGED])
async def test_a_sleeper_that_does_not_say_that_it_sleeps_has_failed(tmp_path: Path, wrong: Answers) -> None:
    """200 alone says nothing. To whoever asks later there is no answer either."""
    async with naps(Engine(instead={"/is_sleeping": wrong}), tmp_path) as it:
        found = await it.sleep(freed=True)
        assert isinstance(found, Failed)
        assert found.operation == "sleep"
        assert await it.nap.is_sleeping(it.place) is (False if wrong == {"is_sleeping": False} else None)


async def test_a_sleeper_whose_memory_does_not_come_back_has_failed(tmp_path: Path) -> None:
    """Whatever it says of itself."""
    async with naps(Engine(), tmp_path) as it:
        assert await it.sleep(freed=False) == Failed(
            "sleep", "it says that it sleeps, and its memory has not come back"
        )


@pytest.mark.parametrize("wrong", [500, 503, "{", "{}", {"choices": []}, {"choices": [{"text": 5}]}, TOKEN["choices"]])
async def test_who_answers_nonsense_awake_is_not_put_to_sleep(tmp_path: Path, wrong: Answers) -> None:
    """Nothing could be compared later: it is at fault now."""
    engine = Engine(instead={COMPLETIONS: wrong})
    async with naps(engine, tmp_path) as it:
        found = await it.sleep()
        assert isinstance(found, Failed)
        assert it.noted == []
    assert engine.asked == [COMPLETIONS]


@pytest.mark.parametrize("numbers", ["[]", "[0, 0]", "[NaN]", "[Infinity]", "[1e400]", "[true]", '["1"]', "null", "{}"])
async def test_an_embedding_that_is_none_is_nonsense(tmp_path: Path, numbers: str) -> None:
    """Zeros and NaN are what weights that are gone make."""
    engine = Engine(EMBEDDINGS, {EMBEDDINGS: f'{{"data": [{{"embedding": {numbers}}}]}}'})
    async with naps(engine, tmp_path) as it:
        assert isinstance(await it.sleep(), Failed)


@pytest.mark.parametrize("wrong", [{"status": "sleeping"}, {"status": True}, *DAMAGED])
async def test_a_wake_of_level_1_that_does_not_end_awake_has_failed(tmp_path: Path, wrong: Answers) -> None:
    """What is only half there stays so: nothing else is asked of it."""
    engine = Engine(instead={"/wake_up": wrong})
    async with naps(engine, tmp_path) as it:
        await it.sleep()
        found = await it.wake()
    assert isinstance(found, Failed)
    assert found.message.startswith("cannot wake the engine: /wake_up ")
    assert len(found.message) < 200
    assert engine.asked[-1] == "/wake_up"


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("/wake_up?tags=weights", {"status": "awake"}),  # it thinks that nothing was gone
        ("/wake_up?tags=kv_cache", {"status": "sleeping"}),
        ("/collective_rpc", {"results": None}),
        *(
            (path, wrong)
            for path in ("/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache")
            for wrong in DAMAGED
        ),
    ],
)
async def test_each_step_of_a_wake_of_level_2_is_checked(tmp_path: Path, path: str, wrong: Answers) -> None:
    """Awake too early, or asleep at the end, is as bad as no answer; the step behind it is not tried."""
    engine = Engine(instead={path: wrong})
    async with naps(engine, tmp_path) as it:
        await it.sleep(2)
        found = await it.wake(2)
    assert isinstance(found, Failed)
    assert engine.asked[-1] == path


@pytest.mark.parametrize("level", [1, 2])
async def test_who_says_that_it_is_awake_and_asleep_has_failed(tmp_path: Path, level: int) -> None:
    """Its scheduler is paused: requests would hang."""
    engine = Engine(instead={"/is_sleeping": {"is_sleeping": True}})
    async with naps(engine, tmp_path) as it:
        await it.sleep(level)
        assert await it.wake(level) == Failed("wake", "it says that it is asleep afterwards")


async def test_weights_that_were_not_loaded_are_noticed(tmp_path: Path) -> None:
    """All calls answer as they should, and the token is another one."""
    async with naps(Engine(instead={"/collective_rpc": {"results": [None]}}), tmp_path) as it:
        await it.sleep(2)
        assert await it.wake(2) == Failed("wake", 'it answered " 5" before it slept, and "!" now')


@pytest.mark.parametrize("wrong", [404, 500, "{", {"choices": []}])
async def test_who_does_not_answer_as_before_has_failed(tmp_path: Path, wrong: Answers) -> None:
    """A route that is not there any more is no excuse."""
    engine = Engine()
    async with naps(engine, tmp_path) as it:
        await it.sleep()
        engine.instead[COMPLETIONS] = wrong
        assert isinstance(await it.wake(), Failed)


async def test_the_answer_decides_about_who_was_to_sleep_and_is_awake(tmp_path: Path) -> None:
    """It never slept, or it lies: what it answers tells. Where it cannot be asked, nobody knows."""
    engine = Engine()
    async with naps(engine, tmp_path) as it:
        assert await it.nap.verify(it.place, AWAKE) == Woke(verified=True)
        assert isinstance(await it.nap.verify(it.place, None), Failed)
        engine.loaded = False
        assert isinstance(await it.nap.verify(it.place, AWAKE), Failed)


async def test_nobody_there_has_failed(tmp_path: Path) -> None:
    """It died: the connection is refused."""
    async with aiohttp.ClientSession() as session:
        place = Place("chat/0", "own", UnixAddress(f"{tmp_path}/nobody"), "secret", "/nowhere")
        it = Naps(HttpNap(session), place)
        assert await it.nap.is_sleeping(place) is None
        assert isinstance(await it.sleep(), Failed)
        found = await it.wake()
        assert isinstance(found, Failed)
        assert "secret" not in found.message


@pytest.mark.parametrize("path", [SLEEP, "/wake_up"])
async def test_who_dies_meanwhile_has_failed(tmp_path: Path, path: str) -> None:
    """Its connection ends without an answer, which is noticed at once."""
    engine = Engine()

    @web.middleware
    async def dies(request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        if request.path_qs == path:
            assert request.transport is not None
            request.transport.abort()
        answer: web.StreamResponse = await handler(request)
        return answer

    app = engine.app()
    app.middlewares.append(dies)
    async with aiohttp.ClientSession() as session, at_unix_socket(app, tmp_path / "s") as address:
        it = Naps(HttpNap(session), Place("chat/0", "own", address, "secret", "/nowhere"))
        found = await (it.sleep() if path == SLEEP else it.wake())
    assert isinstance(found, Failed)
    assert path in found.why


# Who does not answer


@pytest.mark.parametrize(
    ("path", "level", "seconds"),
    [(COMPLETIONS, 1, 30), (SLEEP, 1, 60), ("/sleep?level=2&mode=wait", 2, 60), ("/is_sleeping", 1, 5)],
)
@virtual.virtual
async def test_who_hangs_falling_asleep_is_given_up(tmp_path: Path, path: str, level: int, seconds: float) -> None:
    """After so long, and no later."""
    async with naps(Engine(instead={path: HANGS}), tmp_path) as it:
        began = virtual.now()
        assert await it.sleep(level) == Failed("sleep", f"{path} has not answered for {seconds} s")
        assert virtual.now() - began == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize(
    ("path", "level", "seconds"),
    [
        ("/wake_up", 1, 60),
        ("/wake_up?tags=weights", 2, 60),
        ("/collective_rpc", 2, 600),
        ("/wake_up?tags=kv_cache", 2, 60),
        ("/is_sleeping", 1, 5),
        (COMPLETIONS, 1, 30),
        (COMPLETIONS, 2, 30),
    ],
)
@virtual.virtual
async def test_who_hangs_waking_is_given_up(tmp_path: Path, path: str, level: int, seconds: float) -> None:
    """After so long, and no later."""
    engine = Engine()
    async with naps(engine, tmp_path) as it:
        await it.sleep(level)
        engine.instead[path] = HANGS
        began = virtual.now()
        assert await it.wake(level) == Failed("wake", f"{path} has not answered for {seconds} s")
        assert virtual.now() - began == pytest.approx(seconds, abs=0.1)


@virtual.virtual
async def test_who_is_stopped_meanwhile_leaves_no_call_behind(tmp_path: Path) -> None:
    """The call ends with whoever made it."""
    async with naps(Engine(instead={SLEEP: HANGS}), tmp_path) as it:
        sleeping = asyncio.create_task(it.sleep())
        await virtual.passes(1)
        sleeping.cancel()
        await virtual.passes(0.1)
        assert sleeping.cancelled()
        assert not [task for task in asyncio.all_tasks() if "a call of" in task.get_name()]
