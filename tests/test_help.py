"""`vllm-proxy help`: what it finds, and how it shows it."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import clean_environment
from vllm_proxy import terminal
from vllm_proxy.cli import run
from vllm_proxy.domain.lifecycle import Phase, State
from vllm_proxy.help import TOPICS, UnknownTopicError, about, contents, page, sections

TEXT = """<!-- generated: x -->
# A title

A paragraph with `code`, **bold words** and [a link](other.md#a-place) that is longer than a line of forty columns.

- one
  goes on
- two, [out_of_memory](errors.md#out_of_memory)

| key | meaning |
|---|---|
| `a` | short |

| key | meaning |
|---|---|
| `b` | a cell that does not fit beside the others, a\\|b |

```sh
curl   --as-it-is
```
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which every configuration is broken."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.toml").write_text("[rubbish")
    (tmp_path / ".env").write_bytes(b"\xff")
    return tmp_path


def test_without_a_word_it_lists_the_topics(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its sentence; no daemon and no file is needed."""
    assert run(["help"]) == 0
    printed = capsys.readouterr()
    assert printed == (contents(), "")
    for topic in TOPICS:
        assert f"- **{topic}**: " in printed.out


@pytest.mark.parametrize("topic", TOPICS)
def test_a_topic_is_its_page_as_it_is(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where stdout is no terminal: the Markdown, for a file or a pipe."""
    assert run(["help", topic]) == 0
    assert capsys.readouterr().out == page(topic)


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        ("out_of_memory", "### out_of_memory\n\nThe memory of a GPU"),
        ("model_not_found", "### model_not_found\n\nHTTP 404."),
        ("78", "### Exit status 78\n"),
        ("503", "## Clients get 503\n"),
        ("409", "### model_exists\n\nHTTP 409."),
        ("a-model-will-not-load", "## A model will not load\n"),
        ("A model will not load", "## A model will not load\n"),
        ("scheduling sleep", "## Sleep\n"),
        ("errors stalled", "### stalled\n"),
        ("stalled", "### stalled\n"),
        ("bug", "## Report a bug\n"),
        ("stall_timeout", "| key | type | default | a change | meaning |\n"),
        ("server.port", "| key | type | default | a change | meaning |\n"),
        ("vllm_proxy_queued", "| metric | type | labels | meaning |\n"),
        ("reload", "| command | takes | does | exit status |\n"),
    ],
)
def test_a_word_is_the_section_or_the_row_that_is_about_it(
    words: str, begins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error code, a reason, a status, a heading, a key, a metric, a command; quotes are not needed."""
    assert run(["help", *words.split()]) == 0
    assert capsys.readouterr().out.startswith(begins)


@pytest.mark.parametrize("word", [*State, *Phase, *"state phase drain eject eviction unload withdraw orphan".split()])
def test_a_word_of_an_answer_or_of_the_field_is_explained(word: str) -> None:
    """Each state and each phase, and what a stranger would search for: by the row that is about it."""
    assert re.search(rf"^\| [^|]*`{word}`[^|]* \|", about(word), re.MULTILINE)


def test_a_section_ends_where_the_next_one_begins() -> None:
    """A heading within it is a part of it; one in a block of code is none."""
    assert about("model_error").count("### ") == 1
    reasons = next(section for section in sections("errors") if section.name == "reasons")
    assert "### crashed" in reasons.text
    assert "### exit-status-0" not in reasons.text
    assert not any(section.title.startswith("Durations") for section in sections("configuration"))


def test_what_is_both_a_code_and_a_key_is_told_as_both() -> None:
    """`queue_timeout` is the code of an answer, and the key that causes it."""
    text = about("queue_timeout")
    assert text.startswith("### queue_timeout\n\nHTTP 504.")
    assert "| `queue_timeout` | duration |" in text


def test_other_words_list_the_sections_that_have_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    """What is most about them first; each line is a command that prints the section."""
    assert run(["help", "two", "GPU", "models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# Sections with two GPU models"
    assert lines[2] == "- `vllm-proxy help scheduling two-models-on-one-gpu`: Two models on one GPU"
    for line in lines[2:]:
        found = re.fullmatch(r"- `vllm-proxy help (\S+ \S+)`: (.*)", line)
        assert found is not None
        assert all(word in about(found[1]).lower() for word in ("two", "gpu", "model"))


def test_a_part_of_a_word_is_not_found() -> None:
    """Each word is looked for as it is, or as its plural."""
    assert "# Sections with" in about("gpu")
    with pytest.raises(UnknownTopicError):
        about("gp")


@pytest.mark.parametrize(("words", "near"), [("out_of_memry", "out_of_memory"), ("operat", "operating")])
def test_an_unknown_word_names_near_ones(words: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, one sentence on stderr and nothing on stdout."""
    assert run(["help", words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"vllm-proxy: cannot find anything about {words!r}: did you mean ")
    assert near in printed.err
    assert printed.err.endswith("`vllm-proxy help` lists the topics\n")


@pytest.mark.parametrize("words", ["--", "", "???", "\udcff"])
def test_a_word_that_is_none_is_told_too(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that can be typed is a traceback."""
    status = run(["help", words])
    assert (status, bool(capsys.readouterr().err)) in {(2, True), (0, False)}


def test_it_answers_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The topics with their sentences; a text with what it was asked for."""
    assert run(["help", "--json"]) == 0
    assert [topic["name"] for topic in json.loads(capsys.readouterr().out)["topics"]] == TOPICS
    assert run(["help", "--json", "78"]) == 0
    assert json.loads(capsys.readouterr().out) == {"topic": "78", "text": about("78")}


def test_markdown_is_laid_out_for_a_terminal() -> None:
    """Lines of its width without marks, wide tables row by row, code as it stands, where a link leads."""
    assert list(terminal.lines(TEXT, 40, colours=False)) == [
        "A title",
        "",
        "A paragraph with code, bold words and a",
        "link (help a-place) that is longer than",
        "a line of forty columns.",
        "",
        "- one goes on",
        "- two, out_of_memory",
        "",
        "key  meaning",
        "a    short",
        "",
        "b",
        "    meaning: a cell that does not fit",
        "      beside the others, a|b",
        "",
        "    curl   --as-it-is",
        "",
    ]


def test_colours_change_no_letter() -> None:
    """Bold and coloured words, at the same places of the same lines."""
    plain = list(terminal.lines(TEXT, 40, colours=False))
    coloured = list(terminal.lines(TEXT, 40, colours=True))
    assert coloured[2] == "A paragraph with \x1b[36mcode\x1b[0m, \x1b[1mbold words\x1b[0m and a"
    bare = [line.replace("\x1b[36m", "").replace("\x1b[1m", "").replace("\x1b[0m", "") for line in coloured]
    assert bare == plain


@pytest.mark.parametrize("topic", TOPICS)
def test_every_page_fits_a_terminal(topic: str) -> None:
    """No line is wider than 80 columns, but for code and words that are longer themselves."""
    for line in terminal.lines(page(topic), 80, colours=False):
        assert len(line) <= 80 or line.startswith("    ") or " " not in line.strip(), line


def on_a_terminal(tmp_path: Path, **environment: str) -> str:
    """What `vllm-proxy help 78` shows on a terminal."""
    parent, child = pty.openpty()
    env = {**clean_environment(), "TERM": "xterm", **environment}
    command = [sys.executable, "-m", "vllm_proxy", "help", "78"]
    shown = b""
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=child, stdin=child, stderr=child) as process:
        os.close(child)
        while True:
            try:
                shown += (part := os.read(parent, 4096))
            except OSError:  # nobody has the other end any more
                break
            if not part:
                break
    os.close(parent)
    assert process.returncode == 0
    return shown.decode().replace("\r\n", "\n")


def test_on_a_terminal_the_pager_shows_it(tmp_path: Path) -> None:
    """$PAGER gets the text on its stdin, and the command waits for it."""
    pager = f"tee {shlex.quote(str(tmp_path / 'paged'))}"
    shown = on_a_terminal(tmp_path, PAGER=pager)
    assert (tmp_path / "paged").read_text() == shown
    assert shown.startswith("\x1b[1mExit status 78\x1b[0m\n\n")


@pytest.mark.parametrize("pager", ["", "cat", "no-such-pager-at-all", "'unbalanced"])
def test_without_a_pager_it_is_printed(tmp_path: Path, pager: str) -> None:
    """None is wanted, or it cannot be run; NO_COLOR takes the colours away."""
    shown = on_a_terminal(tmp_path, PAGER=pager, NO_COLOR="1")
    assert shown.startswith("Exit status 78\n\n")
    assert "\x1b" not in shown


def test_a_pager_that_leaves_early_is_no_fault(tmp_path: Path) -> None:
    """As `less` does when somebody has read enough."""
    assert on_a_terminal(tmp_path, PAGER="head -n 1") == "\x1b[1mExit status 78\x1b[0m\n"
