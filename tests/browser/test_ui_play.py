"""The screen Playground of the page in a real browser: chats, embeddings, rankings, with their figures."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, Page
from tests.browser.screens import button, click, fill, fits, goes, has, sends
from tests.harness import OPEN, Daemon, daemon, fake_engines, port_block

pytestmark = pytest.mark.browser
TOLD = ".told"
TOLD_TEXT = f"document.querySelector('{TOLD}').innerText"
MESSAGE = "Message"
ANSWERS = "[...document.querySelectorAll('.bubble.assistant > p:last-of-type')].map(it => it.innerText.trim())"
WHOLE = "t0 t1 t2 t3 t4"


def models(folder: Path) -> str:
    """One that answers, twice; one that loads until a file is there; one that fails."""
    return f"""
[models.chat]
model = "org/chat"
aliases = ["gpt-4o-mini"]
replicas = 2
[models.slow]
model = "org/slow"
args = {{ fake_phase_until = "weights={folder}/loaded" }}
[models.broken]
model = "org/broken"
args = {{ fake_exit_at = "load", fake_exit_text = "ValueError: no such thing" }}
[models.broken.restart]
max_failures = 1
"""


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon where nobody needs a key."""
    folder = tmp_path_factory.mktemp("play")
    async with daemon(fake_engines(port_block()) + OPEN + models(folder), folder) as found:
        for index in (0, 1):
            await found.once("chat", lambda it: it["state"] == "ready", index)
        await found.once("broken", lambda it: it["state"] == "error")
        yield found


@pytest.fixture
async def page(running: Daemon, chromium: Browser) -> AsyncIterator[Page]:
    """The screen, with the model that answers."""
    found = await chromium.page(f"{running.url}/ui/#/play/chat")
    await found.front()
    await found.looks()
    await found.until("document.querySelector('#play-model').value === 'chat'")
    yield found
    await found.close()


async def say(page: Page, text: str, label: str = MESSAGE) -> None:
    """Type something and send it."""
    await fill(page, label, text)
    await click(page, "Send")


async def test_a_chat_streams_with_its_figures(page: Page, running: Daemon) -> None:
    """The text, when its first token came, its tokens, who answered; the request's id leads to its row."""
    await say(page, "hello")
    await page.until(f"{ANSWERS}.join() === '{WHOLE}'")
    await page.until(has(TOLD, "5 tokens"))
    told = str(await page.evaluate(f"document.querySelector('{TOLD}').innerText"))
    assert told.startswith("first token after ")
    assert any(f"chat/{index}" in told for index in (0, 1))
    assert page.complaints == []
    request_id = await page.evaluate(f"document.querySelector('{TOLD} a').innerText")
    await page.evaluate(f"document.querySelector('{TOLD} a').click()")
    await page.until(has("main dl", str(request_id)))
    assert (await running.get(f"/requests/{request_id}"))["completion_tokens"] == 5


async def test_the_next_message_goes_with_what_was_said(page: Page) -> None:
    """And with the system message; a new chat begins without."""
    await page.evaluate("document.querySelector('.system').open = true")
    await fill(page, "System", "be brief")
    await fill(page, "max tokens", "7")
    await fill(page, "temperature", "0.5")
    await page.evaluate(
        "((real) => { window.sent = []; window.fetch = (url, options) => {"
        " if (options?.body) window.sent.push(JSON.parse(options.body)); return real(url, options) } })(window.fetch)"
    )
    for text, count in (("one", 1), ("two", 2)):
        await say(page, text)
        await page.until(f"{ANSWERS}.filter(text => text === '{WHOLE}').length === {count}")
        await page.until(has(TOLD, "5 tokens"))
    first, second = await page.evaluate("window.sent")
    assert [first["max_tokens"], first["temperature"], first["stream"]] == [7, 0.5, True]
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    await click(page, "New chat")
    await say(page, "three")
    await page.until("window.sent.length === 3")
    assert [message["content"] for message in (await page.evaluate("window.sent"))[2]["messages"]] == [
        "be brief", "three",
    ]  # fmt: skip


async def test_a_conversation_outlives_a_look_at_another_kind(page: Page) -> None:
    """The pressed tab does nothing, an answer that comes goes on; another kind and back: it is there."""
    await sends(page, {"fake": {"hang": 2}})
    await say(page, "hello")
    await page.until(f"{ANSWERS}.join() === 't0 t1'")
    await click(page, "Chat")
    assert await page.evaluate(f"{ANSWERS}.join()") == "t0 t1"
    assert not await page.evaluate(f"{button('Stop')}.hasAttribute('aria-disabled')")
    await click(page, "Stop")
    await page.until(has(TOLD, "stopped"))
    await click(page, "Embeddings")
    assert await page.evaluate(f"{ANSWERS}.length") == 0
    await click(page, "Chat")
    assert await page.evaluate(f"{ANSWERS}.join()") == "t0 t1"


async def test_a_chat_can_be_stopped(page: Page, running: Daemon) -> None:
    """What came so far stays, its engine stops, and another message can be sent."""
    await sends(page, {"fake": {"hang": 2}})
    await say(page, "hello")
    await page.until(f"{ANSWERS}.join() === 't0 t1'")
    await click(page, "Stop")
    await page.until(has(".bubble.assistant", "Stopped."))
    await page.until(has(TOLD, "stopped"))
    await running.eventually("/requests", lambda found: not found["active"])
    await fill(page, MESSAGE, "again")
    assert await page.evaluate(f"!{button('Send')}.disabled")


async def test_several_at_once_are_counted_together(page: Page) -> None:
    """Each has its bubble; both replicas answer; 32 is the most."""
    await fill(page, "at once", "99")
    assert await page.evaluate("[...document.querySelectorAll('.settings input')][1].value") == "32"
    await fill(page, "at once", "4")
    await sends(page, {"fake": {"interval": 0.02}})
    await say(page, "hello")
    await page.until(f"{ANSWERS}.filter(text => text === '{WHOLE}').length === 4")
    await page.until(has(TOLD, "20 tokens"))
    told = str(await page.evaluate(f"document.querySelector('{TOLD}').innerText"))
    for part in ("tokens/s each", "together", "chat/0, chat/1"):
        assert part in told


async def test_every_name_that_clients_may_send_can_be_chosen(page: Page) -> None:
    """Models with their states, and the aliases."""
    texts = "[...document.querySelectorAll('#play-model option')].map(it => it.innerText)"
    await page.until(f"{texts}.includes('gpt-4o-mini')")
    assert await page.evaluate(texts) == ["chat (ready)", "slow (loading)", "broken (error)", "gpt-4o-mini"]
    await fill(page, "Model", "gpt-4o-mini")
    await say(page, "hello")
    await page.until(f"{ANSWERS}.join() === '{WHOLE}'")


async def test_an_error_has_its_words_and_its_code(page: Page, running: Daemon) -> None:
    """The daemon's own; the message is there to be sent again; the code leads to its page."""
    await fill(page, "Model", "broken")
    await say(page, "hello")
    await page.until("document.querySelector('.failed .code')")
    shown = str(await page.evaluate("document.querySelector('.failed').innerText"))
    error = (await running.post("/v1/chat/completions", {"model": "broken", "messages": []}, 503))["error"]
    assert error["code"] in shown
    assert error["message"][:40] in shown
    assert await page.evaluate("document.querySelector('.failed .code').href") == f"{running.url}/help/{error['code']}"
    assert await page.evaluate("document.querySelector('textarea.say').value") == "hello"


async def test_a_wait_shows_how_far_the_model_is(page: Page, running: Daemon) -> None:
    """Its phase, until the answer comes."""
    await fill(page, "Model", "slow")
    await say(page, "hello")
    await page.until(has(".waits", "slow is loading"))
    await page.until(has(".waits", "weights"))
    (running.folder / "loaded").touch()
    await page.until(f"{ANSWERS}.join() === '{WHOLE}'")
    await page.until("document.querySelector('.waits').hidden")
    await page.until(f"/^[0-9.]+ m?s in the queue, first token [0-9.]+ m?s later/.test({TOLD_TEXT})")
    queue, first, whole = times(str(await page.evaluate(TOLD_TEXT)))
    assert queue + first <= whole * 1.1 + 1


def times(told: str) -> list[float]:
    """All times among the figures, in seconds."""
    return [float(n) / (1000 if unit == "ms" else 1) for n, unit in re.findall(r"([0-9.]+) (m?s)\b", told)]


@pytest.mark.parametrize(
    ("answers", "together"),
    [
        ([(12_000, 13_000, 11), (12_000, 13_000, 11)], 20.0),
        ([(1000, 2000, 11), (3000, 4000, 11)], 20 / 3),
        ([(1000, 2000, 11), (None, 2000, 0)], None),
    ],
)
async def test_the_speed_of_several_counts_as_that_of_each(
    page: Page, answers: list[tuple[int | None, int, int]], together: float | None
) -> None:
    """From the first token to the last one; what they waited in a queue before is in neither."""
    made = [
        {"first": first, "last": last, "tokens": n, "rate": None if first is None else (n - 1) / (last - first) * 1000}
        for first, last, n in answers
    ]
    found = await page.evaluate(f"import('./play_ask.js').then(it => it.rateTogether({json.dumps(made)}))")
    assert found == (together and pytest.approx(together))


async def test_texts_are_compared(page: Page) -> None:
    """A line each; the table has the cosine of each pair."""
    await click(page, "Embeddings")
    await say(page, "a cat\na dog\na cat", "Texts, one a line")
    await page.until("document.querySelectorAll('.alike tbody tr').length === 3")
    cells = "[...document.querySelectorAll('.alike tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    assert await page.evaluate(cells) == [
        ["1. a cat", "1.00", "0.00", "1.00"],
        ["2. a dog", "0.00", "1.00", "0.00"],
        ["3. a cat", "1.00", "0.00", "1.00"],
    ]
    await page.until(has(TOLD, "2 dimensions"))
    assert page.complaints == []
    await fill(page, "Model", "broken")
    await click(page, "Send")
    await page.until("document.querySelector('.failed .code')")
    assert not await page.evaluate("document.querySelector('.alike')"), "an error stands beside no other's table"


async def test_documents_are_ranked(page: Page) -> None:
    """The first line is the query; the best document comes first."""
    await click(page, "Ranking")
    await say(page, "red cat\na blue dog\na red cat\na red dog", "Query and documents")
    await page.until("document.querySelectorAll('.talk tbody tr').length === 3")
    cells = "[...document.querySelectorAll('.talk tbody td:last-child')].map(cell => cell.innerText)"
    assert await page.evaluate(cells) == ["a red cat", "a red dog", "a blue dog"]


async def test_what_is_asked_can_be_copied_as_a_command(page: Page, running: Daemon) -> None:
    """For curl and for Python, with the daemon's address and what is typed in."""
    await page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    await fill(page, MESSAGE, "it's me")
    await click(page, "Copy as curl")
    await page.until("window.copied")
    curl = str(await page.evaluate("window.copied"))
    assert f"{running.url}/v1/chat/completions" in curl
    assert "it'\\''s me" in curl
    await page.evaluate("window.copied = ''")
    await click(page, "Copy as Python")
    await page.until("window.copied")
    python = str(await page.evaluate("window.copied"))
    assert f'base_url="{running.url}/v1"' in python
    compile(python, "copied", "exec")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
async def test_its_pictures(page: Page, width: int, theme: str, tmp_path: Path) -> None:
    """It fits a phone and a desk, with answers and with a table."""
    await page.looks(width=width, theme=theme)
    await fill(page, "at once", "2")
    await say(page, "Tell me about routers. " * 5)
    await page.until(has(TOLD, "10 tokens"))
    assert await fits(page)
    await page.picture(tmp_path / "chat.png")
    await click(page, "Embeddings")
    await say(
        page,
        "\n".join(["a cat sits on the mat", "a dog", "a cat sits on the mat", "it rains"] * 2),
        "Texts, one a line",
    )
    await page.until("document.querySelector('.alike')")
    assert await fits(page)
    await page.picture(tmp_path / "alike.png")
    await goes(page, "fleet")
