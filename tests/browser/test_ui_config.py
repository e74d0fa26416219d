"""The screen Configuration of the page in a real browser: the plan before anything is written, problems, conflicts."""

import json
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, Page
from tests.browser.screens import button, click, fill, fits, goes, has, value, violations
from tests.harness import OPEN, Daemon, daemon, fake_engines, port_block

pytestmark = pytest.mark.browser
FILE = "models.toml"
MODELS = """
# The one that everybody uses.
[models.chat]            # kept
model = "org/chat"
max_model_len = 4096     # as the card says
"""
VERDICT = "#verdict"
CONFLICT = "main .conflict"
SELECTED = "(it => it.value?.slice(it.selectionStart, it.selectionEnd))(document.activeElement)"
LINES = "document.querySelector('.editor pre').innerText"


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with one model, where nobody needs a key."""
    async with daemon(fake_engines(port_block()) + OPEN + MODELS, tmp_path_factory.mktemp("config")) as found:
        (found.folder / "first.toml").write_text(found.file.read_text())
        await found.all_ready()
        yield found


@pytest.fixture
async def page(running: Daemon, chromium: Browser) -> AsyncIterator[Page]:
    """The screen, once it shows the file and what it means; the file is as at first then and afterwards."""
    first = (running.folder / "first.toml").read_text()
    found = await chromium.page(f"{running.url}/ui/#/config")
    await found.front()
    await found.looks()
    await found.until(has(VERDICT, "In force"))
    assert await value(found, FILE) == first
    yield found
    await found.close()
    running.file.chmod(0o644)
    running.save(first)
    await running.write("POST", "/config/reload")
    await running.all_ready()


async def edit(page: Page, old: str, new: str) -> None:
    """Change something of the text."""
    text = await value(page, FILE)
    assert old in text
    await fill(page, FILE, text.replace(old, new))


async def test_an_edit_is_planned_then_applied_and_the_comments_stay(page: Page, running: Daemon) -> None:
    """The plan and the difference are there before anything is written; applied, the file has just that change."""
    before = running.file.read_text()
    await edit(page, "max_model_len = 4096", "max_model_len = 8192\ndescription = 'd'")
    await page.until(has(VERDICT, "max_model_len 4096 -> 8192"))
    assert await page.evaluate("document.querySelector('.step.replace .word').innerText") == "replace"
    await page.until(has(".diff", "- max_model_len = 4096     # as the card says"))
    await page.until(has(".diff", "+ max_model_len = 8192"))
    assert running.file.read_text() == before
    await click(page, "Apply")
    await page.until(has("#said", "applied"))
    expected = before.replace("max_model_len = 4096", "max_model_len = 8192\ndescription = 'd'")
    assert running.file.read_text() == expected
    await page.until(has(VERDICT, "In force"))
    assert await page.evaluate(f"{button('Undo')}.disabled || {button('Undo')}.hasAttribute('aria-disabled')")
    assert page.complaints == []


async def test_the_keyboard_applies_what_the_plan_has_shown(page: Page, running: Daemon) -> None:
    """Ctrl+S, from the text field; nothing is saved by the browser."""
    await edit(page, "# kept", "# kept, and more")
    await page.until(has(VERDICT, "Nothing changes"))
    await page.press("s", "Control")
    await page.until(has("#said", "applied"))
    assert "# kept, and more" in running.file.read_text()


async def test_what_changes_outside_of_models_is_planned_too(page: Page) -> None:
    """Keys by name, settings with their values, what waits for a restart, and what is to be warned of."""
    server = "[server]\nusage = true\nhost = '127.0.0.2'\nallow_remote_admin = true\n"
    await edit(page, "[keys.anonymous]", f"{server}[keys.anonymous]")
    await edit(page, 'scopes = ["admin"]', 'scopes = ["read"]')
    await page.until(has(VERDICT, "key changed: anonymous"))
    for said in ("server.usage false -> true", "server.host, with the next start", "whoever can connect may change"):
        await page.until(has(VERDICT, said))
    assert page.complaints == []


async def test_a_problem_stands_at_its_line_while_one_types(page: Page, running: Daemon) -> None:
    """With its key and its sentence; a button leads there; what is wrong cannot be applied."""
    before = running.file.read_text()
    await edit(page, "max_model_len = 4096", "max_model_len = 0")
    line = next(i for i, text in enumerate(before.split("\n"), 1) if text.startswith("max_model_len"))
    await page.until(f"{LINES}.includes('● {line}')")
    await page.until(has(VERDICT, "models.chat.max_model_len"))
    await page.until(has(VERDICT, "1 problem"))
    await click(page, f"Line {line}")
    assert str(await page.evaluate(SELECTED)).startswith("max_model_len = 0")
    assert not await page.evaluate(f"!{button('Apply')}.disabled && !{button('Apply')}.hasAttribute('aria-disabled')")
    await page.press("s", "Control")
    await click(page, "Undo")
    await page.until(has(VERDICT, "In force"))
    await page.until(f"!{LINES}.includes('●')")
    assert running.file.read_text() == before


async def test_requests_that_a_plan_touches_are_named_beside_the_button(page: Page, running: Daemon) -> None:
    """Of a model whose engine is replaced, while it answers; no longer once it has."""
    body = {"model": "chat", "stream": True, "messages": [{"role": "user", "content": "hi"}], "fake": {"hang": 1}}
    async with running.session.post("/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        await edit(page, "max_model_len = 4096", "max_model_len = 8192")
        await page.until(has(".touched", "1 request in flight: chat 1"))
    await page.until("document.querySelector('.touched').hidden")


async def conflict(page: Page, running: Daemon) -> None:
    """Somebody else writes the file while a text is not applied yet."""
    await edit(page, "# kept", "# mine")
    await page.until(has(VERDICT, "Nothing changes"))
    await running.write("PATCH", "/models/chat", {"description": "theirs"})
    await page.until(has(CONFLICT, "The file changed meanwhile. Nothing was written."))
    await page.until(has(f"{CONFLICT} .diff", '+ description = "theirs"'))
    assert "# mine" in await value(page, FILE)
    assert "# mine" not in running.file.read_text()


async def test_a_text_can_be_kept_over_what_somebody_else_wrote(page: Page, running: Daemon) -> None:
    """The difference then takes their line out again; applied, the file is that text."""
    await conflict(page, running)
    await click(page, "Keep my text, over theirs")
    await page.until(has(".beside .diff", '- description = "theirs"'))
    await click(page, "Apply")
    await page.until(has("#said", "applied"))
    text = running.file.read_text()
    assert "# mine" in text
    assert "theirs" not in text


async def test_what_somebody_else_wrote_can_be_taken(page: Page, running: Daemon) -> None:
    """The text is then theirs, and there is nothing to apply."""
    await conflict(page, running)
    await click(page, "Take theirs")
    await page.until(has(VERDICT, "In force"))
    assert await value(page, FILE) == running.file.read_text()
    assert "theirs" in running.file.read_text()


async def test_a_write_that_is_too_late_is_told_and_writes_nothing(page: Page, running: Daemon) -> None:
    """412, where the page has not heard of the other one yet: the same question."""
    other = {"method": "PATCH", "headers": {"Content-Type": "application/json"}, "body": '{"description": "theirs"}'}
    await page.evaluate(
        "((real) => { window.fetch = async (url, options) => {"
        f" if (options?.method === 'PUT') await real('../models/chat', {json.dumps(other)});"
        " return real(url, options) } })(window.fetch)"
    )
    await edit(page, "# kept", "# mine")
    await click(page, "Apply")
    await page.until(has(CONFLICT, "The file changed meanwhile. Nothing was written."))
    assert "theirs" in running.file.read_text()
    assert "# mine" not in running.file.read_text()


async def test_a_file_that_changes_is_followed_while_nothing_is_typed(page: Page, running: Daemon) -> None:
    """No question is asked where there is no text to lose."""
    await running.write("PATCH", "/models/chat", {"description": "new"})
    await page.until(f"document.querySelector('textarea').value.includes({json.dumps('description = "new"')})")
    await page.until(has(VERDICT, "In force"))
    assert not await page.evaluate("Boolean(document.querySelector('main .conflict'))")


async def test_a_text_that_is_not_applied_outlives_its_screen(page: Page, running: Daemon) -> None:
    """Another screen and back: it is there, with its plan."""
    await edit(page, "max_model_len = 4096", "max_model_len = 8192")
    await goes(page, "fleet")
    await goes(page, "config")
    await page.until(has(VERDICT, "max_model_len 4096 -> 8192"))
    assert "8192" in await value(page, FILE)
    assert "8192" not in running.file.read_text()
    await click(page, "Undo")
    await page.until(has(VERDICT, "In force"))


async def test_nothing_can_be_typed_before_the_file_is_there(page: Page, running: Daemon) -> None:
    """A text that is not applied is not lost, though its screen comes up without a connection."""
    await edit(page, "# kept", "# mine")
    await goes(page, "fleet")
    await page.evaluate(
        "((real) => { window.real = real; window.fetch = (url, options) =>"
        " String(url).endsWith('/config') ? Promise.reject(new TypeError('lost')) : real(url, options) })(window.fetch)"
    )
    await goes(page, "config")
    await page.until(has("main .problem", "The file cannot be shown"))
    assert await page.evaluate("document.querySelector('.editor textarea').readOnly")
    await page.evaluate("window.fetch = window.real")
    await click(page, "Try again")
    await page.until("document.querySelector('.editor textarea').value.includes('# mine')")
    assert not await page.evaluate("document.querySelector('.editor textarea').readOnly")
    await click(page, "Undo")
    assert await value(page, FILE) == running.file.read_text()


async def test_a_file_that_nobody_may_write_is_shown_as_such_at_once(page: Page, running: Daemon) -> None:
    """The field takes no text; it is said why; the text can be copied; there is nothing to apply."""
    running.file.chmod(0o444)
    await goes(page, "fleet")
    await goes(page, "config")
    await page.until(has("main .problem", "Read-only."))
    await page.until(has("main .problem", "it has no write bit"))
    await goes(page, "config/copy/chat")
    await page.until(has("main .problem", "it has no write bit"))
    await page.until(f"{SELECTED}?.startsWith('[models.chat]')")
    assert "chat-copy" not in await value(page, FILE)
    assert await page.evaluate("document.querySelector('.editor textarea').readOnly")
    assert await page.evaluate(f"{button('Copy the text')} && !{button('Apply')}") is True


async def test_a_text_outlives_that_its_file_can_no_longer_be_written(page: Page, running: Daemon) -> None:
    """It is shown, to be copied; to undo it shows the file."""
    await edit(page, "# kept", "# mine")
    await goes(page, "fleet")
    running.file.chmod(0o444)
    await goes(page, "config")
    await page.until(has("main .problem", "Read-only."))
    assert "# mine" in await value(page, FILE)
    await click(page, "Undo")
    assert "# mine" not in await value(page, FILE)


async def test_a_new_model_is_typed_in_and_planned(page: Page) -> None:
    """#/config/new adds a table with the cursor in it; #/config/model/ID leads to one."""
    await goes(page, "config/new")
    await page.until("document.querySelector('textarea').value.endsWith('[models.new]\\nmodel = \"\"\\n')")
    await page.until(has(VERDICT, "models.new.model"))
    text = await value(page, FILE)
    await goes(page, "fleet")
    await goes(page, "config/new")
    await page.until(f"{SELECTED} === 'model = \"\"'")
    assert await value(page, FILE) == text, "an untouched one is gone to, not added to"
    await edit(page, 'model = ""', 'model = "org/new"')
    await page.until(has(VERDICT, "start"))
    await goes(page, "fleet")
    await goes(page, "config/new")
    await page.until("document.querySelector('textarea').value.endsWith('[models.new-2]\\nmodel = \"\"\\n')")
    await click(page, "Undo")
    await goes(page, "config/model/chat")
    await page.until(
        "document.activeElement.value?.slice(document.activeElement.selectionStart).startsWith('[models.chat]')"
    )


async def test_a_model_is_copied_beside_itself_and_nothing_is_written(page: Page, running: Daemon) -> None:
    """Its tables and comments follow it under a new id, which is selected, without what no two models may have."""
    more = 'aliases = ["gpt"]\n[models.chat.args]\nfake_x = 1 # an option\n\n# Last.\n[models.last]\nmodel = "l"\n'
    running.save(running.file.read_text() + more)
    await running.write("POST", "/config/reload")
    await running.all_ready()
    before = running.file.read_text()
    await goes(page, "model/chat")
    await page.until("document.querySelector('main .push a[href=\"#/config/copy/chat\"]')?.innerText === 'Copy'")
    await page.evaluate("document.querySelector('main .push a[href=\"#/config/copy/chat\"]').click()")
    await page.until(has(VERDICT, "chat-copy"))
    copy = MODELS.strip().replace("models.chat", "models.chat-copy")
    copy += "\n[models.chat-copy.args]\nfake_x = 1 # an option\n"
    assert await value(page, FILE) == before.replace("\n# Last.", f"\n{copy}\n# Last.")
    assert await page.evaluate(SELECTED) == "chat-copy"
    steps = await page.evaluate(
        "[...document.querySelectorAll('.step')].map(it => it.innerText.split(/\\s+/, 2).join())"
    )
    assert steps == ["start,chat-copy"]
    assert running.file.read_text() == before
    await goes(page, "fleet")
    await goes(page, "config")
    await page.until(has(VERDICT, "chat-copy"))
    assert (await value(page, FILE)).count("[models.chat-copy]") == 1, "to come back adds no other one"
    await goes(page, "config/copy/chat")
    await page.until(f"{SELECTED} === 'chat-copy-2'")
    assert page.complaints == []


@pytest.mark.parametrize(
    ("text", "copied"),
    [
        ("[models.a]\nmodel = 'x' # it's\n[models.b]\nmodel = 'b'", "a"),
        ('[models]\n[models . "a.x"] # "\nmodel = "x"\n\n[models.\'a.x\'.restart]\nmax_failures = 1', "a.x"),
        ('[models.a]\naliases = [ # "\n "b]", # c\n]\nargs.s = """\n[models.b]\n"""\n# below\n\n# far', "a"),
        ('[models.a.adapters.s]\np="p" # "\n[o]\n[models.a.env]\nX="1"\n[[models.a.metadata.l]]', "a"),
        ('[models.a]\nadapters.s.path = "p"\nadapters_max = {rank = 8}\n[models.a-copy]\nmodel="y"', "a"),
        ('[models."\\u00e9\\U0001F600\\""]\nmodel="x"\n', 'é😀"'),
    ],
)  # fmt: skip
async def test_a_copy_means_the_same_however_its_tables_are_laid_out(page: Page, text: str, copied: str) -> None:
    """Beside it everything stays, line by line."""
    call = f"withCopy({json.dumps(text)}, {json.dumps(copied)}, ['b'])"
    made = await page.evaluate(f"import('./toml.js').then(toml => toml.{call})")
    before, after = tomllib.loads(text), tomllib.loads(made["text"])
    name = f"{copied}-copy" if f"{copied}-copy" not in before["models"] else f"{copied}-copy-2"
    copy = after["models"].pop(name)
    assert after == before
    assert copy == {key: it for key, it in before["models"][copied].items() if key not in {"aliases", "adapters"}}
    chosen = made["text"].encode("utf-16-le")[2 * made["from"] : 2 * made["to"]].decode("utf-16-le")
    assert tomllib.loads(f"{chosen} = 1") == {name: 1}
    rest = iter(made["text"].splitlines())
    assert all(line in rest for line in text.splitlines())


async def test_a_change_that_would_do_is_typed_in_and_planned(page: Page, running: Daemon) -> None:
    """From the problem on the fleet: the value alone, its comment stays; nothing is written before Apply."""
    said = (
        "max seq len (8192), (1.0 GiB KV cache is needed, which is larger than the available KV cache memory (0.5 GiB)."
        " Based on the available memory, the estimated maximum model length is 2048. Try"
    )
    model = "[models.long]\nmodel = 'org/long'\nmax_model_len = 8192 # wide\nrestart.max_failures = 1\n"
    fails = f"{model}args = {{ fake_exit_at = 'profile', fake_exit_text = \"{said}\" }}\n"
    running.save(text := running.file.read_text() + fails)
    await running.write("POST", "/config/reload")
    await running.once("long", lambda one: one["state"] == "error")
    await goes(page, "fleet")
    change = "document.querySelector('main .problem a[href=\"#/config/change/long\"]')"
    await page.until(f"{change}?.innerText === 'Change…' && {change}.title.startsWith('max_model_len = 2048')")
    await page.evaluate(f"{change}.click()")
    await page.until(has(VERDICT, "max_model_len 8192 -> 2048"))
    wanted = text.replace("max_model_len = 8192", "max_model_len = 2048")
    assert (await value(page, FILE), await page.evaluate(SELECTED)) == (wanted, "2048")
    assert running.file.read_text() == text
    await click(page, "Apply")
    await page.until(has("#said", "applied"))
    assert running.file.read_text() == wanted
    assert page.complaints == []


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("[models.a]\nmodel = 'x' # y\n# z\n\n[models.b]", "[models.a]\nmodel = 'x' # y\nk = 5\n# z\n\n[models.b]"),
        ("[models.a]", "[models.a]\nk = 5\n"),
        ("[models.a]\n  k='#'#c\n[models.b]\nk = 1", "[models.a]\n  k=5#c\n[models.b]\nk = 1"),
        ("[models.a]\n\tb = 2\n[models.a.l]\nk = 1\n", "[models.a]\n\tb = 2\n\tk = 5\n[models.a.l]\nk = 1\n"),
        ("[models]\na.k = 0.25\n", "[models]\na.k = 5\n"),
        ("models.a = {k = 1}\n", None),
        ("[models.a]\nk = [\n1]\n", None),
    ],
)  # fmt: skip
async def test_a_key_is_set_where_it_stands_or_behind_the_others(page: Page, text: str, changed: str | None) -> None:
    """Nothing else is touched; where there is no place for it nothing is typed in."""
    made = await page.evaluate(f"import('./toml.js').then(toml => toml.withKey({json.dumps(text)}, 'a', 'k', 5))")
    assert (made and made["text"]) == changed
    assert made is None or made["text"][made["from"] : made["to"]] == "5"


async def test_what_cannot_be_copied_as_text_says_so(page: Page, running: Daemon) -> None:
    """A model in one line, within another table: its line is shown, and nothing is typed."""
    text = (running.folder / "first.toml").read_text().replace("[models.chat] ", "[models]\n[models.chat] ")
    text = text.replace("[models]\n", '[models]\none = { model = "org/one" }\n')
    running.save(text)
    await running.write("POST", "/config/reload")
    await running.all_ready()
    await goes(page, "config/copy/one")
    await page.until(has("main .problem", "one has no table [models.ID] of its own"))
    assert await page.evaluate(SELECTED) == 'one = { model = "org/one" }'
    assert await value(page, FILE) == text


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing_in_a_plan_a_problem_or_a_conflict(
    page: Page, running: Daemon, axe: str, theme: str
) -> None:
    """What stands beside the text is read, too."""
    await page.looks(theme=theme)
    await edit(page, "max_model_len = 4096", "max_model_len = 8192")
    await page.until(has(VERDICT, "max_model_len 4096 -> 8192"))
    assert await violations(page, axe) == []
    await edit(page, "max_model_len = 8192", "max_model_len = 0")
    await page.until(has(VERDICT, "1 problem"))
    assert await violations(page, axe) == []
    await click(page, "Undo")
    await page.until(has(VERDICT, "In force"))
    await conflict(page, running)
    assert await violations(page, axe) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
async def test_its_pictures(page: Page, width: int, theme: str, tmp_path: Path) -> None:
    """It fits a phone and a desk, with a plan, with a problem."""
    await page.looks(width=width, theme=theme)
    await edit(page, "max_model_len = 4096", "max_model_len = 8192")
    await page.until(has(VERDICT, "8192"))
    assert await fits(page)
    await page.picture(tmp_path / "plan.png")
    await edit(page, "max_model_len = 8192", "max_model_len = 0")
    await page.until(has(VERDICT, "1 problem"))
    assert await fits(page)
    await page.picture(tmp_path / "problem.png")
