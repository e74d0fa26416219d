"""The rules of the house that a program can check."""

import ast
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from vllm_proxy import errors
from vllm_proxy.domain import lifecycle
from vllm_proxy.domain.config import AdaptersMax, AdapterTable, Devices, EngineDefaults, ModelTable, Restart, Server
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.key_table import KeyTable, RateTable
from vllm_proxy.domain.moderation_table import ModerationTable

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vllm_proxy"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "models.toml.example", *sorted(PACKAGE.rglob("*.md"))]


# Metaphors that grew here, and that nobody would search for. Behind each: what it is called elsewhere.
PRIVATE_WORDS = {
    r"one rule": "say what must not be done, and which test holds it",
    r"bur(y|ies|ied|ying)": "reap",
    r"hurr(y|ies|ied)": "flush",
    r"haste": "flush",
    r"surroundings": "environment, dependencies",
    r"doors?": "route, entry point",
    r"seats?": "slot, allocation",
    r"letters? to": "notification, message",
    r"deaf": "does not respond",
    r"neighbours?": "another model, another process",
    r"hears?|heard": "is notified, received",
    r"pays?": "costs",
    r"blames?": "reports",
    r"who comes": "what starts",
    r"change of mind": "a change",
    r"word by hand": "command",
    r"last words": "last lines",
    r"mercy|grave|funeral|undertaker|midwife": "the standard term",
}
OF_PAGES = {
    r"mend(s|ed|ing)?": "fix",
    r"rests? in": "stays in",
    r"honest(ly)?": "what is meant: complete, normal, one outcome",
    r"unaware|in peace|as ever": "nothing, end first, as usual",
}


def private_words(text: str, words: Mapping[str, str]) -> dict[str, str]:
    """Those that are found in a text, with what to say instead."""
    text = re.sub(r"[\s_#]+", " ", text)  # a phrase may be broken over lines, or be a part of a name
    return {match[0]: term for word, term in words.items() for match in re.finditer(rf"(?i)\b(?:{word})\b", text)}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_uses_private_words(module: Path) -> None:
    """A stranger finds a place by the field's standard term: names, comments and docstrings have no others."""
    assert not private_words(module.read_text(), PRIVATE_WORDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_page_uses_private_words(page: Path) -> None:
    """Nor do the pages, which also say things as plainly as they can; names of tests aside."""
    text = re.sub(r"`test_\w+`", "", page.read_text())
    assert not private_words(text, {**PRIVATE_WORDS, **OF_PAGES})


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_own(module: Path) -> None:
    """A module opens with what it owns and for whom: with two sentences at least, or with a line that is full."""
    text = ast.get_docstring(ast.parse(module.read_text())) or ""
    assert len(re.findall(r"[.?!](?=\s|$)", text)) >= 2 or len(text) >= 80


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(module: Path) -> None:
    """No module has more than 400 lines, no function more than 60."""
    text = module.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


# Who owns what the event loop calls: a callback that raises is logged by `background.log_faults`, and then this holds.
CALLBACKS = {
    ("traffic/fan_out.py", "add_done_callback"),  # a lease is released
    ("traffic/client.py", "call_later"),  # a connection too many: its client ends it, or the next one takes its place
    ("traffic/direct_connection.py", "call_at"),  # as aiohttp's own: the end of an idle connection
    ("traffic/direct_connection.py", "call_soon"),  # what came behind a request: its client waits for an answer
    ("traffic/handshake.py", "call_soon"),  # the handshake that it begins has a deadline
    ("api/readers.py", "add_done_callback"),  # an open stream, which ends with its connection at the latest
    ("traffic/front.py", "call_later"),  # the next sweep is set first
    ("demo/watch.py", "call_later"),  # the next line on the terminal, which only tells
    ("daemon.py", "add_signal_handler"),  # three that set events
    ("runtime/background.py", "add_done_callback"),  # a set
    ("engine/state_files.py", "call_later"),  # the next change of the state writes it
    ("engine/check.py", "add_done_callback"),  # a set
    ("runtime/clock.py", "call_later"),  # the next beat is set first
    ("runtime/exclusive.py", "add_done_callback"),  # a set
    ("fleet/model.py", "add_done_callback"),  # the fleet loop decides again after every change
    ("engine/process.py", "add_reader"),  # the end of an engine
    ("fleet/reconciler.py", "add_done_callback"),  # a set
    ("runtime/threads.py", "add_done_callback"),  # a semaphore
    ("runtime/threads.py", "call_soon_threadsafe"),  # as above
    ("status.py", "call_at"),  # the next change shows it
}
MAKES_A_TASK = {"create_task", "ensure_future", "TaskGroup"}
CALLS_BACK = {
    *("call_later", "call_at", "call_soon", "call_soon_threadsafe", "add_done_callback", "add_reader", "add_writer"),
    *("add_signal_handler", "schedule"),
}


def called(module: Path) -> Iterator[tuple[str, str]]:
    """Each function that a module calls by its name: the module, and the name's last part."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield str(module.relative_to(PACKAGE)), name.lstrip("_")


def test_every_task_is_made_where_a_failure_is_seen() -> None:
    """`runtime/background.py` makes tasks, and nothing else does."""
    makers = {(module, name) for path in MODULES for module, name in called(path) if name in MAKES_A_TASK}
    assert makers == {("runtime/background.py", "create_task")}


def test_every_callback_has_an_owner() -> None:
    """A new one has to say here who goes on where it fails."""
    assert {(module, name) for path in MODULES for module, name in called(path) if name in CALLS_BACK} == CALLBACKS


def test_the_top_level_holds_what_the_user_fixed() -> None:
    """Nothing stands beside the agreed names but dot files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    agreed = (
        "vllm_proxy tests packaging examples pyproject.toml uv.lock models.toml.example README.md LICENSE CHANGELOG.md"
    )
    assert {name for name in top if not name.startswith(".")} <= set(agreed.split())
    assert ".python-version" not in top


def test_the_example_shows_every_key_with_its_default() -> None:
    """models.toml.example parses, names every key of every table, and shows the real default of each policy key.

    A key without a default is in a comment.
    """
    data = (ROOT / "models.toml.example").read_bytes()
    config = parse_config(data, "models.toml.example")
    text = data.decode()
    tables = (Server, EngineDefaults, Devices, ModelTable, AdapterTable, AdaptersMax, Restart, KeyTable, RateTable)
    for table in (*tables, ModerationTable):
        for key, field in table.model_fields.items():
            mark = (
                "#? ?" if field.default in (None, ()) else ""
            )  # what has no default stands in a comment, or has a value
            assert re.search(rf"^({mark}{key} = |\[.*\b{key}[\].])", text, re.MULTILINE), key
    assert config.server == Server()
    for name, default in Restart().model_dump().items():
        assert getattr(config.models["chat"].policy.restart, name) == default
    shown = {"description", "metadata", "aliases"}
    defaults = parse_config(b'[models.x]\nmodel = "x"', "").models["x"].policy.model_dump()
    chat = config.models["chat"].policy.model_dump()
    assert {key: chat[key] for key in chat if key not in shown} == {
        key: defaults[key] for key in chat if key not in shown
    }


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_are_valid(file: Path) -> None:
    """Each file in examples/ is a configuration that the daemon takes."""
    assert parse_config(file.read_bytes(), file.name).models


def test_the_file_that_init_writes_is_valid() -> None:
    """`vllm-proxy init` gives a configuration that the daemon takes."""
    assert parse_config((PACKAGE / "first_models.toml").read_bytes(), "models.toml").models


def test_every_error_code_that_is_raised_has_a_status() -> None:
    """A RequestError with an unknown code would become a fault of the daemon."""
    raised = {code for module in MODULES for code in codes_raised(ast.parse(module.read_text()))}
    assert raised
    assert raised <= set(errors.STATUS)


def codes_raised(tree: ast.AST) -> Iterator[str]:
    """The first argument of each RequestError(...)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RequestError":
            assert isinstance(node.args[0], ast.Constant)
            yield str(node.args[0].value)


def test_the_state_diagram_is_the_table() -> None:
    """The diagram in ARCHITECTURE.md is generated from the lifecycle's table, line by line."""
    text = (PACKAGE / "ARCHITECTURE.md").read_text()
    assert lifecycle.diagram() in text
    assert text.count("\n") <= 150


def test_the_code_map_names_every_module_in_its_ring() -> None:
    """And nothing that is gone; a name with a star stands for all that begin so."""
    text = (PACKAGE / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^- \*\*`(\w+)/?`\*\* (.*?)(?=^- \*\*|^## )", text, re.MULTILINE | re.DOTALL)
    shown = {(ring, name) for ring, row in rows for name in re.findall(r"`([a-z_]+(?:/|\*)?)`", row)}
    there = {
        ("top" if path.parent == PACKAGE else path.relative_to(PACKAGE).parts[0], path.stem)
        for path in MODULES
        if not path.stem.startswith("__") and path.parent.name not in {"demo", "commands"}
    }
    stars = {(ring, name[:-1]) for ring, name in shown if name.endswith("*")}
    starred = {(ring, name) for ring, name in there if any(ring == r and name.startswith(n) for r, n in stars)}
    folders = {("top", "demo/"), ("top", "commands/"), ("domain", "file/")}
    assert {one for one in shown if not one[1].endswith("*")} - folders == there - starred


def test_the_glossary_stays_short() -> None:
    """Who needs more than 25 words of ours does not find his way in."""
    words = (PACKAGE / "ARCHITECTURE.md").read_text().partition("## Words")[2].partition("\n## ")[0]
    assert 10 <= words.count("\n| ") - 1 <= 25
