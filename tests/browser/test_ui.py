"""The page at `/ui/` in a real browser, with fake engines: what it shows, what its buttons do, what it survives.

The daemon of most of these needs no key (`fleet`); the one of the package does (`shared`). The screens that change the
file are in test_ui_config.py.
"""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import screens
from tests.browser.chromium import Browser, Page
from tests.browser.conftest import CHAT, configured, forwarded, port_of
from tests.browser.screens import button, click, fill, has, violations
from tests.fakes.ledger import GIB, Devices
from tests.harness import OPEN, Daemon, daemon, fake_engines, free_port, port_block, running_command
from vllm_proxy.domain.keys import hash_of, new_key

pytestmark = pytest.mark.browser
CHAT_PATH = "/v1/chat/completions"
ASK = {"model": "chat", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
KEY = new_key(b"u" * 32)
MANY = 40
SCREENS = (
    "fleet model/chat model/broken requests events devices config config/new play keys usage".split()
)  # fmt: skip
# When a screen shows what it has to.
SHOWN = {
    "fleet": "document.querySelectorAll('main tbody tr').length === 6",
    "model/chat": "document.querySelectorAll('.log div').length > 3 && document.querySelector('.others')",
    "model/broken": "document.querySelector('.log div') && document.querySelector('details.exit')",
    "events": "document.querySelector('main tbody tr')",
    "devices": "document.querySelectorAll('.device').length === 2",
    "requests/held": "document.querySelector('dl.facts a')",
}
HELD = "requests/held"  # of a request that `streaming` makes
ACTS = "document.querySelector('main :is(button, textarea, td a)')"
# Whether the requests of a screen are there, or that there are none.
LISTED = "[...document.querySelectorAll('.requests.ended')].every(it => [...it.children].some(part => !part.hidden))"
TARGETS = "main a, main button, main input, main select, main textarea, main summary, header a, header button"


def models(folder: Path) -> str:
    """Some that are ready, one that loads until a file is there, one in error, two on demand, one that is off."""
    return f"""
[models.chat]
model = "org/chat"
aliases = ["gpt-4o-mini"]
replicas = 2
[models.later]
model = "org/later"
start = "on-demand"
[models.spare]
model = "org/spare"
start = "on-demand"
[models."org/slow"]
model = "org/slow"
args = {{ fake_phase_until = "weights={folder}/loaded" }}
[models.broken]
model = "org/broken"
args = {{ fake_exit_at = "load", fake_exit_text = "ValueError: no such thing" }}
[models.broken.restart]
max_failures = 1
[models.off]
model = "org/off"
enabled = false
"""


@pytest.fixture(scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with models in every state, two devices and nobody who needs a key."""
    folder = tmp_path_factory.mktemp("ui")
    with Devices(folder / "devices.toml", {"0": 80 * GIB, "1": 80 * GIB}) as devices:
        options = f'[defaults]\ngpu_memory_utilization = 0.1\n[defaults.args]\nfake_ledger = "{devices.file}"\n'
        text = fake_engines(port_block()) + OPEN + devices.config + options + models(folder)
        async with daemon(text, folder) as running:
            for index in (0, 1):
                await running.once("chat", lambda it: it["state"] == "ready", index)
            await running.once("broken", lambda it: it["state"] == "error")
            yield running


@pytest.fixture
async def page(fleet: Daemon, chromium: Browser) -> AsyncIterator[Page]:
    """The page, once it shows the fleet, in front."""
    found = await chromium.page(f"{fleet.url}/ui/")
    await found.front()
    await found.looks()
    await found.until(has("tbody", "chat"))
    yield found
    await found.close()


def row(model: str) -> str:
    """An expression: the row of a model in the fleet."""
    name = json.dumps(model)
    return (
        f"[...document.querySelectorAll('main tbody tr')].find(row => row.querySelector('.name')?.innerText === {name})"
    )


async def goes(page: Page, screen: str) -> None:
    """Another screen, once it shows what it has to."""
    await screens.goes(page, screen)
    await page.until(SHOWN.get(screen, "true"))


async def busy(page: Page, model: str = "chat") -> None:
    """Wait until the page knows of a request in flight."""
    await page.until(f"Number({row(model)}.querySelector('[data-l=running]').innerText) > 0")


@contextlib.asynccontextmanager
async def streaming(running: Daemon, model: str = "chat", request_id: str = "held") -> AsyncIterator[Any]:
    """A request whose stream stands still after its first event, for the block."""
    body = {**ASK, "model": model, "fake": {"hang": 1}}
    async with running.session.post(CHAT_PATH, json=body, headers={"X-Request-Id": request_id}) as answer:
        assert answer.status == 200
        yield answer


async def test_it_loads_silently_and_asks_only_its_daemon(page: Page, fleet: Daemon) -> None:
    """Every model is there with its state; nothing is complained of; each URL that was asked for is the daemon's."""
    await page.until(f"{row('broken')}.innerText.includes('error')")
    await page.until(f"{row('org/slow')}.innerText.includes('loading weights')")
    await page.until(f"{row('spare')}.innerText.includes('on demand')")
    await page.until(f"{row('off')}.innerText.includes('disabled')")
    await page.until(f"{row('chat')}.innerText.includes('2 of 2 replicas')")
    await page.until(has(".connection", "live · 1 problem"))
    await page.until(has("main .problem", "no such thing"))
    assert await page.evaluate("[...document.querySelectorAll('main tbody .name')].map(it => it.innerText)") == [
        "broken", "org/slow", "chat", "later", "spare", "off",
    ]  # fmt: skip
    assert page.requests
    assert all(url.startswith(f"{fleet.url}/") for url in page.requests), page.requests
    assert page.complaints == []


async def test_a_browser_that_asks_for_the_root_is_led_to_it(fleet: Daemon, chromium: Browser) -> None:
    """What a person types is the daemon's address."""
    page = await chromium.page(fleet.url)
    await page.front()
    await page.until("location.pathname === '/ui/'")
    await page.until(has("h1", "Fleet"))


async def test_every_screen_opens_silently(page: Page, fleet: Daemon) -> None:
    """Each has something to show and complains of nothing; all it asks for is the daemon's."""
    for screen in SCREENS:
        await goes(page, screen)
        assert all(url.startswith((f"{fleet.url}/", "blob:", "data:")) for url in page.requests), (
            screen,
            page.requests,
        )
        assert page.complaints == [], screen


async def test_a_change_of_state_reaches_its_row(page: Page, fleet: Daemon) -> None:
    """Without a reload, whoever did it; the node of the row stays, so what is selected in it does."""
    await page.evaluate(f"window.kept = {row('later')}")
    await fleet.write("POST", "/models/later/start", status=202)
    await page.until(f"{row('later')}.innerText.includes('ready')")
    await fleet.write("POST", "/models/later/stop", status=202)
    await page.until(f"{row('later')}.querySelector('.state').innerText === 'stopped'")
    assert await page.evaluate(f"window.kept === {row('later')}")


async def test_a_model_is_started_and_stopped_from_the_page(page: Page, fleet: Daemon) -> None:
    """Start, and Stop, which says what it costs; where no request runs it does not ask."""
    await click(page, "Start later")
    await fleet.once("later", lambda it: it["state"] == "ready")
    await page.until(has("#said", "later starts"))
    await click(page, "Stop later")
    await page.until(has("#said", "later stops: requests get 503 model_stopped until somebody starts it"))
    await page.until(f"{row('later')}.querySelector('.state').innerText === 'stopped'")
    assert (await fleet.get("/models/later"))["status"]["reason"] == "stopped_by_hand"
    async with fleet.session.post(CHAT_PATH, json={**ASK, "model": "later"}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "model_stopped")


async def test_a_dialogue_ends_with_its_screen(page: Page, fleet: Daemon) -> None:
    """Another screen closes it, with nothing done; closed by Escape, the focus is where it was."""
    async with streaming(fleet):
        await busy(page)
        await page.evaluate(f"{button('Stop chat')}.focus()")
        await click(page, "Stop chat")
        await page.until(has("dialog", "From then on requests get 503 model_stopped until somebody starts it."))
        await page.press("Escape")
        await page.until("!document.querySelector('dialog')")
        assert await page.evaluate("document.activeElement.getAttribute('aria-label')") == "Stop chat"
        for opener in ("Stop chat", "Key"):
            await goes(page, "fleet")
            await page.until(button("Stop chat"))
            await goes(page, "devices")
            await goes(page, "fleet")
            await busy(page)
            await page.evaluate(f"{button(opener)}.focus()")
            await click(page, opener)
            await page.until("document.querySelector('dialog[open]')")
            await page.evaluate("history.back()")
            await page.until("document.querySelector('main').className === 'devices'")
            await page.until("!document.querySelector('dialog')")
            await page.until("document.activeElement === document.querySelector('main')")
    assert {one["state"] for one in (await fleet.get("/models/chat"))["status"]["instances"]} == {"ready"}


async def test_stopping_a_busy_model_asks_once(page: Page, fleet: Daemon) -> None:
    """With the number of requests; Cancel changes nothing, Stop ends it."""
    async with streaming(fleet):
        await busy(page)
        await click(page, "Restart chat")
        await page.until(has("dialog", "1 request in flight"))
        await click(page, "Cancel")
        await page.until("!document.querySelector('dialog')")
        assert [it["state"] for it in (await fleet.get("/models/chat"))["status"]["instances"]] == ["ready", "ready"]
    written = [it for it in await events_of(fleet) if it.get("what") == "POST /models/chat/restart"]
    assert written == []


async def events_of(running: Daemon) -> list[Any]:
    """The happenings that are kept."""
    async with running.admin.get("/events?fleet=1&since=0") as stream:
        found: list[Any] = []
        async for raw in stream.content:
            if raw.startswith(b"data: "):
                data = json.loads(raw[6:])
                if "revision" in data and "problems" in data and "kind" not in data:
                    return found  # what is told at the beginning has ended
                if "kind" in data:
                    found.append(data)
    return found


async def test_a_request_is_cancelled_from_the_page(page: Page, fleet: Daemon) -> None:
    """It is among those in flight; its engine sees the end, its client gets one, and it is among those that ended."""
    async with streaming(fleet, request_id="cancel-me") as answer:
        await goes(page, "requests")
        await page.until(has("main tbody", "cancel-me"))
        await page.until(has("main tbody", "streaming"))
        await click(page, "Cancel cancel-me")
        await click(page, "Cancel it")
        text = (await answer.content.read()).decode()
    assert "request_cancelled" in text
    await page.until(has("div.ended", "request_cancelled"))
    (seen,) = [seen for seen in await fleet.seen("cancel-me") if seen["path"] == CHAT_PATH]
    assert seen["state"] == "gone"


async def test_requests_can_be_filtered_and_looked_at(page: Page, fleet: Daemon) -> None:
    """By errors alone and by text; one has an address of its own."""
    for model in ("chat", "nobody"):
        body = {**ASK, "model": model, "stream": False}
        async with fleet.session.post(CHAT_PATH, json=body, headers={"X-Request-Id": f"of-{model}"}) as answer:
            assert answer.status == (200 if model == "chat" else 404)
    await goes(page, "requests")
    await page.until(f"{has('div.ended', 'of-chat')} && {has('div.ended', 'of-nobody')}")
    await page.evaluate("document.querySelector('main input[type=checkbox]').click()")
    await page.until(f"!{has('div.ended', 'of-chat')} && {has('div.ended', 'of-nobody')}")
    await page.evaluate(
        "const field = document.querySelector('main input[type=search]');"
        " field.value = 'of-nobody'; field.dispatchEvent(new Event('input'))"
    )
    await page.until("document.querySelectorAll('div.ended tbody tr').length === 1")
    await page.evaluate("document.querySelector('div.ended td.id a').click()")
    await page.until(has("dl.facts", "model_not_found"))
    assert await page.evaluate("document.querySelector('dl.facts dd a').href") == f"{fleet.url}/help/model_not_found"
    assert "in the queue" in await page.evaluate("document.querySelector('.legend').innerText"), "what the bars mean"
    colours = (
        "['queue', 'first', 'stream'].map(kind => getComputedStyle(document.querySelector(`.legend .${kind}`))"
        ".backgroundColor === getComputedStyle(document.querySelector(`.spent .${kind}`)).fill)"
    )
    await goes(page, "requests")
    await page.until("document.querySelector('.spent')")
    assert await page.evaluate(colours) == [True, True, True]
    await page.evaluate("document.querySelector('div.ended td.of a').closest('tr').querySelector('td.id a').click()")
    await page.until("document.querySelector('dl.facts dd a[href=\"#/model/chat\"]')")


async def test_the_screen_of_a_model_has_its_requests_in_flight(page: Page, fleet: Daemon) -> None:
    """With Cancel, and those that have ended below; none of another model."""
    async with streaming(fleet, request_id="its-own") as answer:
        await goes(page, "model/later")
        await page.until(has("div.flying", "None in flight."))
        await goes(page, "model/chat")
        await page.until(has("div.flying", "its-own"))
        await click(page, "Cancel its-own")
        await click(page, "Cancel it")
        assert "request_cancelled" in (await answer.content.read()).decode()
        await page.until(has("div.flying", "None in flight."))
        await page.until(has("div.ended", "its-own"))


async def test_the_screen_of_a_model_shows_its_output_as_it_comes(page: Page, fleet: Daemon) -> None:
    """Replicas, what its engines write, the failure with the log's end; lines that come are added."""
    await goes(page, "model/broken")
    await page.until(has("main .problem", "no such thing"))
    await page.until(has("details", "Last failure"))
    await page.until("[...document.querySelectorAll('.log .bad')].some(it => it.innerText.includes('no such thing'))")
    await goes(page, "model/org%2Fslow")
    await page.until(has("h1", "org/slow"))
    await page.until(has(".log", "Loading safetensors"))
    await page.until(has("main table[aria-label=Keys]", "fake-phase-until"))
    lines = await page.evaluate("document.querySelectorAll('.log div').length")
    await page.evaluate("(window.kept = document.querySelector('.others')).open = true")
    process = "document.querySelector('[data-l=process]').innerText"
    pid = await page.evaluate(process)
    await fleet.write("POST", "/models/org%2Fslow/restart", status=202)
    await page.until(f"document.querySelectorAll('.log div').length > {lines}")
    await page.until(f"/^[0-9]+$/.test({process}) && {process} !== {json.dumps(pid)}")
    assert await page.evaluate("kept.isConnected && kept.open"), "what did not change stays as its reader has it"
    assert page.complaints == []


async def test_the_output_stands_still_for_who_reads_above_its_end(page: Page, fleet: Daemon) -> None:
    """What comes is added below; To the end leads there, and from then on it follows again."""
    await goes(page, "model/later")
    log, lines = "document.querySelector('.log')", "document.querySelectorAll('.log div').length"
    at_end = f"{log}.scrollHeight - {log}.scrollTop - {log}.clientHeight < 2"

    async def more() -> None:
        """Of a start and a stop."""
        before = await page.evaluate(lines)
        await fleet.write("POST", "/models/later/start", status=202)
        await fleet.once("later", lambda it: it["state"] == "ready")
        await page.until(f"{lines} > {before} + 3")
        await fleet.write("POST", "/models/later/stop", status=202)
        await fleet.once("later", lambda it: it["state"] == "stopped")

    await more()
    await page.evaluate(f"(it => {{ it.style.height = '4rem'; it.scrollTop = it.scrollHeight }})({log})")
    await page.until(f"{log}.scrollHeight > 2 * {log}.clientHeight && {at_end} && !{button('To the end')}")
    await page.evaluate(f"{log}.scrollTop = 0")
    await page.until(button("To the end"))
    await more()
    assert await page.evaluate(f"{log}.scrollTop") == 0
    await click(page, "To the end")
    await page.until(f"{at_end} && !{button('To the end')}")
    await more()
    await page.until(at_end)


async def test_the_output_is_filtered_wrapped_and_downloaded(page: Page, fleet: Daemon) -> None:
    """By text, and errors and warnings alone, also of what comes; long lines on one; all of it as a file."""
    await goes(page, "model/broken")
    log = "document.querySelector('.log')"

    def choice(name: str) -> str:
        return f"[...document.querySelectorAll('.output label')].find(it => it.innerText.trim() === {json.dumps(name)})"

    seen = "[...document.querySelectorAll('.log div')].filter(it => it.checkVisibility())"
    everything = await page.evaluate(f"{seen}.length")
    await fill(page, "Filter lines", "SUCH thing")
    await page.until(f"{seen}.length && {seen}.every(it => it.innerText.includes('such thing'))")
    found = await page.evaluate(f"{seen}.length")
    assert found < everything
    await fleet.write("POST", "/models/broken/start", status=202)
    await page.until(f"{seen}.length > {found}")
    assert await page.evaluate(f"{seen}.every(it => it.innerText.includes('such thing'))")
    await fill(page, "Filter lines", "")
    await page.until(f"{seen}.length >= {everything}")
    await page.evaluate(f"{choice('errors and warnings')}.click()")
    assert await page.evaluate(f"{seen}.length && {seen}.every(it => /bad|warn/.test(it.className))")
    assert await page.evaluate(f"getComputedStyle({log}).whiteSpace") == "pre-wrap"
    await page.evaluate(f"{choice('wrap')}.click()")
    assert await page.evaluate(f"getComputedStyle({log}).whiteSpace") == "pre"
    await fleet.once("broken", lambda it: it["state"] == "error")
    await page.evaluate(
        "(() => { URL.createObjectURL = (blob) => { window.saved = blob; return '#' };"
        " HTMLAnchorElement.prototype.click = function () { window.name_of_it = this.download } })()"
    )
    await click(page, "Download")
    await page.until("window.name_of_it")
    assert await page.evaluate("name_of_it") == "broken.log"
    async with fleet.admin.get("/models/broken/logs?lines=10000") as answer:
        assert await page.evaluate("saved.text()") == await answer.text()


async def test_events_are_those_that_happened_before(page: Page, fleet: Daemon) -> None:
    """Also while nobody looked; by kind and by text."""
    await fleet.write("POST", "/models/later/stop", status=202)
    await goes(page, "events")
    await page.until(has("main tbody", "broken/0"))
    await page.until(has("main tbody", "POST /models/later/stop"))
    broken = "[...document.querySelectorAll('main tbody tr')].filter(it => it.innerText.includes('broken/0'))"
    said = f"{broken}.filter(it => it.innerText.includes('no such thing')).map(it => it.cells[1].innerText)"
    shown = await page.evaluate(said)
    assert shown[0] == "error"
    assert "loading (stopping)" in shown[1:], "what is said twice is of two phases"
    await click(page, "Problems")
    await page.until(f"!{has('main tbody', 'POST /models')}")
    assert "broken/0" in await page.text()


async def test_a_change_of_many_models_is_folded(page: Page, fleet: Daemon) -> None:
    """The first ones, and the others behind a click; when it was and what stands beside the beginning of it."""
    before = fleet.file.read_text(encoding="utf-8")
    more = "".join(f'[models.more-{number}]\nmodel = "x"\nstart = "on-demand"\n' for number in range(MANY))
    fleet.save(before + more)
    await fleet.adopts()
    await goes(page, "events")
    cell = "[...document.querySelectorAll('main td.said')].find(it => it.innerText.includes('more-0'))"
    await page.until(cell)
    folded = f"{cell}.querySelector('details')"
    assert not await page.evaluate(f"{folded}.open")
    assert await page.evaluate(f"{folded}.querySelector('summary').innerText") == f"and {MANY - 6} more"
    assert f"more-{MANY - 1}" not in await page.evaluate(f"{cell}.innerText")
    await page.evaluate(f"{folded}.open = true")
    assert f"more-{MANY - 1}" in await page.evaluate(f"{cell}.innerText")
    aligned = f"[...{cell}.parentElement.cells].map(it => getComputedStyle(it).verticalAlign)"
    assert set(await page.evaluate(aligned)) == {"top"}
    fleet.save(before)
    await fleet.adopts()


async def test_devices_show_who_has_their_memory(page: Page, fleet: Daemon) -> None:
    """Each device with those who hold it; on the fleet a line for each."""
    await page.until("document.querySelectorAll('.gauges .gauge').length === 2")
    await goes(page, "devices")
    await page.until(has("main", "chat/0"))
    found = await fleet.get("/devices")
    shown = await page.text()
    for device in found["devices"]:
        for holder in device["holds"]:
            assert holder["instance"] in shown


async def test_a_fault_of_its_own_is_told(page: Page, fleet: Daemon) -> None:
    """Nothing fails in silence, and one event that is not understood does not end the others."""
    await page.evaluate("import('./feed.js').then(feed => { feed.onChange(() => { throw new Error('planted') }) })")
    await fleet.write("POST", "/models/later/start", status=202)
    await page.until(has("#said .bad", "planted"))
    await page.until(f"{row('later')}.innerText.includes('ready')")
    await fleet.write("POST", "/models/later/stop", status=202)
    await page.until(f"{row('later')}.querySelector('.state').innerText === 'stopped'")


async def test_focus_and_a_click_that_has_begun_survive_an_update(page: Page, fleet: Daemon) -> None:
    """A row that changes and moves is the same one."""
    await page.evaluate(f"{button('Start later')}.focus()")
    await fleet.write("POST", "/models/later/start", status=202)
    await page.until(f"{row('later')}.innerText.includes('ready')")
    await fleet.write("POST", "/models/later/stop", status=202)
    await page.until(f"{row('later')}.querySelector('.state').innerText === 'stopped'")
    assert await page.evaluate("document.activeElement.getAttribute('aria-label')") == "Start later"


async def test_a_tab_holds_one_connection_and_a_hidden_one_none(fleet: Daemon, chromium: Browser) -> None:
    """Browsers have six for one server; so nine tabs work, each once it is seen, and only that one has a stream."""
    pages = []
    for _ in range(9):
        pages.append(page := await chromium.page(f"{fleet.url}/ui/"))
        await page.front()
        await page.until(has("tbody", "chat"))
    for page in (pages[0], pages[8], pages[4]):
        await page.front()
        await page.until("!document.hidden")
        await fleet.write("POST", "/models/later/start", status=202)
        await page.until(f"{row('later')}.innerText.includes('ready')")
        await fleet.write("POST", "/models/later/stop", status=202)
        await page.until(f"{row('later')}.querySelector('.state').innerText === 'stopped'")
    hidden = [await page.evaluate("document.hidden") for page in pages]
    assert hidden.count(True) == 8
    for page, is_hidden in zip(pages, hidden, strict=True):
        await page.holds("/events?", 0 if is_hidden else 1)
        await page.holds(fleet.url, 0 if is_hidden else 1)
    for page in pages:
        await page.close()


async def test_it_heals_after_the_daemon_was_killed(chromium: Browser, tmp_path: Path) -> None:
    """It says that the connection is lost, then shows what is and what has happened, without a reload."""
    port, block = free_port(), port_block()
    (tmp_path / "models.toml").write_text(fake_engines(block) + OPEN + CHAT, encoding="utf-8")
    command = ("serve", "--config", str(tmp_path / "models.toml"))
    async with running_command(tmp_path, *command, port=port) as running:
        await running.all_ready()
        page = await chromium.page(f"{running.url}/ui/")
        await page.front()
        await page.until(f"{row('chat')}?.innerText.includes('ready')")
        await page.evaluate("window.kept = true")
        await running.stop(signal.SIGKILL)
        await page.until(has(".connection", "connection lost"))
    (tmp_path / "models.toml").write_text(fake_engines(block) + OPEN + CHAT + '[models.new]\nmodel = "x"\n')
    async with running_command(tmp_path, *command, port=port) as running:
        await running.all_ready()
        await page.until(has(".connection", "live"))
        await page.until(f"{row('new')}?.innerText.includes('ready')")
        await goes(page, "events")
        await page.until(has("main tbody", "new/0"))
        assert await page.evaluate("window.kept")
    await page.close()


async def test_what_happened_while_the_connection_was_lost_is_told_once(fleet: Daemon, chromium: Browser) -> None:
    """By the same daemon: what is shown is what it keeps, nothing missing and nothing twice, without a reload."""
    up = asyncio.Event()
    up.set()
    async with forwarded(fleet, up) as line:
        page = await chromium.page(f"http://localhost:{port_of(line)}/ui/#/events")
        await page.front()
        await page.until(has("main tbody", "broken/0"))
        await page.evaluate("import('./feed.js').then(feed => { window.feed = feed })")
        before = await page.evaluate("feed.store.happened.length")
        up.clear()
        line.close_clients()
        await page.until(has(".connection", "connection lost"))
        await fleet.write("POST", "/models/later/start", status=202)
        await fleet.once("later", lambda it: it["state"] == "ready")
        await fleet.write("POST", "/models/later/stop", status=202)
        await fleet.once("later", lambda it: it["state"] == "stopped")
        assert await page.evaluate("feed.store.happened.length") == before
        up.set()
        await page.until(has(".connection", "live"))
        kept = await events_of(fleet)
        await page.until(f"feed.store.happened.length === {len(kept)}")
        shown = await page.evaluate("feed.store.happened")
        assert [(one["id"], one["at"]) for one in shown] == [(one["id"], one["at"]) for one in kept]
        assert before < len(kept)
        rows = (
            "[...document.querySelectorAll('main tbody tr')].filter(it => it.innerText.includes('later/stop')).length"
        )
        stops = sum(one.get("what") == "POST /models/later/stop" for one in kept)
        await page.until(f"{rows} === {stops}")
        await page.close()


async def test_a_forwarded_control_socket_needs_no_key(shared: Daemon, chromium: Browser) -> None:
    """As `ssh -L` forwards it: the page can do everything there, though the daemon's port asks for a key."""
    async with configured(shared, f'[keys.me]\nhash = "{hash_of(KEY)}"\n'), forwarded(shared) as line:
        page = await chromium.page(f"http://localhost:{port_of(line)}/ui/")
        await page.front()
        await page.until(f"{row('chat')}?.innerText.includes('ready')")
        await click(page, "Restart chat")
        await page.until(has("#said", "chat restarts"))
        await shared.all_ready()
        assert page.complaints == []
        await page.close()


async def test_the_page_of_another_origin_can_neither_use_nor_frame_it(
    fleet: Daemon, chromium: Browser, evil: str
) -> None:
    """Its modules are refused, what it shows cannot be read, and it is shown in no frame."""
    page = await chromium.page(evil)
    url = json.dumps(f"{fleet.url}/ui/app.js")
    assert await page.evaluate(f"import({url}).then(() => 'loaded', () => 'refused')") == "refused"
    stream = json.dumps(f"{fleet.url}/events?fleet=1")
    assert await page.evaluate(f"fetch({stream}).then(() => 'read', () => 'refused')") == "refused"
    await page.front()
    await page.evaluate(
        f"""document.body.append(
          Object.assign(document.createElement("iframe"), {{src: {json.dumps(fleet.url + "/ui/")}}}))"""
    )
    await page.complains("frame-ancestors")  # not its onload, which a refused frame need not have


async def test_its_policy_refuses_markup_made_of_text(page: Page) -> None:
    """A model's name that is markup can become none, even where a module had a fault; nor is there an inline script."""
    for sink in (
        "document.body.innerHTML = '<b>x'",
        "document.write('x')",
        "document.createElement('a').outerHTML = ''",
    ):
        assert (
            await page.evaluate(f"(() => {{ try {{ {sink} }} catch (error) {{ return error.name }} }})()")
            == "TypeError"
        )
    await page.evaluate("document.body.append(Object.assign(document.createElement('style'), {textContent: 'x{}'}))")
    await page.complains("style-src")


async def test_a_name_that_is_markup_is_shown_as_text(fleet: Daemon, page: Page) -> None:
    """Descriptions and sources may be anything."""
    await fleet.write("PATCH", "/models/later", {"description": "<img src=x onerror=alert(1)>"})
    await goes(page, "model/later")
    await page.until(has("main .sub", "<img src=x onerror=alert(1)>"))
    assert await page.evaluate("document.querySelector('main img')") is None
    await fleet.write("PATCH", "/models/later", {"description": None})


async def test_a_phone_shows_it_without_scrolling_sideways(page: Page) -> None:
    """At 390 pixels."""
    await page.looks(width=390, height=844)
    for screen in SCREENS:
        await goes(page, screen)
        await page.until("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    cut = (
        "[...document.querySelectorAll('nav a')].map(it => it.getBoundingClientRect())"
        ".filter(it => it.left < 0 || it.right > innerWidth).length"
    )
    assert await page.evaluate(cut) == 0, "every screen is named, none behind an edge"


async def test_the_keyboard_reaches_everything(page: Page, fleet: Daemon) -> None:
    """Tab comes to each link, button and field that acts, on every screen, in the order of the page; Enter acts."""
    async with streaming(fleet):
        for screen in (*SCREENS, HELD):
            await goes(page, screen)
            await page.until(SHOWN.get(screen, ACTS))
            await page.until(LISTED)  # else links come that have no number
            wanted = await page.evaluate(
                f"[...document.querySelectorAll({json.dumps(TARGETS)})]"
                ".filter(it => it.checkVisibility() && !it.disabled)"
                ".map((it, number) => { it.dataset.target = number; return String(number) })"
            )
            await page.evaluate("document.activeElement.blur()")
            reached = []
            for _ in range(len(wanted) + 12):
                await page.press("Tab")
                found = await page.evaluate("document.activeElement?.dataset.target ?? ''")
                reached += [found] if found and found not in reached else []
                if len(reached) == len(wanted):
                    break
            assert set(wanted) <= set(reached), (screen, set(wanted) - set(reached))
    await goes(page, "events")
    await page.evaluate(f"{button('Problems')}.focus()")
    await page.press("Enter")
    assert await page.evaluate(f"{button('Problems')}.getAttribute('aria-pressed')") == "true"


async def test_both_themes_follow_the_reader_and_the_button(page: Page) -> None:
    """What the browser prefers; or what was chosen, which is kept."""
    color = "getComputedStyle(document.documentElement).backgroundColor"
    light = await page.evaluate(color)
    await page.looks(theme="dark")
    dark = await page.evaluate(color)
    assert light != dark
    await click(page, "Theme: auto")
    assert await page.evaluate(color) == light
    await click(page, "Theme: light")
    assert await page.evaluate(color) == dark
    await page.looks(theme="light")
    assert await page.evaluate(color) == dark
    await page.follow("location.reload()")
    await page.until(button("Theme: dark"))
    assert await page.evaluate(color) == dark
    await click(page, "Theme: dark")
    assert await page.evaluate("localStorage.length") <= 1


async def test_axe_finds_what_is_wrong(page: Page, axe: str) -> None:
    """So its silence means something."""
    await page.evaluate(
        "document.querySelector('main').append(document.createElement('img'), document.createElement('button'),"
        " document.createElement('select'))"
    )
    found = await violations(page, axe)
    assert {one.partition(":")[0] for one in found} == {"image-alt", "button-name", "select-name"}


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing_on_any_screen(page: Page, fleet: Daemon, axe: str, theme: str) -> None:
    """Names, roles, contrasts, order; with a request in flight and a problem."""
    await page.looks(theme=theme)
    async with streaming(fleet):
        for screen in (*SCREENS, HELD):
            await goes(page, screen)
            assert await violations(page, axe) == [], screen


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing_in_the_dialogues(page: Page, fleet: Daemon, axe: str, theme: str) -> None:
    """The one for a key, and the question before something ends."""
    await page.looks(theme=theme)
    await click(page, "Key")
    await page.until("document.querySelector('dialog[open]')")
    assert await violations(page, axe) == []
    await page.press("Escape")
    await page.until("!document.querySelector('dialog')")
    async with streaming(fleet):
        await busy(page)
        await click(page, "Stop chat")
        await page.until("document.querySelector('dialog[open]')")
        assert await violations(page, axe) == []
        await page.press("Escape")
        await page.until("!document.querySelector('dialog')")


async def test_a_change_asks_for_a_key_where_one_is_needed(shared: Daemon, chromium: Browser) -> None:
    """Once, with how to get one; a wrong one is told; with a right one the action is done; a reload forgets it."""
    text = f'[keys.op]\nhash = "{hash_of(KEY)}"\nscopes = ["operate"]\n[keys.anonymous]\nscopes = ["read"]\n'
    async with configured(shared, text):
        page = await chromium.page(f"{shared.url}/ui/")
        await page.front()
        await page.until(f"{row('chat')}?.innerText.includes('ready')")
        await page.evaluate("import('./feed.js').then(feed => { window.feed = feed })")
        await page.until("feed.store.health.control_socket")
        await click(page, "Restart chat")
        port, socket = shared.url.rpartition(":")[2], shared.state_dir / "control.sock"
        await page.until(has("dialog", f"ssh -NL {port}:{socket} SERVER"))
        await page.until(has("dialog", f"localhost:{port}/ui/"))
        await page.until(has("dialog", "[keys.anonymous]"))
        await typed(page, "EMPTY")
        await page.until(has("dialog .why", "key"))
        await typed(page, KEY)
        await page.until(has("#said", "chat restarts"))
        await shared.all_ready()
        assert KEY not in json.dumps(await page.evaluate("({...localStorage, ...sessionStorage, url: location.href})"))
        await page.close()


async def typed(page: Page, key: str) -> None:
    """Give the dialogue a key."""
    await page.until("document.querySelector('dialog[open] input')?.value === ''")
    await page.evaluate(f"document.querySelector('dialog input').value = {json.dumps(key)}")
    await page.evaluate("document.querySelector('dialog button[type=submit]').click()")


async def test_another_key_counts_at_once_and_of_a_forgotten_one_nothing_is_left(
    shared: Daemon, chromium: Browser
) -> None:
    """Streams that run are made anew for it: who may not look hears nothing more."""
    other = new_key(b"o" * 32)
    text = f'[keys.reader]\nhash = "{hash_of(KEY)}"\nscopes = ["read"]\n[keys.app]\nhash = "{hash_of(other)}"\n'
    async with configured(shared, text):
        page = await chromium.page(f"{shared.url}/ui/")
        await page.front()
        await typed(page, KEY)
        await page.until(f"{row('chat')}?.innerText.includes('ready')")
        await click(page, "Key")
        await typed(page, other)
        await page.until("!document.querySelector('.banner').hidden")
        await page.until(has(".connection", "not let in"))
        await click(page, "Key")
        await typed(page, KEY)
        await page.until("document.querySelector('.banner').hidden")
        await page.evaluate("window.before = true")
        await click(page, "Key")
        await page.until(button("Forget it"))
        await page.follow(f"{button('Forget it')}.click()")
        await page.until("window.before === undefined && document.querySelector('dialog[open]')")
        assert not await page.evaluate("document.querySelector('main tbody tr')")
        await page.close()


async def test_who_may_not_look_is_told_how_to(shared: Daemon, chromium: Browser) -> None:
    """The dialogue opens by itself once; declined, the page says why it is empty and asks on a click."""
    text = f'[keys.reader]\nhash = "{hash_of(KEY)}"\nscopes = ["read"]\n'
    async with configured(shared, text):
        page = await chromium.page(f"{shared.url}/ui/")
        await page.front()
        await page.until(has("dialog[open]", ":/run/vllm-proxy/control.sock SERVER"))
        async with shared.session.get("/health") as answer:
            assert set(await answer.json()) == {"status", "version", "models", "error"}, "nor where the socket is"
        await page.press("Escape")
        await page.until("!document.querySelector('dialog')")
        await page.until(has(".banner", "key"))
        await click(page, "Enter a key")
        await typed(page, KEY)
        await page.until(f"{row('chat')}?.innerText.includes('ready')")
        await page.until("document.querySelector('.banner').hidden")
        await page.close()
