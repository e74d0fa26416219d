"""Whether an engine is ready, asked of real servers on loopback."""

import asyncio
import gzip
import itertools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from aiohttp.typedefs import Handler

from tests.harness import at_unix_socket
from vllm_proxy.domain.address import Address, TcpAddress, UnixAddress
from vllm_proxy.domain.command import Place
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


async def ours() -> bool:
    """The port is the engine's."""
    return True


async def not_ours() -> bool:
    """Another program's."""
    return False


@asynccontextmanager
async def probing(is_engines: Callable[[], Awaitable[bool]] = ours) -> AsyncIterator[Callable[[int | Address], Any]]:
    """A probe for the engine "own"."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        probe = HttpProbe(session)
        yield lambda where: probe.ready(Place("chat/0", "own", address(where), "secret", "/nowhere"), is_engines)


def address(where: int | Address) -> Address:
    """A port is one of this machine."""
    return TcpAddress("127.0.0.1", where) if isinstance(where, int) else where


async def ask(app: web.Application) -> Ready | None:
    """What the probe finds at this server."""
    async with TestServer(app) as server, probing() as ready:
        assert server.port is not None
        answer: Ready | None = await ready(server.port)
        return answer


async def test_an_engine_that_listens_at_a_unix_socket_is_asked_there(tmp_path: Path) -> None:
    """Its health, its model list and its counters; one at which nobody listens is not ready."""
    app = answering(cards("own", max_model_len=5))

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(text="\n".join(LINES))

    app.router.add_get("/metrics", metrics)
    async with at_unix_socket(app, tmp_path / "s") as where, probing() as ready, aiohttp.ClientSession() as session:
        assert await ready(where) == Ready(5)
        assert await HttpProbe(session).counters(where) == "\n".join(LINES)
        assert await ready(UnixAddress(f"{tmp_path}/nobody")) is None


async def test_an_engine_that_lists_its_own_name_is_ready() -> None:
    """It says how long its context is."""
    assert await ask(answering(cards("chat", "own", max_model_len=4096))) == Ready(4096)


@pytest.mark.parametrize(
    ("routes", "tasks"),
    [
        (["/v1/completions", "/v1/chat/completions", "/tokenize"], ("generate",)),
        (["/v1/embeddings", "/v1/score", "/pooling"], ("embed", "score")),
        (["/pooling"], ()),
    ],
)
async def test_what_an_engine_can_is_read_from_its_routes(routes: list[str], tasks: tuple[str, ...]) -> None:
    """Those that there are take no GET."""

    async def post(_request: web.Request) -> web.Response:
        raise AssertionError

    app = answering(cards("own"))
    for route in routes:
        app.router.add_post(route, post)
    assert await ask(app) == Ready(None, tasks)


async def test_an_engine_that_says_something_else_is_ready_and_its_tasks_are_not_known() -> None:
    """Whatever is in front of its routes."""

    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=400)

    app = answering(cards("own"))
    app.router.add_post("/v1/completions", refuse)
    app.router.add_get("/v1/embeddings", refuse)
    assert await ask(app) == Ready(None, ())


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


# Whom it asks, and for how long


async def test_a_port_that_is_not_the_engines_gets_no_credential() -> None:
    """It may be healthy, and know every name that stands on the command line: it is asked for its health alone."""
    asked: list[str] = []

    async def listen(request: web.Request) -> web.Response:
        asked.append(f"{request.path} {request.headers.get('Authorization')}")
        return web.Response(text=cards("own"), content_type="application/json")

    app = web.Application()
    app.router.add_get("/{path:.*}", listen)
    async with TestServer(app) as server, probing(not_ours) as ready:
        assert server.port is not None
        assert await ready(server.port) is None
    assert asked == ["/health None"]


async def test_a_port_that_does_not_answer_is_not_looked_at() -> None:
    """While an engine loads it is asked twenty times a second: whose the port is costs a look at all processes."""

    async def never() -> bool:
        raise AssertionError

    async with TestServer(answering(cards("own"), health=503)) as server, probing(never) as ready:
        assert server.port is not None
        assert await ready(server.port) is None


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_a_redirect_is_never_followed(path: str) -> None:
    """It would lead the credential, and the daemon, to wherever it says."""
    followed: list[str] = []
    app = answering(cards("own"))

    async def elsewhere(request: web.Request) -> web.Response:
        followed.append(request.path)
        return web.Response(text=cards("own"), content_type="application/json")

    @web.middleware
    async def redirect(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == path:
            return web.Response(status=307, headers={"Location": "/elsewhere"})
        return await handler(request)

    app.middlewares.append(redirect)
    app.router.add_get("/elsewhere", elsewhere)
    assert await ask(app) is None
    assert followed == []


def streaming(path: str, pieces: Callable[[], Iterator[bytes]], **headers: str) -> tuple[web.Application, list[int]]:
    """A healthy server that answers one path with these pieces; how many bytes it got rid of."""
    sent = [0]
    app = web.Application()

    async def healthy(_request: web.Request) -> web.Response:
        return web.Response()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for piece in pieces():
            await response.write(piece)
            sent[0] += len(piece)
        return response

    app.router.add_get("/health", healthy)
    app.router.add_get(path, answer)
    return app, sent


def endless(piece: bytes) -> Callable[[], Iterator[bytes]]:
    """The same again and again."""
    return lambda: itertools.repeat(piece)


async def test_a_model_list_without_an_end_is_not_read_to_it() -> None:
    """A mebibyte is enough for any: what has more is no engine."""
    app, sent = streaming("/v1/models", endless(b" " * 2**16))
    assert await ask(app) is None
    assert sent[0] < 2**24


async def test_an_encoded_model_list_is_not_read() -> None:
    """A small one can be large inside; nobody asked for it."""
    body = gzip.compress(cards("own").encode())
    app, _ = streaming("/v1/models", lambda: iter([body]), **{"Content-Encoding": "gzip"})
    assert await ask(app) is None


async def counters(app: web.Application) -> str | None:
    """What the probe reads of this server's metrics."""
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        assert server.port is not None
        return await HttpProbe(session).counters(address(server.port))


LINES = 'vllm:prompt_tokens_total{engine="0"} 5.0', 'vllm:kv_cache_usage_perc{engine="0"} 0.25'


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_counters_are_found_however_the_answer_is_cut(size: int) -> None:
    """Their lines alone, the last one without an end too."""
    text = f"# HELP x\n{LINES[0]}\nother{{}} 1\n vllm:prompt_tokens_total{{}} 1\n{LINES[1]}".encode()
    app, _ = streaming("/metrics", lambda: (text[at : at + size] for at in range(0, len(text), size)))
    assert await counters(app) == "\n".join(LINES)


@pytest.mark.parametrize("piece", [b"x" * 2**16, b"vllm:x{} 1\n" * 6000, (LINES[0] + "\n").encode() * 1500])
async def test_metrics_without_an_end_are_not_read_to_it(piece: bytes) -> None:
    """As one line, as many, as counters alone: what was found by then counts."""
    app, sent = streaming("/metrics", itertools.chain([LINES[0].encode() + b"\n"], itertools.repeat(piece)).__iter__)
    found = await counters(app)
    assert found is not None
    assert found.startswith(LINES[0])
    assert len(found) < 2**21
    assert sent[0] < 2**26
