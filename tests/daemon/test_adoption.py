"""The daemon's own death: what the next one finds, takes over, or ends."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    PLAIN,
    Daemon,
    clean_environment,
    daemon,
    fake_engines,
    loading_until,
    session_of,
    until,
    vllm_proxy,
)
from vllm_proxy.domain.command import marked
from vllm_proxy.engine.proc import look_up
from vllm_proxy.engine.state import EngineRecord, StateDirectory

CHAT = '[models.chat]\nmodel = "org/chat"\nreplicas = 2\n'
EMBED = '[models.embed]\nmodel = "org/embed"\n'
KEEP = '[server]\non_exit = "keep"\n'
ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


async def fleet(running: Daemon) -> dict[str, tuple[int, int]]:
    """Process id and port of each instance, once all are ready."""
    await running.all_ready()
    models = (await running.get("/models"))["models"]
    return {
        f"{model['id']}/{one['index']}": (one["pid"], one["port"])
        for model in models
        for one in model["status"]["instances"]
    }


async def on_record(running: Daemon, count: int) -> None:
    """Wait until so many engines are known to have served: of too many, those are taken first."""

    async def recorded() -> int:
        return (running.state_dir / "engines.toml").read_text(encoding="utf-8").count("ready = true")

    await until(recorded, lambda found: found == count)


async def until_left(session: int, count: int) -> None:
    """Wait until so many processes of a session live."""

    async def left() -> int:
        return len(session_of(session))

    await until(left, lambda found: found == count)


async def test_engines_of_a_killed_daemon_are_adopted_and_serve_on(tmp_path: Path, port_start: int) -> None:
    """The same processes on the same ports, with nothing loaded again; requests and an orderly stop work as ever."""
    config = fake_engines(port_start) + CHAT + EMBED
    async with daemon(config, tmp_path) as first:
        before = await fleet(first)
        await first.stop(signal.SIGKILL)
    async with daemon(config, tmp_path) as second:
        assert await fleet(second) == before
        assert (await second.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        assert "engine started" not in second.log().partition("engine adopted")[2]
        assert await second.stop() == 0
        assert not any(session_of(pid) for pid, _ in before.values())
    assert "engines = []" in (second.state_dir / "engines.toml").read_text()


async def test_an_engine_that_loads_is_adopted_too(tmp_path: Path, port_start: int) -> None:
    """A start of many minutes is not lost; the log of the start so far is known to the next daemon."""
    gate = tmp_path / "go"
    config = loading_until(port_start, gate)
    async with daemon(config, tmp_path) as first:
        before = await first.once("chat", lambda one: one["pid"] and one["phase"] != "importing")
        await first.stop(signal.SIGKILL)
    async with daemon(config, tmp_path) as second:
        after = await second.once("chat", lambda one: one["pid"])
        assert (after["pid"], after["started_at"], after["state"]) == (before["pid"], before["started_at"], "loading")
        assert (await second.once("chat", lambda one: one["phase"] != "importing"))["phase"] == before["phase"]
        gate.touch()
        await second.until("1 of 1 models ready")
        assert await second.pids("chat") == [before["pid"]]


async def test_what_is_left_of_a_dead_engine_is_ended_before_its_port_is_used(tmp_path: Path, port_start: int) -> None:
    """A core without its server serves nobody: ended, and its instance is started anew. The other one is adopted."""
    config = fake_engines(port_start) + CHAT
    async with daemon(config, tmp_path) as first:
        before = await fleet(first)
        await first.stop(signal.SIGKILL)
    dead, alive = before["chat/0"][0], before["chat/1"][0]
    os.kill(dead, signal.SIGKILL)
    await until_left(dead, 1)
    assert len(session_of(alive)) == 2
    async with daemon(config, tmp_path) as second:
        after = await fleet(second)
        assert session_of(dead) == set()
        assert after["chat/1"] == before["chat/1"]
        assert after["chat/0"][0] != dead


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("org/chat", "org/other"),
        lambda text: text.replace("replicas = 2", "replicas = 1"),
        lambda text: text.replace("[models.chat]", "[models.talk]"),
        lambda text: text.replace("replicas = 2", "enabled = false"),
        lambda text: text.replace("replicas = 2", "replicas = 2\nenv = { A = '1' }"),
    ],
    ids=["another-model", "fewer-replicas", "another-id", "disabled", "another-environment"],
)
async def test_engines_that_no_longer_fit_the_file_are_ended(
    tmp_path: Path,
    port_start: int,
    change: Any,  # noqa: ANN401 - a function of the table above
) -> None:
    """The file changed while no daemon ran: what it no longer asks for goes, the others stay."""
    config = fake_engines(port_start) + EMBED + CHAT
    async with daemon(config, tmp_path) as first:
        before = await fleet(first)
        await on_record(first, len(before))
        await first.stop(signal.SIGKILL)
    async with daemon(change(config), tmp_path) as second:
        after = await fleet(second)
        assert after["embed/0"] == before["embed/0"]
        kept = {pid for pid, _ in after.values()}
        assert before["chat/1"][0] not in kept
        for pid in {pid for pid, _ in before.values()} - kept:
            await until_left(pid, 0)


async def test_a_change_of_policy_alone_does_not_cost_an_engine(tmp_path: Path, port_start: int) -> None:
    """Aliases, timeouts and the order of tables are the daemon's own."""
    config = fake_engines(port_start) + CHAT + EMBED
    async with daemon(config, tmp_path) as first:
        before = await fleet(first)
        await first.stop(signal.SIGKILL)
    changed = fake_engines(port_start) + EMBED + CHAT + 'aliases = ["gpt"]\ndrain_timeout = 5\n'
    async with daemon(changed, tmp_path) as second:
        assert await fleet(second) == before
        await second.post("/v1/chat/completions", ASK | {"model": "gpt"})


async def test_an_adopted_engine_that_dies_is_started_again(tmp_path: Path, port_start: int) -> None:
    """Its exit code cannot be known, and the resource says so."""
    config = fake_engines(port_start) + EMBED
    async with daemon(config, tmp_path) as first:
        before = await fleet(first)
        await first.stop(signal.SIGKILL)
    async with daemon(config, tmp_path) as second:
        await fleet(second)
        os.kill(before["embed/0"][0], signal.SIGKILL)
        now = await second.once("embed", lambda one: one["restarts"] == 1 and one["state"] == "ready")
        last = now["last_exit"]
        assert (last["code"], last["signal"], last["reason"]) == (None, None, "crashed")
        assert session_of(before["embed/0"][0]) == set()


async def test_kept_engines_outlive_an_orderly_stop_and_are_adopted(tmp_path: Path, port_start: int) -> None:
    """With `on_exit = "keep"` a stop ends requests in flight in peace and leaves the engines to the next daemon."""
    config = KEEP + fake_engines(port_start) + CHAT
    async with daemon(config, tmp_path) as first:
        before = await fleet(first)
        body = ASK | {"stream": True, "fake": {"chunks": 20, "interval": 0.02}}
        async with first.session.post("/v1/chat/completions", json=body) as answer:
            await answer.content.readline()
            first.process.send_signal(signal.SIGTERM)
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        assert await first.stop() == 0
        assert all(len(session_of(pid)) == 2 for pid, _ in before.values())
    async with daemon(config.replace('"keep"', '"stop"'), tmp_path) as second:
        assert await fleet(second) == before
        assert await second.stop() == 0
    assert not any(session_of(pid) for pid, _ in before.values())


async def test_stop_all_ends_kept_engines_without_a_daemon(tmp_path: Path, port_start: int) -> None:
    """Whoever uninstalls the daemon is not left with processes; a second call finds nothing."""
    async with daemon(KEEP + fake_engines(port_start) + CHAT, tmp_path) as running:
        before = await fleet(running)
        assert await running.stop() == 0
    status, out, _ = await vllm_proxy(tmp_path, "stop", "--all")
    assert status == 0
    assert f"ending chat/0, process {before['chat/0'][0]}" in out
    assert not any(session_of(pid) for pid, _ in before.values())
    status, out, _ = await vllm_proxy(tmp_path, "stop", "--all")
    assert (status, out) == (0, f"no daemon runs; engines that one had left in {tmp_path / 'state'}: 0\n")


async def test_stop_all_ends_what_a_demo_has_left_where_no_other_place_is_named(
    tmp_path: Path, port_start: int
) -> None:
    """As every other command finds its daemon by itself."""
    home = {**clean_environment(), "HOME": str(tmp_path)}
    place = tmp_path / ".local/state/vllm-proxy-demo"
    place.parent.mkdir(parents=True)
    async with daemon(KEEP + fake_engines(port_start) + CHAT, tmp_path) as running:
        before = await fleet(running)
        assert await running.stop() == 0
    (tmp_path / "state").rename(place)
    ended = await asyncio.create_subprocess_exec(
        *PLAIN, "stop", "--all", env=home, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await ended.communicate()
    assert ended.returncode == 0
    assert f"engines that one had left in {place}: 2" in out.decode()
    assert not any(session_of(pid) for pid, _ in before.values())


async def test_a_daemon_killed_again_and_again_leaves_one_set_of_engines(tmp_path: Path, port_start: int) -> None:
    """However early in its life it dies, no engine is lost and none is started twice."""
    config = fake_engines(port_start) + CHAT
    seen: set[int] = set()
    for _ in range(4):
        async with daemon(config, tmp_path) as running:
            models = await running.get("/models/chat")
            seen |= {one["pid"] for one in models["status"]["instances"] if one["pid"]}
            await running.stop(signal.SIGKILL)
    async with daemon(config, tmp_path) as last:
        mine = {pid for pid, _ in (await fleet(last)).values()}
        for pid in seen - mine:
            await until_left(pid, 0)
        assert await last.stop() == 0
    assert not any(session_of(pid) for pid in seen | mine)


# Forks twice, as every classic daemon does: what stays is in a session whose leader is gone.
DAEMON = """
import os, signal, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        signal.pause()
    os._exit(0)
os.wait()
"""


@contextlib.asynccontextmanager
async def a_daemon_of_somebody_elses() -> AsyncIterator[tuple[int, int]]:
    """Its pid and its session; it lives on at the end of the block, whatever happened in it."""
    starter = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", DAEMON)
    await starter.wait()
    found = (look_up(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    (pid, session) = next((one.pid, one.session) for one in found if one and one.alive and is_daemon(one.pid))
    try:
        yield pid, session
        assert session_of(session) == {pid}
    finally:
        os.kill(pid, signal.SIGKILL)


def is_daemon(pid: int) -> bool:
    """Whether this is what DAEMON leaves."""
    try:
        return DAEMON.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def forge(folder: Path, key: str, old: object, new: object) -> None:
    """Change what is on record of an engine."""
    file = folder / "state" / "engines.toml"
    text = file.read_text()
    assert f"{key} = {old}\n" in text
    file.write_text(text.replace(f"{key} = {old}\n", f"{key} = {new}\n"))


async def test_a_stranger_with_a_recorded_pid_is_left_alone(tmp_path: Path, port_start: int) -> None:
    """A record with another start time speaks of a process that is gone; the engine itself is known by its mark."""
    async with daemon(KEEP + fake_engines(port_start) + EMBED, tmp_path) as first:
        before = await fleet(first)
        await first.stop()
    stranger = await asyncio.create_subprocess_exec("sleep", "1000")
    forge(tmp_path, "pid", before["embed/0"][0], stranger.pid)
    try:
        async with daemon(fake_engines(port_start) + EMBED, tmp_path) as second:
            after = await fleet(second)
            assert after["embed/0"][0] != before["embed/0"][0]
            assert session_of(before["embed/0"][0]) == set()
            assert stranger.returncode is None
    finally:
        stranger.kill()
        await stranger.wait()


async def test_members_of_a_later_session_with_a_recorded_number_are_left_alone(
    tmp_path: Path, port_start: int
) -> None:
    """The engine is gone, and its pid belongs to another program: neither a daemon nor a command ends that."""
    async with a_daemon_of_somebody_elses() as (_, session):
        for ends in ("by the next daemon", "by a command"):
            async with daemon(KEEP + fake_engines(port_start) + EMBED, tmp_path) as first:
                (pid, _) = (await fleet(first))["embed/0"]
                await first.stop()
            os.killpg(pid, signal.SIGKILL)
            forge(tmp_path, "pid", pid, session)
            if ends == "by a command":
                assert (await vllm_proxy(tmp_path, "stop", "--all"))[0] == 0
            else:
                async with daemon(fake_engines(port_start) + EMBED, tmp_path) as second:
                    await fleet(second)
                    await second.stop()
            assert "engines = []" in (tmp_path / "state" / "engines.toml").read_text()


async def test_a_record_that_cannot_be_used_costs_its_engine_alone(tmp_path: Path, port_start: int) -> None:
    """Garbage in one record: it is reported and stays, the other engine is adopted, the daemon starts."""
    async with daemon(KEEP + fake_engines(port_start) + EMBED + CHAT.replace("2", "1"), tmp_path) as first:
        before = await fleet(first)
        await first.stop()
    pid = before["embed/0"][0]
    forge(tmp_path, "pid", pid, 0)
    try:
        async with daemon(fake_engines(port_start) + EMBED + CHAT.replace("2", "1"), tmp_path) as second:
            after = await fleet(second)
            assert after["chat/0"] == before["chat/0"]
            await second.logged("a record of an engine cannot be used and is left alone")
            assert len(session_of(pid)) == 2
            assert await second.stop() == 0
        assert "pid = 0" in (tmp_path / "state" / "engines.toml").read_text()
    finally:
        os.killpg(pid, signal.SIGKILL)


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: becomes another user; CI runs it")
NOBODY = 65534


@ROOT
async def test_stop_all_as_root_acts_with_the_rights_of_who_wrote_the_state(open_path: Path, port_start: int) -> None:
    """What the record names of root's is neither killed nor removed, and no link leads it astray."""
    tmp_path = open_path
    async with daemon(KEEP + fake_engines(port_start) + CHAT, tmp_path) as first:
        before = await fleet(first)
        await first.stop()
    state = tmp_path / "state"
    precious = Path(f"/tmp/vp-{os.getpid()}")
    precious.mkdir()
    (state / ".engines.toml.new").symlink_to(precious / "made")
    text = (state / "engines.toml").read_text()
    (state / "engines.toml").write_text(re.sub(r'folder = ".*"', f'folder = "{precious}"', text, count=1))
    for path in (state, *state.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    try:
        status, out, err = await vllm_proxy(tmp_path, "stop", "--all")
        assert "Traceback" not in err, err
        assert status == 1, "engines of root's are not nobody's to end"
        assert "not all of them could be ended" in out
        assert all(len(session_of(leader)) == 2 for leader, _ in before.values())
        assert list(precious.iterdir()) == []
    finally:
        for leader, _ in before.values():
            os.killpg(leader, signal.SIGKILL)
        precious.rmdir()


@ROOT
async def test_stop_all_as_root_ends_the_engines_of_who_wrote_the_state(open_path: Path) -> None:
    """That user's rights are enough for that user's engines, and their folders."""
    engine = await asyncio.create_subprocess_exec(
        "setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "sleep", "1000",
        env={**os.environ, **marked("chat/0", "secret")}, start_new_session=True,
    )  # fmt: skip
    found = look_up(engine.pid)
    assert found is not None
    folder = Path(tempfile.mkdtemp(prefix="vp-", dir="/tmp"))
    record = EngineRecord("chat/0", "engine-0", engine.pid, found.started, "127.0.0.1:8001", "secret", str(folder), "")
    with StateDirectory(open_path / "state") as state:
        state.record(record)
    socket = folder / "socket"
    socket.touch()
    for path in (folder, socket, open_path / "state", *(open_path / "state").rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    try:
        status, _, err = await vllm_proxy(open_path, "stop", "--all")
        assert (status, err) == (0, "")
        assert await engine.wait() == -signal.SIGTERM
        assert not socket.exists()
        assert (open_path / "state/engines.toml").stat().st_uid == NOBODY
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(ProcessLookupError):
            engine.kill()


@ROOT
async def test_root_does_not_serve_from_what_another_user_wrote(tmp_path: Path) -> None:
    """A sentence that says whose it is, and what to do."""
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", NOBODY, -1)
    (tmp_path / "models.toml").touch()
    status, _, err = await vllm_proxy(tmp_path, "serve", "--config", str(tmp_path / "models.toml"))
    assert (status, "it belongs to nobody, and this is root" in err) == (1, True)
