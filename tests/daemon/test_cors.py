"""What web pages may read and send. Browsers enforce it; here are the headers that they look at."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from tests.harness import OPEN, Daemon, daemon, fake_engines, port_block

ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
PAGE, OTHER = "https://app.example", "https://evil.example"
TABLE = '[models.chat]\nmodel = "org/chat"\n'


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon that one page may use."""
    text = f'[server]\ncors_origins = ["{PAGE}"]\n' + OPEN + fake_engines(port_block()) + TABLE
    async with daemon(text, tmp_path_factory.mktemp("cors")) as running:
        await running.all_ready()
        yield running


async def headers(
    running: Daemon,
    method: str,
    path: str,
    origin: str,
    **more: Any,  # noqa: ANN401 - aiohttp's options
) -> tuple[int, dict[str, str]]:
    """The status of an answer to a page, and its headers in lower case."""
    given = {"Origin": origin, **more.pop("headers", {})}
    async with running.session.request(method, URL(running.url + path), headers=given, **more) as answer:
        await answer.read()
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", ASK, 200),
        ("POST", "/v1/chat/completions", ASK | {"stream": True}, 200),
        ("POST", "/v1/chat/completions", ASK | {"model": "none"}, 404),
        ("POST", "/v1/chat/completions", None, 400),
        ("GET", "/v1/models", None, 200),
        ("GET", "/models", None, 200),
        ("GET", "/models/none", None, 404),
        ("GET", "/nothing", None, 404),
        ("HEAD", "/v1/models", None, 200),
    ],
)
async def test_every_answer_tells_the_allowed_page_that_it_may_read_it(
    shared: Daemon, method: str, path: str, body: object, status: int
) -> None:
    """Streams and errors too, each header once; another page is told nothing."""
    found, given = await headers(shared, method, path, PAGE, json=body)
    assert (found, given["access-control-allow-origin"], given["vary"]) == (status, PAGE, "Origin")
    assert "X-Request-Id" in given["access-control-expose-headers"]
    _, given = await headers(shared, method, path, OTHER, json=body)
    assert not [name for name in given if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/chat/completions", "POST"),
        ("/models", "GET, HEAD, POST"),
        ("/models/a/b", "DELETE, GET, HEAD, PATCH, PUT"),
    ],
)
async def test_a_preflight_is_answered_for_the_allowed_page(shared: Daemon, path: str, methods: str) -> None:
    """With the methods that the path takes and the headers that are asked for."""
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    status, given = await headers(shared, "OPTIONS", path, PAGE, headers=asked)
    assert (status, given["access-control-allow-origin"]) == (204, PAGE)
    assert given["access-control-allow-methods"] == methods
    assert given["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert given["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in given
    status, given = await headers(shared, "OPTIONS", path, OTHER, headers=asked)
    assert (status, "access-control-allow-origin" in given) == (403, False)
    status, _ = await headers(shared, "OPTIONS", "/nothing", PAGE, headers=asked)
    assert status == 404


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
async def test_what_a_page_may_send_unasked_changes_nothing(shared: Daemon, kind: str) -> None:
    """The types of simple requests are refused, with an Origin that is allowed and without any."""
    for given in ({}, {"Origin": PAGE}):
        async with shared.session.post(
            "/models", data=b'{"id": "x", "model": "x"}', headers={"Content-Type": kind, **given}
        ) as answer:
            assert answer.status == 415
            assert (await answer.json())["error"]["code"] == "unsupported_media_type"
    status, _ = await headers(shared, "POST", "/models", OTHER, json={"id": "x", "model": "x"})
    assert status == 403
    assert [model["id"] for model in (await shared.get("/models"))["models"]] == ["chat"]


async def test_the_engine_is_not_told_of_the_page(shared: Daemon) -> None:
    """It would add headers of its own, which say that any page may read the answer."""
    await headers(shared, "POST", "/v1/chat/completions", PAGE, json=ASK, headers={"X-Request-Id": "seen"})
    (seen,) = await shared.seen("seen")
    assert "origin" not in {name.lower() for name, _ in seen["headers"]}


async def test_the_key_is_live(tmp_path: Path, port_start: int) -> None:
    """A page is let in and put out without a restart; `"*"` lets all in."""
    async with daemon("[server]\ncors_origins = []\n" + fake_engines(port_start) + TABLE, tmp_path) as running:
        for old, new, allowed in (("[]", '["*"]', "*"), ('["*"]', f'["{PAGE}"]', PAGE), (f'["{PAGE}"]', "[]", None)):
            running.edit(f"cors_origins = {old}", f"cors_origins = {new}")
            await running.adopts()
            _, given = await headers(running, "GET", "/v1/models", PAGE)
            assert given.get("access-control-allow-origin") == allowed
