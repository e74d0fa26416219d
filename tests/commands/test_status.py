"""`status`: what it shows, how it is laid out, and its exit status."""

import asyncio
import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from tests.harness import clean_environment, daemon, loading_until, vllm_proxy
from vllm_proxy.commands.fleet_table import lines_of, row_of, short_duration, short_size
from vllm_proxy.commands.screen import Screen, printable
from vllm_proxy.domain.feed_resources import Brief
from vllm_proxy.domain.resources import Health

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
PIPE = Screen(None, colours=False, shapes=True)
CHAT = '[models.chat]\nmodel = "org/chat"\n'


def replica(state: str = "ready", **more: object) -> dict[str, object]:
    """One, as the feed has it."""
    known: dict[str, object] = {
        "index": 0, "state": state, "phase": None, "reason": None, "message": None, "progress": None, "left": None,
        "since": None, "memory": None,
    }  # fmt: skip
    return known | more


def brief(name: str, state: str = "ready", *replicas: dict[str, object], **more: object) -> Brief:
    """A model, as the feed has it."""
    known: dict[str, Any] = {
        "id": name, "state": state, "reason": None, "message": None, "start": "always", "enabled": True,
        "in_flight": 0, "queued": 0, "rps": 0.0, "tps": None, "replicas": [*replicas] or [replica(state)],
    }  # fmt: skip
    return cast("Brief", known | more)


def health(**config: object) -> Health:
    """Of a daemon whose file is good."""
    known: dict[str, object] = {
        "revision": "3f2a9c1b00000000", "error": None, "certificate_error": None, "pending_restart": [],
        "file": "/etc/vllm-proxy/models.toml",
    }  # fmt: skip
    return cast("Health", {"config": known | config, "not_ended": []})


def shown(*models: Brief, screen: Screen = PIPE, about: Health | None = None, missing: Sequence[str] = ()) -> list[str]:
    """What is printed."""
    return lines_of(map(row_of, models), missing, about or health(), screen, NOW)


FLEET = (
    brief("chat", "ready", replica(since="2026-11-27T11:57:00Z", memory=30 * 2**30), replica(memory=5 * 2**30),
          in_flight=3, queued=1, rps=12.34, tps=108.0),
    brief("spare", "stopped", start="on-demand"),
    brief("coder", "loading", replica("loading", phase="loading_weights", progress=0.6, left=40.0)),
    brief("off", "stopped", enabled=False),
    brief("vision", "error", replica("error"), reason="out_of_memory", message="CUDA out of memory: lower it"),
)  # fmt: skip


def test_problems_come_first_then_what_moves_then_the_order_of_the_file() -> None:
    """With what each does, and in one line how many are ready."""
    lines = shown(*FLEET, missing=["coder", "vision"])
    head = "1 of 3 models ready · 1 on demand · 1 disabled · 3 in flight · 1 waiting · revision 3f2a9c1b"
    assert lines[0] == head
    rows = [line.split() for line in lines[2:8]]
    assert rows[0] == ["MODEL", "STATE", "READY", "RUN", "WAIT", "REQ/S", "TOK/S", "MEMORY", "UP"]
    assert [row[1] for row in rows[1:]] == ["vision", "coder", "chat", "spare", "off"]
    assert rows[2][-6:] == "loading weights 60%, about 40s left".split()
    assert rows[3] == "✓ chat ready 2/2 3 1 12 108 35.0 GiB 3m 0s".split()
    assert lines[6].startswith("·  spare   on demand  ")


def test_counted_is_what_ready_waits_for_and_others_while_they_are_ready() -> None:
    """The rest is told by what it is, on the narrowest terminal too."""
    asked = brief("asked", start="on-demand")
    comes = brief("comes", "loading", start="on-demand")
    by_hand = brief("by-hand", "stopped", reason="stopped_by_hand")
    asleep = brief("asleep", "sleeping")
    models = [brief("chat"), asked, comes, by_hand, asleep]
    head = "2 of 2 models ready · 1 loading · 1 stopped · 1 sleeping · 0 in flight · 0 waiting · revision 3f2a9c1b"
    assert shown(*models, screen=Screen(40, colours=False, shapes=True))[0] == head
    assert shown(*models, missing=["asleep"])[0].startswith("2 of 3 models ready · 1 loading · 1 stopped · 0 in flight")


def test_a_problem_has_its_sentence_and_the_next_commands() -> None:
    """Whole, however long it is, where somebody can read on."""
    lines = shown(*FLEET, screen=Screen(60, colours=False, shapes=True))
    at = lines.index("vision: out_of_memory  CUDA out of memory: lower it")
    assert lines[at + 1] == "  vllm-proxy logs vision · vllm-proxy help out_of_memory"


def test_what_waits_says_for_what() -> None:
    """Below the table, whole: the note has no room for it."""
    waits = "waits for 17.0 GiB of the machine's memory, behind chat: embed loads there"
    queued = replica("loading", phase="queued", message=waits)
    lines = shown(brief("chat3", "loading", queued), screen=Screen(60, colours=False, shapes=True))
    assert f"chat3:  {waits}" in lines
    assert not any("chat" in line for line in shown(brief("chat"))[4:])


def test_a_change_that_would_do_is_named_as_the_file_has_it() -> None:
    """Below the sentence."""
    change = {"key": "memory", "value": "31.1GiB"}
    lines = shown(brief("vision", "error", reason="insufficient_memory", message="lower it", change=change))
    at = lines.index("vision: insufficient_memory  lower it")
    assert lines[at + 1] == '  memory = "31.1GiB" would do'


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    """Columns that matter less are left out, and what is last is cut."""
    lines = shown(*FLEET, screen=Screen(width, colours=False, shapes=True))
    table = lines[2:8]
    assert max(map(len, table)) <= width
    assert ("MEMORY" in table[0]) == (width >= 80)
    assert all("WAIT" in line for line in table[:1])


@pytest.mark.parametrize(("length", "width"), [(49, 80), (120, 110), (120, 80), (120, 40)])
def test_a_long_id_costs_no_row_its_state(length: int, width: int) -> None:
    """It is shortened, its problem names it whole; where there is room for them, what runs and the phase stay too."""
    long = [f"org/{'x' * (length - 6)}-{letter}" for letter in "ab"]
    models = [brief(long[0]), brief(long[1], "error", reason="crashed", message="it ended"), *FLEET[:3]]
    lines = shown(*models, screen=Screen(width, colours=False, shapes=True))
    table = lines[2:8]
    assert max(map(len, table)) <= width
    assert [re.split(r"  +", row)[2] for row in table[1:]] == ["error", "loading", "ready", "ready", "on demand"]
    assert {re.split(r"  +", row)[1][-1] for row in table[1:] if "org/" in row} == {"a", "b"}
    assert f"{long[1]}: crashed  it ended" in lines
    if width >= 80:
        assert [word in table[0] for word in ("READY", "RUN", "WAIT")] == [True] * 3
        assert table[1].endswith("  crashed")
        assert "  loading weights" in table[2]


def test_what_concerns_no_model_is_told_too() -> None:
    """With the command that says more."""
    error = "the configuration is rejected, 1 problem: models.toml:3"
    about = health(error=error, pending_restart=["server.port"], file="/etc/x y/models.toml")
    lines = shown(brief("chat"), about=about)
    assert lines[lines.index(error) + 1] == "  vllm-proxy check -c '/etc/x y/models.toml'"
    assert "waits for a restart of the daemon: server.port" in lines


def test_colours_are_for_terminals_and_shapes_for_utf8() -> None:
    """Elsewhere the words say the same."""
    assert "\x1b" not in "\n".join(shown(*FLEET))
    assert "\x1b[31m" in "\n".join(shown(*FLEET, screen=Screen(100, colours=True, shapes=True)))
    plain = "\n".join(shown(*FLEET, screen=Screen(None, colours=False, shapes=False)))
    assert plain.isascii()


def test_nothing_that_a_terminal_obeys_comes_through() -> None:
    """Messages repeat what engines write."""
    evil = brief("chat", "error", reason="crashed", message="\x1b]0;title\x07\x9b2J\u202ebad\nnews")
    lines = shown(evil)
    assert "chat: crashed   ]0;title 2J bad news" in lines
    assert printable("a\tb") == "a b"


def test_amounts_are_short() -> None:
    """Two units at most."""
    spans = [timedelta(seconds=4), timedelta(minutes=2, seconds=5), timedelta(minutes=45), timedelta(days=3, hours=4)]
    assert [short_duration(one.total_seconds()) for one in spans] == ["4s", "2m 5s", "45m", "3d 4h"]
    assert [short_size(size) for size in (5 * 2**20, 3 * 2**29)] == ["5 MiB", "1.5 GiB"]


async def test_the_exit_status_says_whether_all_that_are_wanted_are_ready(tmp_path: Path, port_start: int) -> None:
    """3 without a daemon, 1 while one loads, 0 then; an on-demand model is not waited for."""
    assert (await vllm_proxy(tmp_path, "status"))[0] == 3
    gate = tmp_path / "gate"
    config = loading_until(port_start, gate) + '[models.spare]\nmodel = "x"\nstart = "on-demand"\n'
    async with daemon(config, tmp_path) as running:
        await running.once("chat", lambda one: one["phase"] == "loading_weights")
        status, out, err = await vllm_proxy(tmp_path, "status")
        assert (status, err) == (1, "")
        assert re.search(r"chat +loading +0/1 .* loading weights", out)
        assert out.startswith("0 of 1 models ready · 1 on demand · ")
        status, out, _ = await vllm_proxy(tmp_path, "status", "spare")
        assert (status, "chat" in out) == (0, False)
        gate.touch()
        await running.once("chat", lambda one: one["state"] == "ready")
        status, out, _ = await vllm_proxy(tmp_path, "status", "--json")
        found = json.loads(out)
        assert (status, found["ready"], found["not_ready"]) == (0, True, {})
        assert [model["id"] for model in found["models"]] == ["chat", "spare"]
        status, _, err = await vllm_proxy(tmp_path, "status", "nobody")
        assert (status, err.count("\n")) == (1, 1)
        assert (await vllm_proxy(tmp_path, "ids"))[:2] == (0, "chat\nspare\n")


async def test_who_watches_is_told_what_changes(tmp_path: Path, port_start: int) -> None:
    """Where stdout is no terminal a line each; it ends with the daemon."""
    gate = tmp_path / "gate"
    async with daemon(loading_until(port_start, gate), tmp_path) as running:
        await running.once("chat", lambda one: one["phase"] == "loading_weights")
        watcher = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vllm_proxy", "status", "--watch", "--state-dir", str(running.state_dir),
            env=clean_environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert watcher.stdout is not None
        assert b" chat loading 0/1" in await watcher.stdout.readline()
        gate.touch()
        while b" chat ready 1/1" not in (line := await watcher.stdout.readline()):
            assert line, "it ended"
        await running.stop()
        await watcher.wait()
