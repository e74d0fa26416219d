"""Whether an engine is ready, asked of real servers on loopback."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from vllm_proxy.engine.probe import HttpProbe, Ready


def answering(body: str, *, health: int = 200, models: int = 200) -> web.Application:
    """A server with this model list."""

    async def get_health(_request: web.Request) -> web.Response:
        return web.Response(status=health)

    async def get_models(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer secret":
            return web.Response(status=401)
        return web.Response(status=models, text=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/health", get_health)
    app.router.add_get("/v1/models", get_models)
    return app


def cards(*names: str, **fields: object) -> str:
    """A model list."""
    return json.dumps({"object": "list", "data": [{"id": name, **fields} for name in names]})


@asynccontextmanager
async def probing() -> AsyncIterator[Callable[[int], Any]]:
    """A probe for the engine "own"."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        probe = HttpProbe(session)
        yield lambda port: probe.ready(port, "own", "secret")


async def ask(app: web.Application) -> Ready | None:
    """What the probe finds at this server."""
    async with TestServer(app) as server, probing() as ready:
        assert server.port is not None
        answer: Ready | None = await ready(server.port)
        return answer


async def test_an_engine_that_lists_its_own_name_is_ready() -> None:
    """It says how long its context is."""
    assert await ask(answering(cards("chat", "own", max_model_len=4096))) == Ready(4096)


@pytest.mark.parametrize("length", [None, "many"])
async def test_an_engine_that_does_not_say_its_length_is_ready(length: object) -> None:
    """A missing or odd max_model_len is not known, no more."""
    assert await ask(answering(cards("own", max_model_len=length))) == Ready(None)


async def test_an_engine_that_is_not_healthy_is_not_ready() -> None:
    """503 from /health counts more than its model list."""
    assert await ask(answering(cards("own"), health=503)) is None


async def test_a_foreign_server_is_not_ours() -> None:
    """A healthy vLLM of somebody else on our port does not know our engine's name."""
    assert await ask(answering(cards("chat", "own-2"))) is None


async def test_a_model_list_that_is_refused_is_not_ready() -> None:
    """Whoever does not accept our credential is not the engine that we gave it to."""
    assert await ask(answering(cards("own"), models=401)) is None


@pytest.mark.parametrize(
    "body",
    ["", "{", "null", "[]", "5", '"own"', "{}", '{"data": null}', '{"data": "own"}', '{"data": 5}',
     '{"data": [null]}', '{"data": ["own"]}', '{"data": [{}]}', '{"data": {"own": 1}}', "[" * 100_000],
)  # fmt: skip
async def test_garbage_is_not_ready_and_no_exception(body: str) -> None:
    """Whatever a foreign server answers, be it enough to exhaust the decoder, the supervisor goes on polling."""
    assert await ask(answering(body)) is None


async def test_a_page_of_html_is_not_ready() -> None:
    """A web server that answers 200 to everything is no engine."""

    async def page(_request: web.Request) -> web.Response:
        return web.Response(text="<html>own</html>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/{path:.*}", page)
    assert await ask(app) is None


async def test_nobody_there_is_not_ready() -> None:
    """A refused connection is the usual answer while an engine loads."""
    with socket.socket() as bound:  # bound, so that nobody else takes it, and not listening
        bound.bind(("127.0.0.1", 0))
        async with probing() as ready:
            assert await ready(bound.getsockname()[1]) is None


async def test_a_server_that_hangs_up_is_not_ready() -> None:
    """A connection that closes without a word, and one that speaks no HTTP."""
    for words in (b"", b"hello\r\n\r\n"):

        def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, words: bytes = words) -> None:
            writer.write(words)
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        async with server, probing() as ready:
            assert await ready(server.sockets[0].getsockname()[1]) is None
