"""The page at `/ui/` with ids, sources, aliases, globs and messages that are long and have no blank, in any window."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.browser.chromium import Browser, Page
from tests.browser.screens import goes, has
from tests.fakes.ledger import GIB, Devices
from tests.harness import OPEN, Daemon, daemon, fake_engines, port_block

pytestmark = pytest.mark.browser
CHAT_PATH = "/v1/chat/completions"
LONG = ("meta-llama/Llama-3.3-70B-Instruct-FP8-dynamic-" + "0123456789" * 20)[:200]  # the longest id
BROKEN = f"broken-{LONG[:150]}"
REQUEST = "held" * 20
SCREENS = (
    "fleet", f"model/{quote(LONG, safe='')}", f"model/{quote(BROKEN, safe='')}", "requests", f"requests/{REQUEST}",
    "events", "devices", f"config/model/{quote(LONG, safe='')}", f"play/{quote(LONG, safe='')}", "keys", "usage",
)  # fmt: skip
SHOWN = {
    "fleet": "document.querySelectorAll('main tbody tr').length >= 4",
    "model": "document.querySelector('.log div') && document.querySelector('.others')",
    "requests": "document.querySelector('div.ended tbody tr')",
    "events": "document.querySelector('main tbody tr')",
    "devices": f"document.querySelector('.device')?.innerText.includes({json.dumps(LONG)})",
    "config": f"document.querySelector('.editor textarea')?.value.includes({json.dumps(LONG)})",
    "play": f"document.querySelector('.play select')?.value === {json.dumps(LONG)}",
    "keys": "document.querySelectorAll('main tbody tr').length > 1",
    "usage": f"document.querySelector('main tbody')?.innerText.includes({json.dumps(LONG)})",
}
# What is wider than its place: the page, a table in its card, or a text in its cell.
WIDE = """[
  ...[document.documentElement, ...document.querySelectorAll('main .card.wide')]
    .filter(it => it.scrollWidth > it.clientWidth + 1).map(it => `${it.className} ${it.scrollWidth}`),
  ...[...document.querySelectorAll('main td :is(a, span, b, div)')]
    .filter(it => it.checkVisibility() && !it.closest('.unseen') &&
      getComputedStyle(it.closest('td')).overflowX === 'visible' &&
      it.getBoundingClientRect().right > it.closest('td').getBoundingClientRect().right + 1)
    .map(it => `${it.textContent} in ${it.closest('td').className}`),
]"""


def models(folder: Path) -> str:
    """One that is ready, one in error, one that loads, one for later."""
    return f"""
[server]
usage = true
[models."{LONG}"]
model = "org/{"x" * 80}"
aliases = ["{"alias" * 20}"]
replicas = 2
[models."{BROKEN}"]
model = "org/broken"
args = {{ fake_exit_at = "load", fake_exit_text = "ValueError: {"z" * 150}" }}
[models."{BROKEN}".restart]
max_failures = 1
[models."slow-{LONG[:150]}"]
model = "org/slow"
args = {{ fake_phase_until = "weights={folder}/loaded" }}
[models.later]
model = "org/later"
start = "on-demand"
[keys."{"k" * 64}"]
hash = "sha256:{"a" * 64}"
models = ["{LONG}", "*{"g" * 60}*"]
description = "{"d" * 100}"
"""


@pytest.fixture(scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with these models, a device, requests that ended, one of them refused, and one in flight."""
    folder = tmp_path_factory.mktemp("long")
    with Devices(folder / "devices.toml", {"0": 80 * GIB}) as devices:
        options = f'[defaults]\ngpu_memory_utilization = 0.1\n[defaults.args]\nfake_ledger = "{devices.file}"\n'
        text = fake_engines(port_block()) + OPEN + devices.config + options + models(folder)
        async with daemon(text, folder) as running:
            for index in (0, 1):
                await running.once(LONG, lambda it: it["state"] == "ready", index)
            await running.once(BROKEN, lambda it: it["state"] == "error")
            body = {"model": LONG, "messages": [{"role": "user", "content": "hi"}]}
            async with running.session.post(CHAT_PATH, json=body, headers={"X-Request-Id": "e" * 100}) as answer:
                assert answer.status == 200
            async with running.session.post(CHAT_PATH, json={**body, "model": "m" * 100}) as answer:
                assert answer.status == 404
            held = {**body, "stream": True, "fake": {"hang": 1}}
            async with running.session.post(CHAT_PATH, json=held, headers={"X-Request-Id": REQUEST}) as answer:
                assert answer.status == 200
                yield running


@pytest.fixture
async def page(fleet: Daemon, chromium: Browser) -> AsyncIterator[Page]:
    """The page, once it shows the fleet, in front."""
    found = await chromium.page(f"{fleet.url}/ui/")
    await found.front()
    await found.until(has("tbody", "later"))
    yield found
    await found.close()


@pytest.mark.parametrize("width", [320, 390, 500, 768, 800, 1000, 1280])
async def test_nothing_is_wider_than_its_place(page: Page, width: int) -> None:
    """No screen scrolls sideways, nor any table on it, and no text runs into the next column."""
    await page.looks(width=width)
    for screen in SCREENS:
        await goes(page, screen)
        await page.until(SHOWN[screen.partition("/")[0]])
        assert await page.evaluate(WIDE) == [], screen
