"""What web pages can do with a daemon on this machine, in a real browser: nothing, unless allowed or with a key.

The pages are of another origin, of another site, sandboxed (`Origin: null`), or of a name that its owner lets mean this
machine (DNS rebinding); they come by the daemon's own port, or by one that somebody forwards to its control socket.
"""

import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from tests.browser.chromium import REBOUND, Browser, Page
from tests.browser.conftest import configured, form, forwarded, port_of, post, unchanged
from tests.harness import OPEN, Daemon
from vllm_proxy.domain.keys import hash_of, new_key

pytestmark = pytest.mark.browser
CHAT = "/v1/chat/completions"
ASK = {"model": "chat", "messages": [{"role": "user", "content": "="}]}
NEW = {"id": "evil", "model": "org/evil", "trust_remote_code": True}
ROUTES = [(CHAT, ASK), ("/v1/audio/transcriptions", ASK), ("/models", NEW), ("/keys", {"name": "evil"})]
CI, ADMIN = (new_key(bytes([number]) * 32) for number in range(2))
KEYS = (
    f'[keys.ci]\nhash = "{hash_of(CI)}"\n[keys.admin]\nhash = "{hash_of(ADMIN)}"\nscopes = ["admin"]\n'
)  # fmt: skip
WITHOUT_KEYS = pytest.mark.parametrize("keys", ["", OPEN], ids=["no keys", "nobody needs one"])


def read(url: str, key: str | None = None, body: object = None) -> str:
    """A request, and what the page can read of its answer: the status and the JSON; "refused": nothing."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    options = {"headers": headers} | ({"method": "POST", "body": json.dumps(body)} if body else {})
    what = "async answer => [answer.status, await answer.json()]"
    return f"fetch({json.dumps(url)}, {json.dumps(options)}).then({what}, () => 'refused')"


def session(url: str, *protocols: str) -> str:
    """A WebSocket; the protocol that was agreed on and its first event, or "refused"."""
    return f"""new Promise(done => {{
      const session = new WebSocket({json.dumps(url.replace("http", "ws", 1))}, {json.dumps(protocols)});
      session.onerror = () => done("refused");
      session.onmessage = said => {{ done([session.protocol, JSON.parse(said.data).type]); session.close() }};
    }})"""


def sandboxed(expression: str) -> str:
    """The same by a frame that has no origin."""
    script = f"({expression}).then(found => parent.postMessage(found, '*'))"
    return f"""new Promise(done => {{
      onmessage = said => done(said.data);
      const frame = document.createElement("iframe");
      frame.sandbox = "allow-scripts"; frame.srcdoc = "<script>" + {json.dumps(script)} + "</" + "script>";
      document.body.append(frame);
    }})"""


async def inferred(running: Daemon) -> dict[str, float]:
    """How many requests were not refused so far, by series."""
    found = await running.metrics()
    return {
        name: value
        for name, value in found.items()
        if name.startswith("vllm_proxy_requests_total") and 'status="40' not in name
    }


@contextlib.asynccontextmanager
async def in_vain(running: Daemon, keys: str) -> AsyncIterator[None]:
    """Nothing that is done in the block has an effect, and no engine hears of it."""
    async with unchanged(running, keys):
        before = await inferred(running)
        yield
        assert await inferred(running) == before


@pytest.fixture(params=["another origin", "another site", "no origin"])
async def foreign(chromium: Browser, elsewhere: str, evil: str, request: pytest.FixtureRequest) -> Page:
    """A page of somebody else, which has `run`."""
    page = await chromium.page(evil if request.param == "another site" else elsewhere)
    if request.param == "no origin":
        plain = page.evaluate
        page.evaluate = lambda expression: plain(sandboxed(expression))  # type: ignore[method-assign]
    return page


@WITHOUT_KEYS
async def test_a_page_of_somebody_else_can_do_nothing(shared: Daemon, foreign: Page, keys: str) -> None:
    """Neither infer nor create, whatever type it declares, and no WebSocket is opened."""
    async with in_vain(shared, keys):
        for path, body in ROUTES:
            for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
                assert await foreign.evaluate(post(shared.url + path, body, kind)) == "refused"
                assert await foreign.evaluate(post(shared.url + path, body, kind, "no-cors")) == 0
        assert await foreign.evaluate(read(f"{shared.url}/v1/models")) == "refused"
        assert await foreign.evaluate(read(f"{shared.url}/models")) == "refused"
        assert await foreign.evaluate(session(f"{shared.url}/v1/realtime?model=chat")) == "refused"
        assert await foreign.evaluate(session(f"{shared.url}/v1/realtime?model=chat", "realtime")) == "refused"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
@WITHOUT_KEYS
async def test_a_page_of_somebody_else_infers_nothing_by_a_form(
    shared: Daemon, chromium: Browser, evil: str, kind: str, keys: str
) -> None:
    """A form is sent without a question, and what it spells is looked at by nobody."""
    page = await chromium.page(evil)
    async with in_vain(shared, keys):
        await page.follow(form(shared.url + CHAT, ASK, kind))
    assert json.loads(await page.text())["error"]["code"] == "origin_not_allowed"


async def test_the_daemons_own_page_can_do_what_it_needs_no_key_for(shared: Daemon, chromium: Browser) -> None:
    """So it is the origin that is refused above; what needs a key needs one here too."""
    page = await chromium.page(f"{shared.url}/docs")
    assert (await page.evaluate(read(CHAT, body=ASK)))[0] == 200
    assert (await page.evaluate(read("/models")))[0] == 200
    assert await page.evaluate(session(f"{shared.url}/v1/realtime?model=chat")) == ["", "session.created"]
    status, answer = await page.evaluate(read("/models", body=NEW))
    assert (status, answer["error"]["code"]) == (401, "missing_api_key")


@WITHOUT_KEYS
async def test_a_page_of_a_rebound_name_can_do_nothing(shared: Daemon, chromium: Browser, keys: str) -> None:
    """To the browser it is the daemon's own page; the daemon knows its names."""
    own = f"http://{REBOUND}:{shared.port}"
    page = await chromium.page(f"{own}/openapi.json")  # it is refused, and of this origin
    assert "host_not_allowed" in await page.text()
    async with in_vain(shared, keys):
        await rebound(page, own)


async def rebound(page: Page, own: str) -> None:
    """Whatever the page asks for is refused, and tells it nothing."""
    for path, body in ROUTES[:1] + ROUTES[2:]:
        status, answer = await page.evaluate(read(path, body=body))
        assert status in {401, 403}
        assert answer["error"]["code"] in {"missing_api_key", "host_not_allowed"}
        for kind in ("application/json", "text/plain", "multipart/form-data"):
            assert await page.evaluate(post(path, body, kind)) in {401, 403}
    for path in ("/v1/models", "/models", "/health", "/ready", "/docs", "/"):
        assert (await page.evaluate(f"fetch('{path}').then(answer => answer.status)")) == 403
    assert await page.evaluate(session(f"{own}/v1/realtime?model=chat")) == "refused"


async def test_a_page_of_somebody_else_can_do_nothing_by_a_forwarded_control_socket(
    shared: Daemon, foreign: Page
) -> None:
    """Nobody needs a key there, and it is no page that may go without."""
    async with forwarded(shared) as line, in_vain(shared, ""):
        port = port_of(line)
        base = f"http://127.0.0.1:{port}"
        for path, body in ROUTES:
            for kind in ("application/json", "text/plain"):
                assert await foreign.evaluate(post(base + path, body, kind)) == "refused"
                assert await foreign.evaluate(post(base + path, body, kind, "no-cors")) == 0
        assert await foreign.evaluate(read(f"{base}/config")) == "refused"
        assert await foreign.evaluate(session(f"{base}/v1/realtime?model=chat")) == "refused"


async def test_a_page_of_a_rebound_name_can_do_nothing_by_a_forwarded_control_socket(
    shared: Daemon, chromium: Browser
) -> None:
    """As above."""
    async with forwarded(shared) as line, in_vain(shared, ""):
        port = port_of(line)
        own = f"http://{REBOUND}:{port}"
        page = await chromium.page(f"{own}/openapi.json")
        await rebound(page, own)


async def test_the_docs_by_a_forwarded_control_socket_are_the_daemons_own(shared: Daemon, chromium: Browser) -> None:
    """Who forwards it for himself opens the page there, and needs no key."""
    async with forwarded(shared) as line:
        port = port_of(line)
        page = await chromium.page(f"http://localhost:{port}/docs")
        await page.until("document.body.innerText.includes('Create a model')")
        assert (await page.evaluate(read("/keys")))[0] == 200


async def test_a_page_of_an_allowed_origin_reads_a_refusal_and_infers_with_a_key(
    shared: Daemon, chromium: Browser, evil: str
) -> None:
    """It sees the 401 and its code, and with a key the answer; with the right one it may administer."""
    page = await chromium.page(evil)
    async with configured(shared, f'{KEYS}[server]\ncors_origins = ["{evil.rstrip("/")}"]\n'):
        for key, code in ((None, "missing_api_key"), ("EMPTY", "invalid_api_key")):
            status, answer = await page.evaluate(read(shared.url + CHAT, key, ASK))
            assert (status, answer["error"]["code"]) == (401, code)
        status, answer = await page.evaluate(read(shared.url + CHAT, CI, ASK))
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "echo: =")
        status, answer = await page.evaluate(read(f"{shared.url}/models", CI, NEW))
        assert (status, answer["error"]["code"]) == (403, "missing_scope")
        status, answer = await page.evaluate(read(f"{shared.url}/keys", ADMIN))
        assert [key["name"] for key in answer["keys"]] == ["ci", "admin"]


async def test_a_page_opens_a_websocket_with_a_key(shared: Daemon, chromium: Browser, evil: str) -> None:
    """Browsers can send one as a protocol alone; it is not echoed, and without it nothing opens."""
    page = await chromium.page(evil)
    url = f"{shared.url}/v1/realtime?model=chat"
    async with configured(shared, f'{KEYS}[server]\ncors_origins = ["{evil.rstrip("/")}"]\n'):
        with_key = session(url, "realtime", f"openai-insecure-api-key.{CI}")
        assert await page.evaluate(with_key) == ["realtime", "session.created"]
        for wrong in ((), ("realtime",), ("realtime", "openai-insecure-api-key.EMPTY")):
            assert await page.evaluate(session(url, *wrong)) == "refused"


async def test_a_page_of_another_origin_cannot_read_a_refusal(shared: Daemon, chromium: Browser, evil: str) -> None:
    """Where its origin is not allowed, a key does not help a page to an answer either."""
    page = await chromium.page(evil)
    async with configured(shared, KEYS):
        for key in (None, CI, ADMIN):
            assert await page.evaluate(read(shared.url + CHAT, key, ASK)) == "refused"
            assert await page.evaluate(read(f"{shared.url}/models", key)) == "refused"


async def test_any_page_may_infer_where_the_file_says_so_and_nothing_else(shared: Daemon, foreign: Page) -> None:
    """`cors_origins = ["*"]` is for inference, sessions included; models can be neither read nor changed."""
    async with unchanged(shared, '[server]\ncors_origins = ["*"]\n'):
        assert (await foreign.evaluate(read(shared.url + CHAT, body=ASK)))[0] == 200
        assert (await foreign.evaluate(read(f"{shared.url}/v1/models")))[0] == 200
        opened = await foreign.evaluate(session(f"{shared.url}/v1/realtime?model=chat"))
        assert opened == ["", "session.created"]
        for path in ("/models", "/config", "/keys"):
            assert await foreign.evaluate(read(shared.url + path)) == "refused"
        assert await foreign.evaluate(read(f"{shared.url}/models", body=NEW)) == "refused"
        assert await foreign.evaluate(post(f"{shared.url}/models", NEW, "text/plain", "no-cors")) == 0
