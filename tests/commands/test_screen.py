"""What is shown fits a terminal: names are shortened before anything else of a row is lost, and lines are broken."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from argparse import Namespace
from typing import cast

import pytest

from vllm_proxy.commands import events, keys, requests, status, usage
from vllm_proxy.commands.screen import Columns, Screen, rows_of, short_names
from vllm_proxy.domain.feed_resources import Happening, Request
from vllm_proxy.domain.key_resources import Keys
from vllm_proxy.domain.usage_resources import Usage

LONG = f"org/{'x' * 190}-a1b2"


def screen(width: int) -> Screen:
    """A terminal of so many columns, without colours."""
    return Screen(width, colours=False, shapes=True)


def test_names_are_shortened_in_the_middle_or_where_that_tells_them_apart() -> None:
    """Those that fit stay as they are."""
    assert short_names(["chat", "abcdefghijklmnop"], 9) == {"chat": "chat", "abcdefghijklmnop": "abcd…mnop"}
    alike = [f"{'a' * 20}{letter}{'b' * 13}" for letter in "xyz"]
    assert sorted(short_names(alike, 16).values()) == [f"a…{letter}{'b' * 13}" for letter in "xyz"]
    assert len(set(short_names([f"{'a' * 99}{letter}{'a' * 99}" for letter in "xy"], 12).values())) == 1


def test_columns_go_before_names_get_too_short() -> None:
    """In their order, and only while that helps."""
    columns = Columns(("NAME", "ONE", "TWO", "NOTE"), names=frozenset({"NAME"}), less=("TWO", "ONE"))
    row = [LONG, "1" * 10, "2" * 10, "note"]
    heads = [screen(width).table(columns, [row])[0].split() for width in (54, 53, 42, 41, 40)]
    every = ["NAME", "ONE", "TWO", "NOTE"]
    assert heads == [every, ["NAME", "ONE", "NOTE"], ["NAME", "ONE", "NOTE"], ["NAME", "NOTE"], ["NAME", "NOTE"]]
    assert all(line.endswith("note") for width in (54, 41, 20) for line in screen(width).table(columns, [row])[1:])


def test_a_line_is_broken_between_words_and_keeps_its_styles() -> None:
    """No row is wider than the terminal, and no word is lost."""
    line = Screen(None, colours=True, shapes=True).line(("chat: crashed", "31"), "  the engine ended with status 1")
    rows = list(rows_of(line, 20))
    assert [re.sub(r"\x1b\[\d*m", "", row) for row in rows] == ["chat: crashed  the", "engine ended with", "status 1"]
    assert rows[0].startswith("\x1b[31mchat: crashed\x1b[0m")
    assert list(rows_of("short", 20)) == ["short"]
    assert list(rows_of("x" * 30, 20)) == ["x" * 20, "x" * 10]


@pytest.mark.parametrize("rows", [5, 40])
def test_what_is_watched_never_scrolls_out_of_the_terminal(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences take as many rows as they need; the top stays, and what does not fit is counted."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 40, 0, 0))
    with os.fdopen(slave, "w", encoding="utf-8") as terminal, os.fdopen(master, "rb") as reader:
        monkeypatch.setattr(sys, "stdout", terminal)
        status._draw(["the head", "", f"chat: crashed  {'many words of it ' * 20}", "the end"])
        found = os.read(reader.fileno(), 65536).decode()
    shown = re.sub(r"\x1b\[[HJK]", "", found).split("\r\n")
    assert shown.pop() == ""
    assert len(shown) < rows
    assert max(map(len, shown)) <= 40
    assert shown[0] == "the head"
    assert shown[-1] == ("the end" if rows == 40 else "… 9 lines more")


def request(**more: object) -> Request:
    """One of a model with a long id."""
    known = {
        "id": "req-12345678", "model": LONG, "replica": 0, "route": "/v1/chat/completions", "state": "streaming",
        "since": "2026-11-27T12:00:00Z", "bytes": 5, "client": "10.0.0.7", "key": "ci", "status": 200, "code": None,
        "seconds": 1.0, "queue_seconds": 0.1, "first_byte": 0.2, "prompt_tokens": 1, "completion_tokens": 2,
    }  # fmt: skip
    return cast("Request", known | more)


@pytest.mark.parametrize("width", [60, 80, 110])
def test_requests_of_a_long_id_keep_their_states_and_their_own_ids(width: int) -> None:
    """In both tables."""
    lines = requests.lines_of([request()], [request()], screen(width))
    assert max(map(len, lines)) <= width
    assert " streaming " in lines[2]
    assert " 200 " in lines[5]
    assert all(line.endswith("req-12345678") for line in (lines[2], lines[5]))


def test_an_event_of_a_long_id_keeps_its_state_and_its_reason() -> None:
    """The end of the id tells which one it was."""
    happening = cast("Happening", {
        "id": "b-1", "at": "2026-11-27T03:12:04Z", "kind": "instance", "model": LONG, "instance": f"{LONG}/0",
        "state": "error", "phase": None, "reason": "crashed", "message": "exit status 1",
    })  # fmt: skip
    line = screen(80).named_line(events.line_of(happening), events._ABOUT)
    assert len(line) <= 80
    assert "-a1b2/0  error  crashed: exit" in line


def test_usage_of_a_long_id_keeps_its_numbers() -> None:
    """And in a file it is whole."""
    numbers = (
        "requests",
        "prompt_tokens",
        "completion_tokens",
        "cached_tokens",
        "estimated_tokens",
        "failed",
        "limited",
    )
    row = {"key": "ci", "model": LONG} | dict.fromkeys(numbers, 1234567)
    found = cast("Usage", {"by": ["key", "model"], "from": "2026-11-01", "rows": [row]})
    line = usage.shown(found, screen(80), as_table=True).splitlines()[1]
    assert len(line) <= 80
    assert line.count("1234567") == 5
    assert LONG in usage.shown(found, Screen(None, colours=False, shapes=True), as_table=True)


def test_a_key_of_many_models_keeps_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is the last column."""
    key = {
        "name": "ci", "id": "1f2e3d4c", "scopes": ["inference"], "models": ["a*", LONG], "requests_per_minute": 60,
        "tokens_per_minute": None, "tokens_per_day": None, "tokens_per_month": None, "max_in_flight": None,
        "max_output_tokens": None, "priority": 0, "weight": 1, "limits": {}, "hashes": 1, "enabled": False,
        "expires_at": None,
    }  # fmt: skip
    monkeypatch.setattr(keys, "_all", lambda _: cast("Keys", {"keys": [key]}))
    monkeypatch.setattr(Screen, "of_stdout", lambda: screen(80))
    line = keys._list(Namespace()).told.splitlines()[1]
    assert line.endswith("  revoked")
    assert len(line) <= 80
