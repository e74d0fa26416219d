"""How the log looks."""

import json
import os
import re
import sys
from collections.abc import Iterator

import pytest
import structlog

from vllm_proxy import logsetup
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.logsetup import Format


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Other tests log as they did before."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def written(
    capsys: pytest.CaptureFixture[str], chosen: Format, environ: dict[str, str] | None = None, level: str = "debug"
) -> list[str]:
    """The lines of three entries on stderr, one of them with a traceback."""
    logsetup.set_up(level, logsetup.resolve(chosen, environ or {}))
    log = structlog.get_logger()
    log.debug("engine found", path="a b")
    log.warning("two\nlines", count=1)
    try:
        int("no number")
    except ValueError:
        log.exception("supervisor failed", model="chat")
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_text_is_a_line_with_time_level_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """People see when, how serious, what, and with which values, without colours where no terminal is."""
    first = written(capsys, "text")[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \[debug *\] engine found +path='a b'", first)


def test_text_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """A bug is not swallowed."""
    assert any("ValueError" in line and "invalid literal" in line for line in written(capsys, "text"))


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks and tracebacks included, so that collectors need no rules."""
    entries = [json.loads(line) for line in written(capsys, "json")]
    assert [(entry["level"], entry["event"]) for entry in entries] == [
        ("debug", "engine found"),
        ("warning", "two\nlines"),
        ("error", "supervisor failed"),
    ]
    assert entries[0]["path"] == "a b"
    assert entries[0]["timestamp"].endswith("Z")
    assert entries[2]["exception"][0]["exc_value"].startswith("invalid literal")


def test_journal_lines_have_priorities_and_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    """The journal knows the time; "<N>" is its way to be told how serious a line is, on each line."""
    lines = written(capsys, "journal")
    assert lines[:3] == ["<7>engine found path='a b'", "<4>two", "<4>lines count=1"]
    assert lines[3] == "<3>supervisor failed model='chat'"
    assert lines[-1].startswith("<3>ValueError: invalid literal")
    assert all(line.startswith("<3>") for line in lines[3:])


@pytest.mark.parametrize(("level", "count"), [("debug", 3), ("info", 2), ("warning", 2), ("error", 1)])
def test_what_is_below_the_level_is_not_written(capsys: pytest.CaptureFixture[str], level: str, count: int) -> None:
    """The level is a threshold."""
    assert len(written(capsys, "json", level=level)) == count


@pytest.mark.parametrize("form", ["text", "json", "journal"])
def test_a_name_out_of_an_enumeration_is_shown_as_its_word(
    capsys: pytest.CaptureFixture[str], form: logsetup.Form
) -> None:
    """A reason is `crashed`, whatever Python calls it."""
    logsetup.set_up("info", form)
    structlog.get_logger().info("the engine failed", reason=Reason.CRASHED)
    line = capsys.readouterr().err
    assert "crashed" in line
    assert "Reason" not in line


def test_auto_is_text_where_stderr_is_not_the_journal(capsys: pytest.CaptureFixture[str]) -> None:
    """A JOURNAL_STREAM inherited from a service whose stderr was redirected does not count."""
    assert written(capsys, "auto", {"JOURNAL_STREAM": "1:1"})[0].endswith("path='a b'")
    assert not written(capsys, "auto")[0].startswith("<")


def test_auto_is_journal_where_stderr_is_the_journal(capfd: pytest.CaptureFixture[str]) -> None:
    """systemd names the stream by device and inode."""
    stat = os.fstat(sys.stderr.fileno())
    assert written(capfd, "auto", {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"})[0].startswith("<7>")
