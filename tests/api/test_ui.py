"""`/ui/`: the page's files, how they are served, and that they ask nobody but the daemon."""

import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from vllm_proxy.api import ui
from vllm_proxy.api.reply import Reply, answered
from vllm_proxy.domain.resources import Root
from vllm_proxy.traffic.envelope import envelope

FOLDER = Path(ui.__file__).parents[1] / "ui"
FILES = sorted(file.name for file in FOLDER.iterdir())
SCRIPTS = sorted(FOLDER.glob("*.js"))
CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


async def root(_request: web.Request) -> Reply[Root]:
    """What everybody else gets."""
    return Reply({"name": "vllm-proxy", "version": "1", "endpoints": []})


@pytest.fixture(name="client")
async def _client() -> Any:  # noqa: ANN401 - an async generator
    """Of a server with these routes alone."""
    app = web.Application(middlewares=[envelope])
    for method, path, handler in ui.routes():
        app.router.add_route(method, path, handler)
    app.router.add_route("GET", "/ui/", ui.routes()[0][2])
    app.router.add_route("GET", "/", answered(ui.page_or(root)))
    async with TestClient(TestServer(app)) as client:
        yield client


@pytest.mark.parametrize("name", ["", *FILES])
async def test_every_file_is_served_under_the_strict_policy(client: TestClient[Any, Any], name: str) -> None:
    """No script but its own, no inline style, no markup from text, in no frame; and the type that its name says."""
    async with client.get(f"/ui/{name}") as answer:
        assert answer.status == 200
        assert await answer.read() == (FOLDER / (name or "index.html")).read_bytes()
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["trusted-types"] == policy["base-uri"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        assert answer.content_type == kinds[(name or "index.html").rpartition(".")[2]]
        tag = answer.headers["ETag"]
    async with client.get(f"/ui/{name}", headers={"If-None-Match": tag}) as answer:
        assert (answer.status, await answer.read()) == (304, b"")


async def test_the_address_without_a_slash_leads_to_the_one_with_it(client: TestClient[Any, Any]) -> None:
    """By a relative address, which holds behind a path prefix."""
    async with client.get("/ui", allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (308, "ui/")


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fapi%2Fui.py", "index", "%2Fetc%2Fpasswd", "__init__.py"])
async def test_what_is_no_file_of_the_page_is_404(client: TestClient[Any, Any], name: str) -> None:
    """Nothing outside the folder has an address."""
    async with client.get(f"/ui/{name}") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        (CHROMIUM, 303),
        ("text/html", 303),
        ("TEXT/HTML;level=1, */*;q=0.1", 303),
        ("application/xhtml+xml", 303),
        ("application/json, text/html;q=0.9", 200),
        ("application/json, text/html", 200),
        ("*/*", 200),
        (None, 200),
        ("", 200),
        ("text/html;q=x, application/json", 200),
        (";;,,", 200),
    ],
)
async def test_the_root_leads_browsers_to_the_page(
    client: TestClient[Any, Any], accept: str | None, status: int
) -> None:
    """Who asks for HTML first is led there; curl and programs get JSON; caches tell them apart."""
    headers = {} if accept is None else {"Accept": accept}
    async with client.get("/", headers=headers, allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Vary"]) == (status, "Accept")
        if status == 303:
            assert answer.headers["Location"] == "ui/"
        else:
            assert (await answer.json())["name"] == "vllm-proxy"


def test_every_file_is_used() -> None:
    """By the page or by a module that it uses; and whatever one of them names is there."""
    used, new = {"index.html"}, ["index.html"]
    while new:
        text = (FOLDER / new.pop()).read_text(encoding="utf-8")
        for name in re.findall(r'(?:from "\./|href="|src=")([\w-]+\.(?:js|css|svg))"', text):
            if name not in used:
                used.add(name)
                new.append(name)
    assert sorted(used) == FILES


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_no_module_makes_markup_or_asks_past_the_one_that_may(script: Path) -> None:
    """Addresses are relative and asked for by `api.js`; a module opens with what it is for and stays small."""
    text = script.read_text(encoding="utf-8")
    assert text.startswith("// "), "it says what it is for"
    assert text.count("\n") <= 400
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in text
    assert script.name == "api.js" or "fetch(" not in text
    assert not re.findall(r"https?://(?!www\.w3\.org/)", text)
    assert not re.findall(r"\b(?:call|address)\([^)]*[\"'`]/", text), "an absolute address leaves a path prefix"
