"""The page's Playground in a real browser with the real chat model of the demo."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, Page, browser
from tests.browser.pictures import OF_DEMO, of_demo
from tests.browser.screens import button, click, fill, has, sends
from tests.harness import Daemon

pytestmark = [pytest.mark.real, pytest.mark.browser, pytest.mark.timeout(1800)]

ANSWER = "[...document.querySelectorAll('.bubble.assistant > .thought + p')].at(-1)?.innerText ?? ''"
QUESTION = "What is the capital of France?"
TOLD = ".told"


@pytest.fixture(scope="module")
async def chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """One browser for both."""
    async with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
async def page(demo: Daemon, chromium: Browser) -> AsyncIterator[Page]:
    """The Playground, with the chat model."""
    found = await chromium.page(f"{demo.url}/ui/#/play/chat")
    await found.front()
    await found.until("document.querySelector('#play-model').value === 'chat'")
    yield found
    await found.close()


async def told(page: Page) -> str:
    """The figures below an answer."""
    return str(await page.evaluate(f"document.querySelector('{TOLD}').innerText"))


async def test_the_page_shows_what_the_model_says(page: Page, demo: Daemon) -> None:
    """In parts, with when the first token came, how many there were, and who answered; the daemon counts as many.

    What it says to one question at temperature 0 depends on the processor, so it is asked without the page, too.
    """
    asked = {"model": "chat", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 48}
    said = (await demo.post("/v1/chat/completions", asked))["choices"][0]["message"]["content"]
    await fill(page, "temperature", "0")
    await fill(page, "max tokens", "48")
    await page.evaluate(
        f"window.seen = new Set(); new MutationObserver(() => seen.add({ANSWER}))"
        ".observe(document.querySelector('main'), {subtree: true, childList: true, characterData: true})"
    )
    await fill(page, "Message", QUESTION)
    await click(page, "Send")
    await page.until(has(TOLD, "first token"))
    assert (await page.evaluate(ANSWER)).split() == said.split()
    assert await page.evaluate("[...seen].filter(text => text && text !== '…').length") > 2, "it came in parts"
    found = re.search(r"first token\b.*\b(\d+) tokens\b(?!/)", shown := await told(page))
    assert found, shown
    assert "chat/0" in shown
    request_id = await page.evaluate(f"document.querySelector('{TOLD} a').innerText")
    assert (await demo.get(f"/requests/{request_id}"))["completion_tokens"] == int(found[1])
    assert page.complaints == []


async def test_the_command_still_makes_each_picture_of_the_demo(demo: Daemon, tmp_path: Path) -> None:
    """What they show is for people to look at."""
    await of_demo(demo, tmp_path)
    assert {file.stem for file in tmp_path.iterdir()} == {shot.name for shot in OF_DEMO}


async def test_stop_ends_a_long_answer_of_the_model(page: Page, demo: Daemon) -> None:
    """What has come stays; the engine has no request any more, and takes the next one."""
    await sends(page, {"ignore_eos": True, "max_tokens": 900})
    await fill(page, "Message", "Count from one to one thousand.")
    await click(page, "Send")
    await page.until(f"({ANSWER}).length > 10")
    await click(page, "Stop")
    await page.until(has(TOLD, "stopped"))
    await demo.eventually("/requests", lambda found: not found["active"])
    assert len(await page.evaluate(ANSWER)) > 10
    await fill(page, "Message", "again")
    assert await page.evaluate(f"!{button('Send')}.hasAttribute('aria-disabled')")
    assert page.complaints == []
