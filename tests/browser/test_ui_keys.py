"""The screens Keys and Usage of the page in a real browser."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, Page
from tests.browser.screens import button, click, fill, fits, goes, has
from tests.harness import OPEN, Daemon, daemon, fake_engines, port_block
from vllm_proxy.domain.keys import hash_of

pytestmark = pytest.mark.browser
TABLES = """
[models.chat]
model = "org/chat"
[keys.mounted]
file = "key.txt"
"""
ENV_KEY = "e" * 40
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon where nobody needs a key, and which has keys that a file and the environment give."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "key.txt").write_text("m" * 40)
    text = fake_engines(port_block()) + OPEN + TABLES
    async with daemon(text, folder, env={"VLLM_PROXY_API_KEY": ENV_KEY}) as found:
        await found.all_ready()
        yield found


@pytest.fixture
async def page(running: Daemon, chromium: Browser) -> AsyncIterator[Page]:
    """The screen Keys, once they are there."""
    found = await chromium.page(f"{running.url}/ui/#/keys")
    await found.front()
    await found.looks()
    await found.until(has("main tbody", "anonymous"))
    yield found
    await found.close()


def row(name: str) -> str:
    """An expression: the row of a key."""
    wanted = json.dumps(name)
    return f"[...document.querySelectorAll('main tbody tr')].find(it => it.querySelector('b').innerText === {wanted})"


def shows(name: str, text: str) -> str:
    """An expression: whether the row of a key shows a text."""
    return f"{row(name)}?.innerText.includes({json.dumps(text)})"


async def told_once(page: Page) -> str:
    """The key that is shown."""
    await page.until("document.querySelector('.once input')")
    return str(await page.evaluate("document.querySelector('.once input').value"))


async def make(page: Page, name: str) -> str:
    """Make a key in the form."""
    await page.evaluate("document.querySelector('.more').open = true")
    await fill(page, "Name", name)
    await click(page, "Make the key")
    return await told_once(page)


async def is_good(running: Daemon, key: str) -> bool:
    """Whether it lets somebody in as itself: one that nobody knows is that of `anonymous`."""
    headers = {"Authorization": f"Bearer {key}"}
    async with running.session.get("/v1/models", headers=headers) as answer:
        return answer.status == 200 and hash_of(key) in running.file.read_text()


async def put_away(page: Page) -> None:
    """What is shown once is no longer shown."""
    await click(page, "I have it, put it away")
    await page.until("!document.querySelector('.once input')")


async def test_a_key_is_made_with_what_the_form_says_and_shown_once(page: Page, running: Daemon) -> None:
    """It outlives another screen until it is put away; then the page has it no more."""
    await page.evaluate("document.querySelector('.more').open = true")
    for label, text in (("For what", "a test"), ("Models, globs with commas", "chat, qwen-*"), ("requests/min", "60")):
        await fill(page, label, text)
    await page.evaluate("document.querySelector('input[value=read]').click()")
    key = await make(page, "made")
    assert await is_good(running, key)
    assert key not in running.file.read_text()
    found = await running.get("/keys/made")
    assert [found["description"], found["models"], found["requests_per_minute"]] == ["a test", ["chat", "qwen-*"], 60]
    assert sorted(found["scopes"]) == ["inference", "read"]
    await page.until(shows("made", "60 requests/min"))
    await goes(page, "fleet")
    await goes(page, "keys")
    assert await told_once(page) == key
    await put_away(page)
    assert key not in str(await page.evaluate("document.documentElement.outerHTML"))
    assert page.complaints == []


async def test_a_key_is_rotated_in_two_steps(page: Page, running: Daemon) -> None:
    """Both are good until the rotation is finished, which asks; then the newest alone."""
    old = await make(page, "turned")
    await put_away(page)
    await click(page, "Rotate turned")
    new = await told_once(page)
    assert new != old
    await put_away(page)
    await page.until(shows("turned", "2 are good"))
    assert [await is_good(running, key) for key in (old, new)] == [True, True]
    await click(page, "Finish rotation turned")
    await click(page, "Finish")
    await page.until(shows("turned", "enabled"))
    assert [await is_good(running, key) for key in (old, new)] == [False, True]


async def test_a_key_is_disabled_and_deleted(page: Page, running: Daemon) -> None:
    """Disabled it is refused, enabled good again; to delete it asks."""
    key = await make(page, "going")
    await put_away(page)
    await page.evaluate(f"{button('Disable going')}.focus()")
    await click(page, "Disable going")
    await page.until(shows("going", "disabled"))
    assert await page.evaluate("document.activeElement.innerText") == "Rotate", "what goes takes no focus with it"
    assert not await is_good(running, key)
    await click(page, "Enable going")
    await page.until(shows("going", "enabled"))
    assert await is_good(running, key)
    await click(page, "Delete going")
    await page.until("document.querySelector('dialog')")
    await click(page, "Cancel")
    assert await is_good(running, key)
    await click(page, "Delete going")
    await click(page, "Delete")
    await page.until(f"!{row('going')}")
    assert not await is_good(running, key)


async def test_a_key_that_is_not_put_away_outlives_the_next_one(page: Page, running: Daemon) -> None:
    """Both are shown, the newest first; to put one away leaves the other."""
    first = await make(page, "first")
    await click(page, "Rotate first")
    shown = "[...document.querySelectorAll('.once input')].map(it => it.value)"
    await page.until(f"{shown}.length === 2")
    newest, older = await page.evaluate(shown)
    assert older == first
    assert await is_good(running, newest)
    await click(page, "I have it, put it away")
    assert await page.evaluate(shown) == [first]
    await put_away(page)


async def test_what_is_confirmed_is_what_was_seen(page: Page, running: Daemon) -> None:
    """Keys that change while it is asked whether to delete one: nothing is deleted, they are to be looked at."""
    await make(page, "asked")
    await put_away(page)
    await click(page, "Delete asked")
    await page.until("document.querySelector('dialog')")
    await running.write("PATCH", "/keys/asked", {"description": "in use again"})
    await page.until(shows("asked", "in use again"))
    await click(page, "Delete")
    await page.until(has("main .problem", "Somebody else has changed the keys meanwhile"))
    assert (await running.get("/keys/asked"))["description"] == "in use again"


async def test_what_cannot_be_done_with_a_key_here_is_said_and_not_offered(page: Page) -> None:
    """One of the environment cannot be changed; one that a file holds cannot be rotated."""
    await page.until(shows("env", "VLLM_PROXY_API_KEY gives it"))
    assert not await page.evaluate(f"[...{row('env')}.querySelectorAll('button')].some(it => !it.hidden)")
    await page.until(shows("mounted", "first line of key.txt"))
    assert not await page.evaluate(f"Boolean({button('Rotate mounted')})")
    assert await page.evaluate(f"Boolean({button('Disable mounted')})")


async def test_what_is_refused_is_told_and_nothing_is_written(page: Page, running: Daemon) -> None:
    """A name that there is: the code with its page, the form as it was. A file that nobody may write: why."""
    before = running.file.read_text()
    await page.evaluate("document.querySelector('.more').open = true")
    await fill(page, "Name", "mounted")
    await click(page, "Make the key")
    await page.until(has("main .problem", "Nothing was written."))
    await page.until(has("main .problem .code", "key_exists"))
    assert await page.evaluate("document.querySelector('#key-name').value") == "mounted"
    running.file.chmod(0o444)
    try:
        await click(page, "Disable mounted")
        await page.until(has("main .problem .code", "config_read_only"))
        await page.until(has("main .problem", "no write bit"))
    finally:
        running.file.chmod(0o644)
    assert running.file.read_text() == before


async def test_keys_that_somebody_else_changed_are_looked_at_first(page: Page, running: Daemon) -> None:
    """The list follows the file; a write that is too late writes nothing, and says so."""
    await running.write("POST", "/keys", {"name": "other"}, 201)
    await page.until(shows("other", "enabled"))
    await page.evaluate(
        "((real) => { window.fetch = (url, options) => real(url, options?.method === 'PATCH' ? {...options, headers:"
        " {...options.headers, 'If-Match': '\"an-old-one\"'}} : options) })(window.fetch)"
    )
    await click(page, "Disable other")
    await page.until(has("main .problem", "Somebody else has changed the keys meanwhile"))
    assert (await running.get("/keys/other"))["enabled"] is True
    await running.write("DELETE", "/keys/other", status=204)


async def test_a_list_that_comes_late_is_not_shown_over_a_newer_one(page: Page, running: Daemon) -> None:
    """Two are asked for, the first is answered last: the second stays, and its revision is the one of a write."""
    await page.evaluate(
        "((real) => { window.fetch = async (url, options) => { const answer = await real(url, options);"
        " if (!String(url).endsWith('keys') || window.held) return answer;"
        " window.held = true; await new Promise(go => { window.release = go }); window.late = true; return answer }"
        " })(window.fetch)"
    )
    await running.write("POST", "/keys", {"name": "before"}, 201)
    await page.until("window.release")
    await running.write("POST", "/keys", {"name": "after"}, 201)
    await page.until(shows("after", "enabled"))
    await page.evaluate(
        f"new MutationObserver(() => {{ window.lost ||= !{row('after')} }}).observe("
        "document.querySelector('main tbody'), {childList: true}); window.release()"
    )
    await page.until("window.late")
    await click(page, "Disable after")
    await page.until(shows("after", "disabled"))
    assert not await page.evaluate("window.lost")
    for name in ("before", "after"):
        await running.write("DELETE", f"/keys/{name}", status=204)


async def test_usage_is_shown_by_key_and_model(page: Page, running: Daemon) -> None:
    """Sums, rows, other groups, CSV."""
    await running.post("/v1/chat/completions", CHAT)
    await running.eventually("/usage", lambda found: any(row["requests"] for row in found["rows"]))
    await goes(page, "usage")
    await page.until(has("main tbody", "anonymous"))
    await page.until(has("main tbody", "chat"))
    await page.until(has(".sums", "of answers"))
    assert await page.evaluate("[...document.querySelectorAll('thead th')].map(it => it.innerText).slice(0, 3)") == [
        "Key", "Model", "Requests",
    ]  # fmt: skip
    await fill(page, "by", "day")
    await page.until("document.querySelector('thead th')?.innerText === 'Day'")
    await fill(page, "The last", "30 days")
    await page.until("document.querySelector('thead th')?.innerText === 'Day'")
    assert page.complaints == []


async def test_the_sums_tell_what_was_estimated_too(page: Page, running: Daemon) -> None:
    """As each row does; the shares are of all three."""
    await running.post("/v1/chat/completions", CHAT)
    await running.eventually("/usage", lambda found: any(row["requests"] for row in found["rows"]))
    await page.evaluate(
        "const real = window.fetch; window.fetch = async (where, how) => { const answer = await real(where, how);"
        "if (!String(where).includes('usage')) return answer; const found = await answer.json();"
        "found.rows[0].estimated_tokens = 321; return Response.json(found) }; null"
    )
    await goes(page, "usage")
    await page.until(has(".sums", "321 estimated"))


async def test_without_metering_it_is_said_how_to_turn_it_on(chromium: Browser, shared: Daemon) -> None:
    """A daemon without keys counts nothing."""
    page = await chromium.page(f"{shared.url}/ui/#/usage")
    await page.until(has("main .card", "usage = true"))
    await page.until(has("main .card", "Nothing is counted where there are no keys"))
    await page.close()


@pytest.fixture
async def elsewhere(tmp_path: Path) -> AsyncIterator[Daemon]:
    """A daemon whose keys are in a file of their own, and in the environment."""
    (tmp_path / "keys.toml").write_text('[keys.anonymous]\nscopes = ["admin"]\n')
    text = '[server]\nkeys_file = "keys.toml"\n' + fake_engines(port_block())
    async with daemon(text, tmp_path, env={"VLLM_PROXY_API_KEY": ENV_KEY}) as found:
        yield found


async def test_what_somebody_else_writes_into_the_file_of_keys_is_shown(elsewhere: Daemon, chromium: Browser) -> None:
    """No event tells of it: it is looked at again and again."""
    page = await chromium.page(f"{elsewhere.url}/ui/#/keys")
    await page.front()
    await page.until(has("main tbody", "anonymous"))
    file = elsewhere.folder / "keys.toml"
    file.write_text(file.read_text() + f'[keys.late]\nhash = "{hash_of("l" * 40)}"\n')
    await page.until(row("late"))
    await page.close()


async def test_keys_of_the_environment_are_known_to_be_metered(elsewhere: Daemon, chromium: Browser) -> None:
    """Nobody is told to turn on what is on."""
    page = await chromium.page(f"{elsewhere.url}/ui/#/usage")
    await page.front()
    await page.until(has("main .card", "Nothing was used in that time."))
    assert not await page.evaluate(has("main .card", "usage = true"))
    await page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
async def test_their_pictures(page: Page, running: Daemon, width: int, theme: str, tmp_path: Path) -> None:
    """They fit a phone and a desk."""
    await page.looks(width=width, theme=theme)
    await make(page, f"shown-{width}-{theme}")
    await page.until(row(f"shown-{width}-{theme}"))
    assert await fits(page)
    await page.picture(tmp_path / "keys.png")
    await put_away(page)
    await running.write("DELETE", f"/keys/shown-{width}-{theme}", status=204)
    await running.post("/v1/chat/completions", CHAT)
    await running.eventually("/usage", lambda found: bool(found["rows"]))
    await goes(page, "usage")
    await page.until("document.querySelector('main tbody tr')")
    assert await fits(page)
    await page.picture(tmp_path / "usage.png")
