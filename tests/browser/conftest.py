"""A daemon and a browser for all tests of pages, and what these do."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from importlib.metadata import distribution
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.browser.chromium import REBOUND, Browser, browser
from tests.harness import Daemon, daemon, fake_engines, port_block

AXE = "pytest_playwright_axe/resources/axe.min.js"
CHAT = '[models.chat]\nmodel = "org/chat"\n'


@pytest.fixture(scope="package")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One daemon for all of them, on loopback and without keys."""
    base = fake_engines(port_block()) + CHAT
    async with daemon(base, tmp_path_factory.mktemp("browser")) as running:
        (running.folder / "base.toml").write_text(base, encoding="utf-8")
        await running.all_ready()
        yield running


@contextlib.asynccontextmanager
async def configured(running: Daemon, text: str) -> AsyncIterator[None]:
    """Within the block the file of the daemon has more tables."""
    base = (running.folder / "base.toml").read_text(encoding="utf-8")
    try:
        running.save(base + text)
        await running.write("POST", "/config/reload")
        yield
    finally:
        running.save(base)
        await running.write("POST", "/config/reload")


@contextlib.asynccontextmanager
async def unchanged(running: Daemon, text: str = "") -> AsyncIterator[None]:
    """As `configured`; nothing of what is done in the block has an effect."""
    async with configured(running, text):
        before = running.file.read_bytes()
        yield
        assert running.file.read_bytes() == before
        assert await models(running) == {"chat"}
        assert (await running.instance("chat"))["state"] == "ready"


@contextlib.asynccontextmanager
async def forwarded(running: Daemon, is_up: asyncio.Event | None = None) -> AsyncIterator[asyncio.Server]:
    """What leads to the control socket, as `ssh -L PORT:/run/…/control.sock` does. `is_up`: until when it waits."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if is_up is not None:
            await is_up.wait()
        there = await asyncio.open_unix_connection(running.state_dir / "control.sock")
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
    async with server:
        try:
            yield server
        finally:
            server.close_clients()


def port_of(server: asyncio.Server) -> int:
    """Where it listens."""
    return int(server.sockets[0].getsockname()[1])


@pytest.fixture(scope="package")
def axe() -> str:
    """The source of axe-core."""
    return Path(str(distribution("pytest-playwright-axe").locate_file(AXE))).read_text(encoding="utf-8")


@pytest.fixture(scope="package")
async def chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """One browser for all of them."""
    async with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
async def site() -> AsyncIterator[int]:
    """The port of a web server whose page is empty."""

    async def page(_request: web.Request) -> web.Response:
        return web.Response(text="<!DOCTYPE html><title>evil</title><p>hello", content_type="text/html")

    app = web.Application()
    app.router.add_get("/", page)
    async with TestServer(app) as server:
        assert server.port is not None
        yield server.port


@pytest.fixture
def elsewhere(site: int) -> str:
    """The address of a page on another origin of this machine."""
    return f"http://127.0.0.1:{site}/"


@pytest.fixture
def evil(site: int) -> str:
    """The address of a page of another site."""
    return f"http://{REBOUND}:{site}/"


def post(url: str, body: object, kind: str, mode: str = "cors", headers: Mapping[str, str] | None = None) -> str:
    """A request as a page's script sends it; what it comes to know of the answer."""
    sent = {"Content-Type": kind, **(headers or {})}
    options = {"method": "POST", "mode": mode, "headers": sent, "body": json.dumps(body)}
    return f"fetch({json.dumps(url)}, {json.dumps(options)}).then(answer => answer.status, () => 'refused')"


def form(url: str, body: object, kind: str) -> str:
    """A form that a page sends, which leads to its answer. Somewhere in the body has to be one `=`."""
    name, value = json.dumps(body).split("=")
    return f"""
      const form = document.createElement("form"), field = document.createElement("input");
      Object.assign(form, {{method: "POST", action: {json.dumps(url)}, enctype: "{kind}"}});
      Object.assign(field, {{name: {json.dumps(name)}, value: {json.dumps(value)}}});
      form.append(field); document.body.append(form); form.submit();
    """


async def models(running: Daemon) -> set[str]:
    """The ids of the daemon's models."""
    return {model["id"] for model in (await running.get("/models"))["models"]}
