"""`events`, `requests` and `plan`: what has happened, what is asked, what would change, as lines for people."""

import asyncio
import json
import sys
from pathlib import Path
from typing import cast

from tests.harness import Daemon, clean_environment, daemon, fake_engines, vllm_proxy
from vllm_proxy.commands.changes import lines_of
from vllm_proxy.commands.events import line_of
from vllm_proxy.commands.screen import Screen
from vllm_proxy.domain.feed_resources import Happening
from vllm_proxy.domain.plan import Kind
from vllm_proxy.domain.resources import Plan

CHAT = '[models.chat]\nmodel = "org/chat"\n'
ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
NOTHING: Plan = {
    "changes": [], "pending_restart": [], "keys": {"added": [], "changed": [], "removed": []}, "settings": [],
    "warnings": [],
}  # fmt: skip
PIPE = Screen(None, colours=False, shapes=True)
COLOURED = Screen(80, colours=True, shapes=True)


def told(**fields: object) -> str:
    """A line, without its time."""
    happening = cast("Happening", {"id": "b-1", "at": "2026-11-27T03:12:04.123Z", **fields})
    return PIPE.line(*line_of(happening)).split("  ", 1)[1]


def test_each_kind_of_event_is_a_line() -> None:
    """An instance, a model, a file, a hand."""
    instance = {"kind": "instance", "model": "chat", "instance": "chat/0", "state": "loading", "phase": "backoff"}
    assert told(**instance, reason="crashed", message="exit status 1") == (
        "chat/0  loading (backoff)  crashed: exit status 1"
    )
    assert told(kind="model", model="chat", instance=None, state="stopped", phase=None, reason=None, message=None) == (
        "chat  stopped"
    )
    change = {"action": "replace", "model": "chat", "reason": "x"}
    assert told(kind="accepted", revision="3f2a9c1b0000", changes=[change]) == "file accepted 3f2a9c1b: replace chat"
    problems = [{"path": "models.chat.replicas", "line": 3, "message": "expected at least 1"}] * 2
    assert told(kind="rejected", problems=problems) == (
        "file refused models.chat.replicas: expected at least 1; and 1 more; vllm-proxy check"
    )
    assert told(kind="write", who="key ci", what="PATCH /models/chat") == "key ci: PATCH /models/chat"


def test_a_plan_is_coloured_by_what_it_costs() -> None:
    """On a terminal; nothing of it is cut, and elsewhere it reads as it did."""
    found: Plan = {
        **NOTHING,
        "changes": [{"action": Kind.REPLACE, "model": "chat", "reason": "x" * 200, "place": ["0"]}],
    }
    assert lines_of(found, PIPE) == [f"replace chat: {'x' * 200}; on device 0"]
    (line,) = lines_of(found, COLOURED)
    assert line.startswith("\x1b[33mreplace\x1b[0m \x1b[1mchat\x1b[0m: ")
    assert "x" * 200 in line
    assert lines_of(NOTHING, COLOURED) == ["nothing to do"]


def test_a_plan_tells_what_changes_outside_of_models() -> None:
    """Keys by their names, settings with their values, and what is to be warned of."""
    found: Plan = {
        **NOTHING,
        "keys": {"added": ["ci"], "changed": [], "removed": ["old"]},
        "settings": ["server.usage false -> true"],
        "warnings": ["careful"],
    }
    assert lines_of(found, PIPE) == [
        "keys: added ci; removed old", "live: server.usage false -> true", "warning: careful",
    ]  # fmt: skip


async def test_events_tell_what_has_happened_and_what_comes(tmp_path: Path, port_start: int) -> None:
    """The last ones first, also of a time in which nobody listened; then each as it comes, to the daemon's end."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await running.all_ready()
        status, out, err = await vllm_proxy(tmp_path, "events")
        assert (status, err) == (0, "")
        assert any(line.endswith("chat/0  ready") for line in out.splitlines())
        status, out, _ = await vllm_proxy(tmp_path, "events", "-n", "1", "--json")
        assert (status, out.count("\n"), json.loads(out)["model"]) == (0, 1, "chat")
        assert (await vllm_proxy(tmp_path, "events", "-n", "-1"))[0] == 1
        follower = await following(running, "events", "-f", "-n", "1")
        assert follower.stdout is not None
        assert b"chat" in await follower.stdout.readline()
        assert (await vllm_proxy(tmp_path, "stop", "chat"))[0] == 0
        seen = b""
        while b"chat/0  stopped" not in seen or b"POST /models/chat/stop" not in seen:
            seen += (line := await follower.stdout.readline())
            assert line, seen
        await running.stop()
        await follower.wait()


async def following(running: Daemon, *arguments: str) -> asyncio.subprocess.Process:
    """A command that goes on."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vllm_proxy", *arguments, "--state-dir", str(running.state_dir),
        env=clean_environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_requests_are_shown_while_they_run_and_when_they_have_ended(tmp_path: Path, port_start: int) -> None:
    """With model, state, times and tokens; with -f each as it ends."""
    gate = tmp_path / "go"
    held = ASK | {"stream": True, "fake": {"chunks": 4, "hold_at": 2, "hold": str(gate)}}
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        await running.all_ready()
        headers = {"X-Request-Id": "the-held-one"}
        async with running.session.post("/v1/chat/completions", json=held, headers=headers) as stream:
            await stream.content.readuntil(b"\n\n")
            status, out, err = await vllm_proxy(tmp_path, "requests")
            assert (status, err) == (0, "")
            assert out.startswith("1 in flight\n")
            (line,) = [line for line in out.splitlines() if "the-held-one" in line]
            assert line.split()[1:3] == ["chat/0", "streaming"] or "streaming" in line
            follower = await following(running, "requests", "-f", "-n", "5")
            gate.touch()
            await stream.read()
        assert follower.stdout is not None
        line_of_it = await follower.stdout.readline()
        assert b"the-held-one" in line_of_it
        follower.terminate()
        await follower.wait()
        await running.post("/v1/chat/completions", ASK)
        status, out, _ = await vllm_proxy(tmp_path, "requests", "chat", "-n", "1", "--json")
        found = json.loads(out)
        assert (status, found["active"], len(found["recent"])) == (0, [], 1)
        assert (await vllm_proxy(tmp_path, "requests", "nobody"))[0] == 1
