"""What a person sees of the documentation, and what a page of somebody else can do, in a real browser."""

import json
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.browser.chromium import Browser, Page, browser
from tests.harness import Daemon, daemon, fake_engines, port_block

pytestmark = pytest.mark.browser
CHAT = '[models.chat]\nmodel = "org/chat"\n'
NEW = {"id": "evil", "model": "org/evil", "trust_remote_code": True}


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One daemon for all of them."""
    async with daemon(fake_engines(port_block()) + CHAT, tmp_path_factory.mktemp("browser")) as running:
        await running.all_ready()
        yield running


@pytest.fixture(scope="module")
async def chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """One browser for all of them."""
    async with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
async def elsewhere() -> AsyncIterator[str]:
    """The address of an empty page on another origin of this machine."""

    async def page(_request: web.Request) -> web.Response:
        return web.Response(text="<!DOCTYPE html><title>evil</title><p>hello", content_type="text/html")

    site = web.Application()
    site.router.add_get("/", page)
    async with TestServer(site) as server:
        yield f"http://127.0.0.1:{server.port}/"


def stayed(page: Page, origin: str) -> bool:
    """Whether a page asked nobody but the daemon and itself."""
    return all(url.startswith((f"{origin}/", f"blob:{origin}/", "data:")) for url in page.requests)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_the_pages_show_the_api_and_nobody_hears_of_it(shared: Daemon, chromium: Browser, path: str) -> None:
    """Routes and groups are there; the console is silent; no request goes elsewhere; nothing is refused by the CSP."""
    page = await chromium.page(shared.url + path)
    await page.until("document.body.innerText.includes('Create a model')")
    text = await page.text()
    for part in ("vllm-proxy", "Models", "Configuration", "Inference", "List all models"):
        assert part in text
    assert f"{shared.url}/openapi.json" in page.requests
    assert len(page.requests) >= 5
    assert stayed(page, shared.url), page.requests
    assert page.complaints == []


async def test_what_leaves_the_machine_would_be_seen(shared: Daemon, chromium: Browser) -> None:
    """The policy of the pages holds: a script, a picture or a call from elsewhere is refused, and is complained of."""
    page = await chromium.page(f"{shared.url}/docs")
    await page.until("document.body.innerText.includes('Create a model')")
    await page.evaluate("fetch('http://127.0.0.1:9/x').then(() => 'sent', () => 'refused')")
    await page.evaluate(
        "new Promise(done => { const i = new Image(); i.onerror = done; i.src = 'http://127.0.0.1:9/' })"
    )
    await page.evaluate(
        "new Promise(done => { const s = document.createElement('script');"
        " s.onerror = () => done(); s.src = 'http://127.0.0.1:9/s.js'; document.body.append(s) })"
    )
    for directive in ("connect-src", "img-src", "script-src"):
        await page.complains(directive)


async def test_a_request_can_be_tried_from_the_page(shared: Daemon, chromium: Browser) -> None:
    """Try it out, Execute: the answer of the daemon stands in the page."""
    page = await chromium.page(f"{shared.url}/docs#/Models/getModels")
    block = "document.querySelector('#operations-Models-getModels')"
    for wanted in (".try-out__btn", ".execute"):
        await page.until(f"{block}?.querySelector('{wanted}')")
        await page.evaluate(f"{block}.querySelector('{wanted}').click()")
    await page.until(f"{block}.querySelector('.live-responses-table .response-col_description pre')")
    answer = await page.evaluate(f"{block}.querySelector('.live-responses-table').innerText")
    assert "200" in answer
    assert '"org/chat"' in answer
    assert f"{shared.url}/models" in page.requests
    assert page.complaints == []


async def test_a_model_can_be_made_from_the_daemons_own_page(shared: Daemon, chromium: Browser) -> None:
    """What the page of another origin cannot do below works from here: so it is the origin that is refused."""
    page = await chromium.page(f"{shared.url}/docs")
    own = {"id": "own", "model": "org/own", "enabled": False}
    assert await page.evaluate(post("/models", own, "application/json")) == 201
    assert await models(shared) == {"chat", "own"}
    assert await page.evaluate("fetch('/models/own', {method: 'DELETE'}).then(answer => answer.ok)") is True
    await shared.eventually("/models", lambda found: len(found["models"]) == 1)


def post(url: str, body: object, kind: str, mode: str = "cors") -> str:
    """A request as a page's script sends it; what it comes to know of the answer."""
    options = {"method": "POST", "mode": mode, "headers": {"Content-Type": kind}, "body": json.dumps(body)}
    return f"fetch({json.dumps(url)}, {json.dumps(options)}).then(answer => answer.status, () => 'refused')"


async def models(running: Daemon) -> set[str]:
    """The ids of the daemon's models."""
    return {model["id"] for model in (await running.get("/models"))["models"]}


@pytest.mark.parametrize(
    ("kind", "mode", "told"),
    [
        ("application/json", "cors", "refused"),  # the preflight is
        ("text/plain", "cors", "refused"),  # sent, and its answer is kept from the page
        ("text/plain", "no-cors", 0),  # as above
        ("application/json", "no-cors", 0),  # the browser makes it text/plain
    ],
)
@pytest.mark.parametrize("path", ["/models", "/config", "/models/chat/stop"])
async def test_the_page_of_another_origin_changes_nothing_by_script(
    shared: Daemon, chromium: Browser, elsewhere: str, kind: str, mode: str, told: object, path: str
) -> None:
    """Whatever type it declares: no model is made or stopped, and the page learns nothing."""
    before = (shared.folder / "models.toml").read_bytes()
    page = await chromium.page(elsewhere)
    assert await page.evaluate(post(shared.url + path, NEW, kind, mode)) == told
    assert any(urlsplit(url).port == shared.port for url in page.requests)
    await unchanged(shared, before)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
async def test_the_page_of_another_origin_changes_no_model(
    shared: Daemon, chromium: Browser, elsewhere: str, method: str
) -> None:
    """The browser asks first, and is told no."""
    before = (shared.folder / "models.toml").read_bytes()
    page = await chromium.page(elsewhere)
    options = {"method": method, "headers": {"Content-Type": "application/json"}, "body": "{}"}
    url = json.dumps(f"{shared.url}/models/chat")
    call = f"fetch({url}, {json.dumps(options)}).then(answer => answer.status, () => 'refused')"
    assert await page.evaluate(call) == "refused"
    await unchanged(shared, before)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_the_page_of_another_origin_makes_no_model_by_a_form(
    shared: Daemon, chromium: Browser, elsewhere: str, kind: str
) -> None:
    """A form is sent without a question, and as text/plain it can spell JSON: the daemon refuses it."""
    before = (shared.folder / "models.toml").read_bytes()
    page = await chromium.page(elsewhere)
    name, value = json.dumps({**NEW, "description": "="}).split("=")
    await page.follow(
        f"""
          const form = document.createElement("form"), field = document.createElement("input");
          Object.assign(form, {{method: "POST", action: {json.dumps(shared.url + "/models")}, enctype: "{kind}"}});
          Object.assign(field, {{name: {json.dumps(name)}, value: {json.dumps(value)}}});
          form.append(field); document.body.append(form); form.submit();
        """
    )
    answer = json.loads(await page.text())
    assert answer["error"]["code"] in {"origin_not_allowed", "unsupported_media_type"}
    await unchanged(shared, before)


async def unchanged(running: Daemon, file: bytes) -> None:
    """Nothing of all that had an effect."""
    assert (running.folder / "models.toml").read_bytes() == file
    assert await models(running) == {"chat"}
    assert (await running.instance("chat"))["state"] == "ready"


async def test_the_pages_cannot_be_framed_elsewhere(shared: Daemon, chromium: Browser, elsewhere: str) -> None:
    """Another page cannot show them inside itself and have its visitor click."""
    page = await chromium.page(elsewhere)
    await page.evaluate(
        f"""new Promise(done => {{
          const frame = document.createElement("iframe");
          frame.onload = done; frame.src = {json.dumps(shared.url + "/docs")}; document.body.append(frame);
        }})"""
    )
    await page.complains("frame-ancestors")
