"""What a person sees of the documentation, and that a page of somebody else can administer nothing, in a real browser.

What pages can do beyond that, with keys and by other ways in, is in test_web_pages.py.
"""

import json
from urllib.parse import urlsplit

import pytest

from tests.browser.chromium import Browser, Page
from tests.browser.conftest import configured, form, models, post, unchanged
from tests.harness import OPEN, Daemon
from vllm_proxy.domain.keys import hash_of, new_key

pytestmark = pytest.mark.browser
NEW = {"id": "evil", "model": "org/evil", "trust_remote_code": True}
KEY = new_key(b"k" * 32)
ADMIN = f'[keys.me]\nhash = "{hash_of(KEY)}"\nscopes = ["admin"]\n'
WITHOUT_KEYS = pytest.mark.parametrize("keys", ["", OPEN], ids=["no keys", "nobody needs one"])


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


async def tried(page: Page) -> str:
    """What the page shows of an answer to GET /models that it was told to ask for."""
    block = "document.querySelector('#operations-Models-getModels')"
    for wanted in (".try-out__btn", ".execute"):
        await page.until(f"{block}?.querySelector('{wanted}')")
        await page.evaluate(f"{block}.querySelector('{wanted}').click()")
    await page.until(f"{block}.querySelector('.live-responses-table .response-col_description pre')")
    return str(await page.evaluate(f"{block}.querySelector('.live-responses-table').innerText"))


async def test_a_request_can_be_tried_from_the_page(shared: Daemon, chromium: Browser) -> None:
    """Try it out, Execute: the answer of the daemon stands in the page."""
    page = await chromium.page(f"{shared.url}/docs#/Models/getModels")
    answer = await tried(page)
    assert "200" in answer
    assert '"org/chat"' in answer
    assert f"{shared.url}/models" in page.requests
    assert page.complaints == []


@pytest.mark.parametrize(("keys", "sent"), [(ADMIN, {"Authorization": f"Bearer {KEY}"}), (OPEN, {})])
async def test_a_model_can_be_made_from_the_daemons_own_page(
    shared: Daemon, chromium: Browser, keys: str, sent: dict[str, str]
) -> None:
    """With a key; where nobody needs one it is the origin alone that is refused below."""
    page = await chromium.page(f"{shared.url}/docs")
    own = {"id": "own", "model": "org/own", "enabled": False}
    gone = f"fetch('/models/own', {{method: 'DELETE', headers: {json.dumps(sent)}}}).then(answer => answer.ok)"
    assert await page.evaluate(post("/models", own, "application/json")) == 401
    async with configured(shared, keys):
        assert await page.evaluate(post("/models", own, "application/json", headers=sent)) == 201
        assert await models(shared) == {"chat", "own"}
        assert await page.evaluate(gone) is True
        await shared.eventually("/models", lambda found: len(found["models"]) == 1)


async def test_a_key_can_be_given_to_the_page(shared: Daemon, chromium: Browser) -> None:
    """Authorize, and what is tried from then on carries it."""
    async with configured(shared, ADMIN):
        page = await chromium.page(f"{shared.url}/docs#/Models/getModels")
        await page.until("document.querySelector('.btn.authorize')")
        await page.evaluate("document.querySelector('.btn.authorize').click()")
        field = "document.querySelector('.auth-container input')"
        await page.until(field)
        setter = "Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set"
        await page.evaluate(f"{setter}.call({field}, {json.dumps(KEY)})")
        await page.evaluate(f"{field}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        await page.evaluate("document.querySelector('.auth-btn-wrapper .authorize').click()")
        await page.evaluate("document.querySelector('.auth-btn-wrapper .btn-done').click()")
        assert '"org/chat"' in await tried(page)


@pytest.mark.parametrize(
    ("kind", "mode", "told"),
    [
        ("application/json", "cors", "refused"),  # the preflight is
        ("text/plain", "cors", "refused"),  # sent, and its answer is kept from the page
        ("text/plain", "no-cors", 0),  # as above
        ("application/json", "no-cors", 0),  # the browser makes it text/plain
    ],
)
@pytest.mark.parametrize("path", ["/models", "/config", "/models/chat/stop", "/keys"])
@WITHOUT_KEYS
async def test_the_page_of_another_origin_changes_nothing_by_script(
    shared: Daemon, chromium: Browser, elsewhere: str, kind: str, mode: str, told: object, path: str, keys: str
) -> None:
    """Whatever type it declares: no model or key is made, none stopped, and the page learns nothing."""
    page = await chromium.page(elsewhere)
    async with unchanged(shared, keys):
        assert await page.evaluate(post(shared.url + path, NEW, kind, mode)) == told
        assert any(urlsplit(url).port == shared.port for url in page.requests)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
@WITHOUT_KEYS
async def test_the_page_of_another_origin_changes_no_model(
    shared: Daemon, chromium: Browser, elsewhere: str, method: str, keys: str
) -> None:
    """The browser asks first, and is told no."""
    page = await chromium.page(elsewhere)
    options = {"method": method, "headers": {"Content-Type": "application/json"}, "body": "{}"}
    url = json.dumps(f"{shared.url}/models/chat")
    call = f"fetch({url}, {json.dumps(options)}).then(answer => answer.status, () => 'refused')"
    async with unchanged(shared, keys):
        assert await page.evaluate(call) == "refused"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
@WITHOUT_KEYS
async def test_the_page_of_another_origin_makes_no_model_by_a_form(
    shared: Daemon, chromium: Browser, elsewhere: str, kind: str, keys: str
) -> None:
    """A form is sent without a question, and as text/plain it can spell JSON: the daemon refuses it."""
    page = await chromium.page(elsewhere)
    async with unchanged(shared, keys):
        await page.follow(form(f"{shared.url}/models", {**NEW, "description": "="}, kind))
    code = json.loads(await page.text())["error"]["code"]
    assert code == ("origin_not_allowed" if keys else "missing_api_key")


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
