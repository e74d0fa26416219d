"""A request whose key is taken away at any moment of its answer: what its client sees, and what its engine does."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.harness import connected, request
from tests.traffic.test_fan_out import PATH, Behaviour, Fleet, fleet, says
from vllm_proxy.domain.keys import ALL, Key
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.keyring import Caller
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.relay import forward

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"a\r\ndata: {}\n\n\r\n"
REVOKED = RequestError("model_not_found", "it may not have this any more")


class Engine:
    """An engine that answers a part at a time, as it is told."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.writer: asyncio.StreamWriter | None = None

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        await reader.readuntil(b"\r\n\r\n")
        self.writer = writer
        self.asked.set()
        await reader.read()

    async def say(self, data: bytes) -> None:
        """A part of the answer."""
        assert self.writer is not None
        self.writer.write(data)
        await self.writer.drain()


def forwards(call: Call, registry: Registry) -> Any:  # noqa: ANN401 - a coroutine
    """The request goes to the model a."""
    return forward(call, registry, registry.find("a"), b"")


def revoke(found: Fleet) -> None:
    """Take away what the running request was let in for."""
    admission = found.client.in_progress
    assert admission is not None
    found.client.revoke(admission, REVOKED)


@pytest.mark.parametrize("work", [forwards, None])
async def test_an_answer_does_not_begin_once_its_key_is_gone(work: Callable[[Call, Registry], Any] | None) -> None:
    """Also where it comes before the request's own task knows: the client gets the refusal, and no piece of both."""
    engine = Engine()
    async with fleet({"a": engine}, work=work) as found, connected(found.port) as client:
        await client.send(request(PATH, b"", method="GET"))
        await engine.asked.wait()
        await asyncio.sleep(0)
        assert engine.writer is not None
        feed = _engine_side(found)
        revoke(found)
        feed(HEAD + EVENT)  # as the event loop does with what came in the same turn
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (404, "model_not_found")
        await found.gone["a"].wait()
        await client.send(request("/nowhere", b"", method="GET"))  # the connection goes on
        assert (await client.answer()).status == 404
        (call,) = found.calls
        assert call.status == 404


def _engine_side(found: Fleet) -> Callable[[bytes], None]:
    """Gives bytes to the daemon's connection to the only engine."""
    (endpoint,) = found.registry.find("a").endpoints
    (connection,) = endpoint.pool._busy
    return connection.data_received


@pytest.mark.parametrize("work", [forwards, None])
async def test_an_answer_that_has_begun_ends_with_an_error_event(
    work: Callable[[Call, Registry], Any] | None,
) -> None:
    """Whoever revokes knows of which model it is."""
    engine = Engine()
    others: dict[str, Behaviour] = {} if work is forwards else {"b": says(404)}
    async with fleet({"a": engine, **others}, work=work) as found, connected(found.port) as client:
        await client.send(request(PATH, b"", method="GET"))
        await engine.asked.wait()
        await engine.say(HEAD + EVENT)
        await client.peek(EVENT)
        admission = found.client.in_progress
        assert admission is not None
        assert admission.model == "a"
        revoke(found)
        answer = await client.answer()
        assert answer.whole
        assert b"model_not_found" in answer.body
        assert b"[DONE]" not in answer.body


async def test_an_answer_of_a_model_that_a_key_may_not_use_any_more_is_not_there() -> None:
    """Of a stored response nobody knows the model before an instance answers: what the key may use then counts."""
    engine = Engine()
    async with fleet({"a": engine, "b": says(404)}) as found, connected(found.port) as client:
        await client.send(request(PATH, b"", method="GET"))
        await engine.asked.wait()
        admission = found.client.in_progress
        assert admission is not None
        admission.caller = Caller(Key("ci", (), ALL, ("b",)), b"", frozenset({"b"}))
        await engine.say(b"HTTP/1.1 200 X\r\nContent-Length: 2\r\n\r\n{}")
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (404, "not_found")


async def test_one_request_that_cannot_be_ended_does_not_save_the_others() -> None:
    """A fault of the daemon is logged, and every other connection is looked at."""
    engine = Engine()
    async with fleet({"a": engine}, work=forwards) as found:
        server: Any = found.runner.server
        asked: list[object] = []

        def refusal_of(admission: object, _client: object) -> None:
            asked.append(admission)
            raise ZeroDivisionError

        server._refusal_of = refusal_of
        async with connected(found.port) as one, connected(found.port) as two:
            for client in (one, two):
                engine.asked.clear()
                await client.send(request(PATH, b"", method="GET"))
                await engine.asked.wait()
            found.runner.revoke()
        assert len(asked) == 2
