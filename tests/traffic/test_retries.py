"""How often a request is sent where engines close without an answer, in this process: a race, or what kills engines."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from tests.harness import Answer, connected, request
from tests.traffic.test_fan_out import PATH, Fleet, fleet
from vllm_proxy.traffic import relay
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.fan_out import fan_out
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.relay import forward


class Engine:
    """Answers, until `closes` says of a connection's requests, counted from 1, from which one on it does not."""

    def __init__(self, together: asyncio.Barrier) -> None:
        self.closes = 1000
        self.got: list[int] = []  # of each request, which one of its connection it was
        self._together = together

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        number = 0
        while await reader.read(1):
            await reader.readuntil(b"\r\n\r\n")
            number += 1
            self.got.append(number)
            if number >= self.closes:
                return
            if self.closes == 1000:
                await self._together.wait()
            writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 2\r\n\r\n{}")


async def ask(found: Fleet) -> Answer:
    """The answer to one request."""
    async with connected(found.port) as client:
        await client.send(request(PATH, b"", method="GET"))
        return await client.answer()


@asynccontextmanager
async def kept_alive(count: int, connections: int, work: Any = None) -> AsyncIterator[tuple[Fleet, list[Engine]]]:  # noqa: ANN401 - as `fleet`
    """A model of so many instances, with so many idle connections in all."""
    together = asyncio.Barrier(connections)
    engines = [Engine(together) for _ in range(count)]

    async def sent(call: Call, registry: Registry) -> web.StreamResponse:
        return await forward(call, registry, registry.find("chat"), b"")

    async with fleet({f"chat/{at}": engine for at, engine in enumerate(engines)}, work=work or sent) as found:
        for answer in await asyncio.gather(*(ask(found) for _ in range(connections))):
            assert answer.status == 200
        assert sum(len(engine.got) for engine in engines) == connections
        for engine in engines:
            engine.got.clear()
        yield found, engines


def closing(engines: list[Engine], number: int) -> None:
    """They close from this request of a connection on."""
    for engine in engines:
        engine.closes = number


async def test_idle_connections_that_end_as_they_are_used_cost_no_request() -> None:
    """However many instances have closed theirs: the second one that is asked gets it on a fresh connection."""
    async with kept_alive(4, 4) as (found, engines):
        closing(engines, 2)
        assert (await ask(found)).status == 200
        assert sorted(engine.got for engine in engines) == [[], [], [1], [2]]


async def test_the_only_instance_is_asked_again_on_a_fresh_connection() -> None:
    """And not on the next idle one, which may have ended too."""
    async with kept_alive(1, 3) as (found, engines):
        closing(engines, 2)
        assert (await ask(found)).status == 200
        assert [engine.got for engine in engines] == [[2, 1]]


@pytest.mark.parametrize("connections", [2, 8])
async def test_what_kills_engines_reaches_two_of_them(connections: int) -> None:
    """Whether or not there were idle connections to all of them."""
    async with kept_alive(4, connections) as (found, engines):
        closing(engines, 1)
        answer = await ask(found)
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (502, "engine_failed")
        assert sorted(len(engine.got) for engine in engines) == [0, 0, 1, 1]


@pytest.mark.parametrize(("count", "got"), [(1, [1]), (4, [0, 0, 1, 1])])
async def test_a_used_connection_that_ends_later_was_no_idle_one(
    monkeypatch: pytest.MonkeyPatch, count: int, got: list[int]
) -> None:
    """Its engine had the request: that goes to another one, and never to the same again."""
    monkeypatch.setattr(relay, "_RACE_SECONDS", 0.0)
    async with kept_alive(count, 4) as (found, engines):
        closing(engines, 2)
        assert (await ask(found)).status == (502 if count == 1 else 200)
        assert sorted(len(engine.got) for engine in engines) == got


async def test_a_question_to_all_instances_reaches_each_twice_at_most() -> None:
    """However many idle connections there are: once more, on a fresh one."""

    async def asked(call: Call, registry: Registry) -> web.StreamResponse:
        return await fan_out(call, registry, b"", 60.0)

    async with kept_alive(1, 3, asked) as (found, engines):
        closing(engines, 2)
        assert (await ask(found)).status == 200
        assert [engine.got for engine in engines] == [[2, 1]]
        closing(engines, 1)
        assert (await ask(found)).status == 502
        assert [engine.got for engine in engines] == [[2, 1, 2, 1]]
