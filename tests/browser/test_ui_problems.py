"""What the page at `/ui/` tells of what is wrong and of how many are ready: the same as `vllm-proxy status`."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import Browser, Page
from tests.browser.screens import button, click, goes, has
from tests.harness import OPEN, Daemon, daemon, fake_engines, port_block
from vllm_proxy.commands.fleet_table import lines_of, row_of
from vllm_proxy.commands.screen import Screen

pytestmark = pytest.mark.browser
BOXES = "[...document.querySelectorAll('main .problem')].map(it => it.innerText)"
FIGURE = "[...document.querySelectorAll('.figures div')].find(it => it.innerText.startsWith({0}))?.lastChild.innerText"
TURNED = "ValueError: no\u202esuch\u2066thing"
# What `GET /health` says of a daemon that everything is wrong with, but for its file.
WRONG: dict[str, Any] = {
    "not_ended": ["chat/7"],
    "devices": {"managed": 0, "problem": "the driver does not answer"},
    "usage": {"error": "the disk is full"},
    "state": {"error": "the folder is gone"},
    "config": {"certificate_error": "no such pair"},
}


def models(folder: Path) -> str:
    """A replica that fails beside one that is ready, some on demand, one that is off, one whose words are turned."""
    return f"""
[models.half]
model = "org/half"
replicas = 2
args = {{ fake_once = "{folder}/once", fake_exit_at = "load", fake_exit_text = "ValueError: only this one" }}
[models.half.restart]
max_failures = 1
[models.chat]
model = "org/chat"
[models.first]
model = "org/later"
start = "on-demand"
[models.second]
model = "org/later"
start = "on-demand"
[models.turned]
model = "org/turned"
args = {{ fake_exit_at = "load", fake_exit_text = {json.dumps(TURNED)} }}
[models.turned.restart]
max_failures = 1
[models.off]
model = "org/off"
enabled = false
"""


@pytest.fixture(scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with these models, and nobody who needs a key."""
    folder = tmp_path_factory.mktemp("problems")
    async with daemon(fake_engines(port_block()) + OPEN + models(folder), folder) as running:
        await running.once("turned", lambda it: it["state"] == "error")
        await running.once("chat", lambda it: it["state"] == "ready")
        await running.eventually("/models/half", lambda found: states(found) == ["error", "ready"])
        yield running


def states(found: Any) -> list[str]:  # noqa: ANN401 - JSON
    """Those of a model's replicas, in order of the alphabet."""
    return sorted(one["state"] for one in found["status"]["instances"])


@pytest.fixture
async def page(fleet: Daemon, chromium: Browser) -> AsyncIterator[Page]:
    """The page, once it shows the fleet, in front."""
    found = await chromium.page(f"{fleet.url}/ui/")
    await found.front()
    await found.looks()
    await found.until(has("tbody", "half"))
    yield found
    await found.close()


async def status_of(running: Daemon, **more: object) -> str:
    """What `vllm-proxy status` prints, of health with more in it."""
    async with running.admin.get("/events?fleet=1") as stream:
        async for raw in stream.content:
            if raw.startswith(b"data: "):
                rows = [row_of(model) for model in json.loads(raw[6:])["models"]]
                break
    health: Any = {**await running.get("/health"), **more}
    missing = (await running.get("/ready", 503))["not_ready"]
    return "\n".join(lines_of(rows, missing, health, Screen(None, colours=False, shapes=False)))


async def test_a_replica_in_error_beside_one_that_is_ready_is_a_problem(page: Page, fleet: Daemon) -> None:
    """With its message, in the head, at the top of the models and on the screen of its model."""
    await page.until(has(".connection", "live · 2 problems"))
    boxes = await page.evaluate(BOXES)
    assert any("half" in box and "ValueError: only this one" in box for box in boxes), boxes
    assert "half: " in await status_of(fleet)
    order = await page.evaluate("[...document.querySelectorAll('main tbody .name')].map(it => it.innerText)")
    assert order[:2] == ["half", "turned"]
    await page.until(has("main tbody", "1 of 2 replicas, 1 in error"))
    await goes(page, "model/half")
    await page.until(has("main .problem", "only this one"))


async def test_as_many_are_ready_as_status_says(page: Page, fleet: Daemon) -> None:
    """Of those that are wanted: not the disabled ones, nor those on demand that nobody has asked for."""
    ready, later = FIGURE.format("'Ready'"), FIGURE.format("'On demand'")
    await page.until(f"{ready} === '2 / 3' && {later} === '2'")
    assert (await status_of(fleet)).startswith("2 of 3 models ready | 2 on demand")
    await fleet.write("POST", "/models/first/stop", status=202)
    await page.until(f"{ready} === '2 / 3' && {later} === '1'")
    assert (await status_of(fleet)).startswith("2 of 3 models ready | 1 stopped | 1 on demand")


async def test_what_is_wrong_with_the_daemon_itself_is_told(page: Page, fleet: Daemon) -> None:
    """Each as `status` tells it, with what helps: a page of the manual, or a command."""
    health: Any = await fleet.get("/health")
    wrong = {**WRONG, "config": {**health["config"], **WRONG["config"]}}
    told = await status_of(fleet, **wrong)
    await page.evaluate(
        "((real) => { window.fetch = (url, options) => String(url).endsWith('/health') ?"
        f" Promise.resolve(new Response({json.dumps(json.dumps(health | wrong))})) : real(url, options)"
        " })(window.fetch)"
    )
    await page.until(has(".connection", "live · 7 problems"))
    boxes = await page.evaluate(BOXES)
    for text, remedy in (
        ("no such pair", "vllm-proxy reload"),
        ("chat/7: an engine could not be ended", "not_ended"),
        ("the driver does not answer", "scheduling"),
        ("the disk is full", "limits"),
        ("the folder is gone", "operating"),
    ):
        assert text in told
        assert remedy in told
        assert any(text in box and remedy in box for box in boxes), (text, boxes)


async def test_a_file_that_is_refused_and_one_that_waits_are_told_with_what_helps(page: Page, fleet: Daemon) -> None:
    """The command that shows all its problems; the page about changes."""
    good = fleet.file.read_text(encoding="utf-8")
    try:
        fleet.save(good + "[models.bad]\nmodle = 1\n")
        await page.until(f"{BOXES}.some(it => it.includes('The file on disk is refused'))")
        await page.until(f"{BOXES}.some(it => it.includes('vllm-proxy check -c {fleet.file}'))")
        fleet.save(good + '[server]\nhost = "127.0.0.2"\n')
        await page.until(f"{BOXES}.some(it => it.includes('waits for a restart') && it.includes('changes'))")
    finally:
        fleet.save(good)
    await page.until(has(".connection", "live · 2 problems"))


async def test_what_turns_text_around_does_not_reach_the_page(page: Page) -> None:
    """In what an engine has said: in a problem, in its last failure, in its output, in events."""
    shows = "document.querySelector({0})?.textContent.includes('nosuchthing')"
    await page.until(f"{BOXES}.some(it => it.includes('nosuchthing'))")
    await goes(page, "model/turned")
    for place in (".problem", "details.exit p", "details.exit pre", ".log"):
        await page.until(shows.format(json.dumps(f"main {place}")))
    await goes(page, "events")
    await page.until(shows.format("'main tbody'"))
    assert not await page.evaluate(r"/[\u202a-\u202e\u2066-\u2069]/.test(document.documentElement.outerHTML)")


async def test_a_replica_that_failed_is_started_without_a_touch_of_the_other(page: Page, fleet: Daemon) -> None:
    """From the screen of its model: by Start and by Try again."""
    before = {one["pid"] for one in (await fleet.get("/models/half"))["status"]["instances"]} - {None}
    await goes(page, "model/half")
    await page.until("document.querySelector('main .problem [aria-label=\"Try again: half\"]')")
    await click(page, "Start half")
    after = await fleet.eventually("/models/half", lambda found: states(found) == ["ready", "ready"])
    assert before <= {one["pid"] for one in after["status"]["instances"]}
    await page.until("!document.querySelector('main .problem')")
    await page.until(f"!{button('Start half')} || {button('Start half')}.getAttribute('aria-disabled') === 'true'")
