"""The README and the pages of `vllm_proxy/docs`: as the code is, without a dead link, and none too long."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pages
from vllm_proxy.api.metrics import FAMILIES
from vllm_proxy.api.openapi_routes import OPERATIONS
from vllm_proxy.arguments import parser
from vllm_proxy.domain.config import AdaptersMax, AdapterTable, Devices, EngineDefaults, ModelTable, Restart, Server
from vllm_proxy.domain.key_table import KeyTable
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.domain.moderation_table import ModerationTable
from vllm_proxy.errors import STATUS
from vllm_proxy.help import TOPICS, anchor, sections

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted(pages.DOCS.glob("*.md"))
LINKED = [
    README,
    *sorted((ROOT / ".github").glob("*.md")),
    *PAGES,
    ROOT / "vllm_proxy/HACKING.md",
    ROOT / "vllm_proxy/ARCHITECTURE.md",
]
CODES = [*STATUS, *Reason, *(f"exit-status-{status}" for status in pages.exit_statuses())]


def blocks(file: Path, language: str = "sh") -> list[str]:
    """The blocks of one language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shell_lines(file: Path) -> list[str]:
    """Each line of the blocks of shell in a page."""
    return [line for block in blocks(file) for line in block.splitlines()]


def test_every_page_is_a_topic() -> None:
    """And begins with a title and a sentence for the list of topics."""
    assert sorted(TOPICS) == [page.stem for page in PAGES]
    for page in PAGES:
        assert re.match(r"# [^\n]+\n\n[A-Z][^\n]+\.\n\n", page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_are_as_the_code_is(page: Path) -> None:
    """Names, types, defaults, costs, routes, metrics, codes; `python -m tests.pages` writes them anew."""
    text = page.read_text(encoding="utf-8")
    assert pages.written(text) == text, f"run `{pages.COMMAND}`"
    assert pages.wordless(text) == [], f"say in the last column of {page} what this is"


def test_every_generated_table_stands_in_a_page() -> None:
    """Each of them once."""
    found = [match["name"] for page in PAGES for match in pages.BLOCK.finditer(page.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(pages.TABLES)


def test_every_key_is_in_both_tables_once() -> None:
    """In the one of all keys, and in the one of what a change costs."""
    keys = {*ModelTable.model_fields, *(f"server.{key}" for key in Server.model_fields)}
    keys |= {f"engine.{key}" for key in EngineDefaults.model_fields}
    keys |= {f"devices.{key}" for key in Devices.model_fields}
    text = (pages.DOCS / "changes.md").read_text(encoding="utf-8")
    (table,) = (found["table"] for found in pages.BLOCK.finditer(text))
    shown = re.findall(r"`([a-z_.]+)`", "\n".join(row.split("|")[1] for row in table.splitlines()))
    assert sorted(shown) == sorted(keys)
    text = (pages.DOCS / "configuration.md").read_text(encoding="utf-8")
    rows = [pages.cells_of(line)[0].strip("`") for found in pages.BLOCK.finditer(text)
            for line in found["table"].splitlines()[2:]]  # fmt: skip
    keys = keys - {"restart", "adapters", "adapters_max"} | {f"restart.{key}" for key in Restart.model_fields}
    keys |= {f"adapters.NAME.{key}" for key in AdapterTable.model_fields}
    keys |= {f"adapters_max.{key}" for key in AdaptersMax.model_fields}
    keys |= {f"moderation.{key}" for key in ModerationTable.model_fields}
    assert sorted(rows) == sorted([*keys, *KeyTable.model_fields])


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_a_section(code: str) -> None:
    """What it means, what to look at, what to do; of an error code its HTTP status first."""
    (section,) = (each for each in sections("errors") if each.name == code)
    meaning, look, do = re.split(r"^\*\*(?:Look|Do):\*\* ", section.text, flags=re.MULTILINE)
    assert all(len(part.split()) >= 1 for part in (meaning, look, do))
    if code in STATUS:
        assert meaning.partition("\n\n")[2].startswith(f"HTTP {STATUS[code]}")


def test_no_section_is_about_a_code_that_is_none() -> None:
    """What was removed from the code is removed from the page."""
    text = (pages.DOCS / "errors.md").read_text(encoding="utf-8")
    assert sorted(anchor(title) for title in re.findall(r"^### (.*)$", text, re.MULTILINE)) == sorted(CODES)


def rows_of(page: str, head: str) -> list[str]:
    """The rows of all tables of a page that begin with this head."""
    text = (pages.DOCS / page).read_text(encoding="utf-8")
    tables = re.findall(rf"^\| {re.escape(head)} \|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [row for table in tables for row in table.splitlines()]


@pytest.mark.parametrize(("page", "head", "least"), [("faults.md", "fault", 50), ("security.md", "who | tries", 9)])
def test_every_fault_and_every_threat_names_its_tests(page: str, head: str, least: int) -> None:
    """Each row of such a table ends with tests that exist; but for what nothing stops."""
    known = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (\w+)", file.read_text())
    }
    rows = [row for row in rows_of(page, head) if "**nothing**" not in row]
    assert len(rows) >= least
    for row in rows:
        named = re.findall(r"`(\w+)`", row.rsplit(" | ", 1)[1])
        assert named, row
        assert set(named) <= known, row


def anchors(file: Path) -> set[str]:
    """The addresses within a page."""
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {anchor(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("file", LINKED, ids=lambda file: file.name)
def test_every_link_leads_somewhere(file: Path) -> None:
    """To a file of this repository, and to a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        found = (file.parent / path).resolve() if path else file
        assert found.exists(), target
        assert not heading or heading in anchors(found), target


def test_no_heading_of_a_page_is_there_twice() -> None:
    """A link to it would lead to the first one."""
    for page in PAGES:
        names = [section.name for section in sections(page.stem)]
        assert len(names) == len(set(names)), page


def test_the_readme_is_short() -> None:
    """At most 150 lines; it links to every page."""
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    for page in PAGES:
        assert f"(vllm_proxy/docs/{page.name})" in text


def test_the_readme_says_nothing_to_run_that_the_pages_do_not() -> None:
    """Its blocks are blocks of pages, which are what other tests run; but for how to run these tests."""
    known = [block for page in PAGES for block in (*blocks(page), *blocks(page, "toml"), *blocks(page, "python"))]
    for block in (*blocks(README), *blocks(README, "toml"), *blocks(README, "python")):
        assert block in known or block == "sh packaging/dev test\n"


def commands() -> Iterator[str]:
    """Every command of ours that a page tells somebody to run."""
    for file in (README, *PAGES):
        text = file.read_text(encoding="utf-8")
        for line in (*shell_lines(file), *re.findall(r"`((?:sudo )?vllm-proxy [^`\n]*)`", text)):
            if found := re.match(r"(?:sudo )?(?:\.venv/bin/)?vllm-proxy ([^#|>]*)", line):
                yield found[1].strip()


def test_every_command_in_the_pages_is_one() -> None:
    """With options that it takes."""
    lines = list(commands())
    assert len(lines) > 40
    for line in lines:
        if line in pages.command_names():  # it is talked about
            continue
        if line not in {"COMMAND --help", "--version", "…"}:
            parser().parse_args(line.split())


def test_an_option_stands_in_the_pages_as_each_command_explains_it() -> None:
    """Its default may be another one: `-n` of `events`, of `requests` and of `logs`."""
    text = (pages.DOCS / "commands.md").read_text(encoding="utf-8")
    rows = {tuple(pages.cells_of(line)) for line in text.splitlines()}
    for command, said in (
        ("events", "how many back (default: 50)"),
        ("requests", "how many that have ended (default: 20)"),
        ("logs", "how many lines back (default: 100)"),
    ):
        assert ("`-n, --lines N`", command, said) in rows


def test_every_route_in_the_pages_is_one() -> None:
    """Of each `curl` line the method and the path."""
    routes = {route.replace("{model_id}", "ID") for route in OPERATIONS}
    lines = [line for file in (README, *PAGES) for line in shell_lines(file) if "curl" in line]
    lines += [line for file in PAGES for line in re.findall(r"`(?:sudo )?curl ([^`\n]*)`", file.read_text())]
    assert len(lines) > 20
    for line in lines:
        found = re.search(r"localhost(?::8000)?(/[^ |?`]*)", line)
        if found is None:
            assert "@file" in line, line
            continue
        method = re.search(r"-X (\w+)", line)
        path = re.sub(r"^/models/(chat|small|ID)", "/models/ID", found[1])
        assert f"{method[1] if method else 'POST' if ' -d ' in line else 'GET'} {path}" in routes, line


def test_every_metric_in_the_pages_is_one() -> None:
    """Of ours; of a histogram also its parts."""
    known = {name + part for name in (one.name for one in FAMILIES) for part in ("", "_bucket", "_sum", "_count")}
    for page in PAGES:
        named = set(re.findall(r"\bvllm_proxy_\w*[a-z]\b(?![(/.])", page.read_text(encoding="utf-8")))
        assert named - {"vllm_proxy_"} <= known, page


def test_every_line_of_the_log_that_a_page_quotes_is_written() -> None:
    """Who searches the journal for it finds it: the daemon still has that sentence."""
    text = (pages.DOCS / "operating.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| in the log \|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "vllm_proxy").rglob("*.py"))
    assert len(quoted) > 3
    for sentence in quoted:
        assert f'"{sentence}"' in code
