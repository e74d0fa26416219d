"""Adapters of an engine, of a fabricated server that answers as vLLM 0.32 does, wrongly or not at all."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.harness import at_unix_socket
from vllm_proxy.domain.address import Address, TcpAddress
from vllm_proxy.domain.command import Place
from vllm_proxy.engine import adapters
from vllm_proxy.engine.adapters import Failed, HttpAdapters

LOAD, UNLOAD, LIST = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"
A, B = Path("/state/adapters/aaaa"), Path("/state/adapters/bbbb")
HANGS = "hangs"
WORKER, ABOVE = (
    "Call to add_lora method failed: Worker failed with error ",
    ", please check the stack trace above for the root cause",
)
# What is no answer of vLLM's, whatever was asked.
DAMAGED = (
    (200, ""), (200, "{}"), (200, "nonsense"), (500, ""), (500, "Internal Server Error"), (500, "[" * 100_000),
    (404, "{}"), (404, '{"detail":"Not Found"}'), (401, '{"error":"Unauthorized"}'),
    (400, '{"error":{"message":null}}'), (302, ""), (500, " " * 2**21),
    (500, '{"error":{"message":"EngineCore encountered an issue."}}'),
    (500, '{"error":{"message":"EngineCore encountered an issue%s"}}' % (" x" * 10_000)),
)  # fmt: skip


@dataclass
class Engine:
    """A server that holds adapters as vLLM does, but for what `instead` says: status and text, by path."""

    instead: dict[str, Any] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    in_pieces: bool = False  # each letter of an answer comes by itself

    def app(self) -> web.Application:
        """As a server."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        return app

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer secret"
        path, body = request.path_qs, await request.text()
        self.asked.append(path)
        given = self.instead.get(path)
        if given is HANGS:
            await asyncio.Event().wait()
        status, text = given if given is not None else self._answer(path, json.loads(body) if body else {})
        if self.in_pieces:
            answer = web.StreamResponse(status=status)
            await answer.prepare(request)
            for letter in text:
                await answer.write(letter.encode())
                for _ in range(5):  # turns of the loop in which it is read by itself
                    await asyncio.sleep(0)
            return answer
        return web.Response(status=status, text=text, headers={"Location": "/elsewhere"} if status == 302 else None)

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        name = body.get("lora_name", "")
        if path == LOAD:
            if name in self.held:
                return error(400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter")
            self.held[name] = body["lora_path"]
            return 200, f"Success: LoRA adapter '{name}' added successfully."
        if path == UNLOAD:
            if self.held.pop(name, None) is None:
                return error(404, f"The lora adapter '{name}' cannot be found.")
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        cards: list[dict[str, object]] = [
            {"id": "chat", "root": "org/chat", "parent": None},
            {"id": "own", "root": "x"},
        ]
        return 200, json.dumps(
            {"data": cards + [{"id": name, "root": root, "parent": "chat"} for name, root in self.held.items()]}
        )


def error(status: int, message: str) -> tuple[int, str]:
    """One of vLLM's."""
    return status, json.dumps({"error": {"message": message, "type": "x", "param": None, "code": status}})


@asynccontextmanager
async def engine(it: Engine, at: Path | None = None) -> AsyncIterator[tuple[HttpAdapters, Place]]:
    """An engine at a port, or at a socket in a folder."""
    async with aiohttp.ClientSession(trust_env=False) as session:

        def place(address: Address) -> Place:
            return Place("chat/0", "own", address, "secret", "/nowhere")

        if at is not None:
            async with at_unix_socket(it.app(), at / "s") as address:
                yield HttpAdapters(session), place(address)
            return
        async with TestServer(it.app()) as server:
            assert server.port is not None
            yield HttpAdapters(session), place(TcpAddress("127.0.0.1", server.port))


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("unix", [False, True])
async def test_adapters_are_loaded_listed_and_unloaded(tmp_path: Path, *, unix: bool, in_pieces: bool) -> None:
    """At a port as at a Unix socket, however answers come; the base itself and the engine's own name are none."""
    async with engine(Engine(in_pieces=in_pieces), tmp_path if unix else None) as (it, place):
        assert await it.load(place, "support", A) is None
        assert await it.load(place, "team/de", B) is None
        assert await it.loaded(place) == {"support": A, "team/de": B}
        assert await it.unload(place, "support") is None
        assert await it.loaded(place) == {"team/de": B}


async def test_what_is_done_already_is_done() -> None:
    """One that is held from that very folder is loaded, one that is not held is unloaded; another folder is refused."""
    async with engine(Engine()) as (it, place):
        assert await it.load(place, "support", A) is None
        assert await it.load(place, "support", A) is None
        refused = await it.load(place, "support", B)
        assert refused is not None
        assert refused.answered
        assert "already been loaded" in refused.why
        assert await it.loaded(place) == {"support": A}
        assert await it.unload(place, "support") is None
        assert await it.unload(place, "support") is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("LoRA rank 64 is greater than max_lora_rank 8.",) * 2,
        ("Call to add_lora method failed: LoRA rank 64 is too much", "LoRA rank 64 is too much"),
        (
            f"{WORKER}'While loading /state/adapters/aaaa, expected target modules in {{'q_proj'}}'{ABOVE}",
            "While loading support, expected target modules in {'q_proj'}",
        ),
        (
            "Loading lora support failed: No adapter found for <path>",
            "Loading lora support failed: No adapter found for support",
        ),
        ("x" * 5000, "x" * 500 + "…"),
    ],
)
async def test_a_refusal_is_told_in_the_words_of_vllm(said: str, told: str) -> None:
    """Without the way that it came, bounded, and with the adapter's name for the folder that nobody knows."""
    async with engine(Engine({LOAD: error(500, said)})) as (it, place):
        assert await it.load(place, "support", A) == Failed(told, answered=True)


async def test_a_refusal_of_any_length_is_told_shortly() -> None:
    """Of either call."""
    async with engine(Engine(dict.fromkeys([LOAD, UNLOAD], error(500, "x" * 10_000)))) as (it, place):
        for found in (await it.load(place, "x", A), await it.unload(place, "x")):
            assert found == Failed("x" * 500 + "…", answered=True)


@pytest.mark.parametrize("wrong", DAMAGED)
async def test_what_is_no_answer_of_vllms_says_nothing(wrong: tuple[int, str]) -> None:
    """It is neither done nor refused."""
    async with engine(Engine({LOAD: wrong, UNLOAD: wrong, LIST: wrong})) as (it, place):
        for found in (await it.load(place, "x", A), await it.unload(place, "x"), await it.loaded(place)):
            assert isinstance(found, Failed)
            assert not found.answered
            assert found.why
            assert len(found.why) <= 501


@pytest.mark.parametrize("wrong", ["[]", "{}", '{"data":{}}', '{"data":[{"id":"x","parent":"chat"}]}', "null"])
async def test_a_list_that_does_not_tell_of_adapters_is_no_list(wrong: str) -> None:
    """An adopted engine whose adapters nobody can name must not be taken for one without any."""
    async with engine(Engine({LIST: (200, wrong)})) as (it, place):
        found = await it.loaded(place)
        assert isinstance(found, Failed)
        assert found.why.startswith("/v1/models")


async def test_an_engine_that_hangs_or_is_gone_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call has an end."""
    for name in ("LOAD_SECONDS", "UNLOAD_SECONDS", "LIST_SECONDS"):
        monkeypatch.setattr(adapters, name, 0.01)
    async with engine(Engine(dict.fromkeys([LOAD, UNLOAD, LIST], HANGS))) as (it, place):
        assert await it.load(place, "x", A) == Failed(f"{LOAD} has not answered for 0.01 s", answered=False)
        assert await it.unload(place, "x") == Failed(f"{UNLOAD} has not answered for 0.01 s", answered=False)
        assert await it.loaded(place) == Failed(f"{LIST} has not answered for 0.01 s", answered=False)
    async with aiohttp.ClientSession(trust_env=False) as session:
        gone = await HttpAdapters(session).load(place, "x", A)
        assert gone is not None
        assert not gone.answered
