"""How the log looks."""

import asyncio
import gc
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Coroutine, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import structlog

from vllm_proxy import logsetup
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.logsetup import Format
from vllm_proxy.runtime.logline import Form
from vllm_proxy.runtime.logwriter import LogWriter


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
def test_a_name_out_of_an_enumeration_is_shown_as_its_word(capsys: pytest.CaptureFixture[str], form: Form) -> None:
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


# What must not be in it


def fails(prompt: str) -> None:
    """As something in the middle of a request does."""
    request = {"messages": [{"role": "user", "content": prompt}], "authorization": "Bearer a-key"}
    raise RuntimeError(f"cannot take {len(request)} fields")


@pytest.mark.parametrize("form", ["text", "json", "journal"])
def test_variables_of_frames_are_never_logged(capsys: pytest.CaptureFixture[str], form: Form) -> None:
    """Prompts and keys lie in them; also where `rich` is installed, which would show them in colours."""
    assert find_spec("rich"), "the trap is not set"
    logsetup.set_up("info", form)
    try:
        fails("the-" + "prompt")
    except RuntimeError:
        structlog.get_logger().exception("a request failed")
    said = capsys.readouterr().err
    assert "cannot take 2 fields" in said
    assert "in fails" in said or '"name":"fails"' in said.replace(" ", "")
    for secret in ("the-prompt", "a-key", "locals"):
        assert secret not in said


@pytest.fixture
def _hooks() -> Iterator[None]:
    """Python's own ways to stderr as they were before."""
    root, unraisable, of_threads = logging.getLogger(), sys.unraisablehook, threading.excepthook
    handlers, level, show = root.handlers[:], root.level, warnings.showwarning
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:], warnings.showwarning = handlers, show
    root.setLevel(level)
    sys.unraisablehook, threading.excepthook = unraisable, of_threads


async def forgotten() -> None:
    """A task that fails and that nobody asks for."""
    fails("the-" + "prompt")


class Undying:
    """What fails as it is collected."""

    def __del__(self) -> None:
        raise RuntimeError("of an object that is gone")


@pytest.mark.usefixtures("_hooks")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("form", ["text", "json", "journal"])
def test_what_python_itself_would_write_is_in_the_log(form: Form) -> None:
    """asyncio's about tasks, warnings, failures of threads and of what is collected: queued, in the same form."""
    out, into = os.pipe()
    with LogWriter(into) as writer:
        logsetup.set_up("info", form, writer)
        logsetup.capture(writer, form)
        with asyncio.Runner() as runner:
            runner.run(let_go_of(forgotten()))
        gc.collect()
        warnings.warn("one-warning", stacklevel=1)
        thread = threading.Thread(target=fails, args=["the-prompt"])
        thread.start()
        thread.join()
        Undying()
        logging.getLogger("aiohttp.server").error("one of %s", "aiohttp")
    os.close(into)
    with os.fdopen(out) as file:
        lines = file.read().splitlines()
    said = "\n".join(lines)
    for words in ("Task exception was never retrieved", "one-warning", "a thread failed", "one of aiohttp",
                  "of an object that is gone"):  # fmt: skip
        assert words in said
    assert "the-prompt" not in said
    if form == "json":
        assert {json.loads(line)["level"] for line in lines} == {"error", "warning"}
    if form == "journal":
        assert {line[:3] for line in lines} == {"<3>", "<4>"}


async def let_go_of(work: Coroutine[Any, Any, None]) -> None:
    """Begin it, and forget it."""
    task = asyncio.create_task(work)
    await asyncio.wait({task})


def passed_on(form: Form, *lines: str, engines: bool = True) -> str:
    """What is written of an engine's lines."""
    out, into = os.pipe()
    with LogWriter(into) as writer:
        logsetup.Output(writer, form, requests=True, engines=engines).pass_on("chat/0", lines)
    os.close(into)
    with os.fdopen(out) as file:
        return file.read()


def test_an_engines_lines_are_in_the_log_with_its_name() -> None:
    """In the form of the log; nothing where the level leaves them out."""
    assert passed_on("text", "one", "two") == "chat/0 | one\nchat/0 | two\n"
    assert passed_on("journal", "one") == "<6>chat/0 | one\n"
    entry = json.loads(passed_on("json", 'a "line"'))
    assert (entry["event"], entry["instance"], entry["line"]) == ("engine output", "chat/0", 'a "line"')
    assert passed_on("text", "one", engines=False) == ""
