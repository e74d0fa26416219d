"""Whatever is wrong around a command: it ends, says why in one sentence, and its exit status is the contract's."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.forks import NOBODY, Ended, Forks, Run, shared
from tests.harness import WAIT_SECONDS, clean_environment, daemon, fake_engines, free_port, vllm_proxy

CHAT = '[models.chat]\nmodel = "org/chat"\n'
ASKING = {  # a running daemon
    "status": ("status",),
    "events": ("events",),
    "requests": ("requests", "--json"),
    "plan": ("plan",),
    "plan --json": ("plan", "--json"),
    "reload": ("reload",),
    "reload --json": ("reload", "--json"),
    "start": ("start", "chat"),
    "stop": ("stop", "chat"),
    "stop --json": ("stop", "chat", "--json"),
    "stop --all": ("stop", "--all"),
    "stop --all --json": ("stop", "--all", "--json"),
    "restart": ("restart", "chat"),
    "logs": ("logs", "chat"),
    "logs -f": ("logs", "chat", "-f"),
}
OF_A_FILE = {"check": ("check",), "check --json": ("check", "--json")}
ALL = {**ASKING, **OF_A_FILE, "init": ("init", "-c", "first.toml")}
SERVING = {"serve": ("serve", "--port", "{port}"), "demo": ("demo", "--port", "{port}")}
WITHOUT_A_DAEMON = dict.fromkeys(ASKING, 3) | {"plan": 2, "plan --json": 2, "stop --all": 0, "stop --all --json": 0}
IS_ROOT = os.geteuid() == 0


@pytest.fixture
def fork() -> Forks:
    """What runs the commands."""
    return shared()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users may enter, with a configuration in `work`."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    (place / "work").mkdir()
    (place / "work/models.toml").write_text(CHAT)
    yield place
    for closed in ("state", "work", "run"):
        with contextlib.suppress(OSError):
            (place / closed).chmod(0o700)
    shutil.rmtree(place)


def somebody(folder: Path) -> Run:
    """An ordinary user whose folder this is; the command is still to be named."""
    if IS_ROOT:
        for place in (folder, *folder.rglob("*")):
            os.chown(place, NOBODY, NOBODY, follow_symlinks=False)
    env = {**clean_environment(), "HOME": str(folder), "VLLM_PROXY_STATE_DIR": str(folder / "state")}
    return Run([], str(folder / "work"), env, NOBODY if IS_ROOT else None)


def closed(place: Path) -> None:
    """Let the ordinary user of these tests not use it."""
    if IS_ROOT:
        os.chown(place, 0, 0)
    place.chmod(0o700 if IS_ROOT and place.is_dir() else 0o600 if IS_ROOT else 0)


def ended(fork: Forks, commands: dict[str, tuple[str, ...]], run: Run, *, at_once: bool = False) -> dict[str, Ended]:
    """What became of each command, none of which may end in a traceback or hang.

    `at_once`: where none of them comes so far that it would take the state directory, which has one user at a time.
    """
    port = str(free_port())
    found: dict[str, Ended] = {}
    alone = {name: commands[name] for name in ("stop --all --json",) if name in commands and not at_once}
    for batch in ({name: tokens for name, tokens in commands.items() if name not in alone}, alone):
        runs = [replace(run, arguments=[token.format(port=port) for token in tokens]) for tokens in batch.values()]
        found |= zip(batch, fork.run(runs), strict=True)
    for name, one in found.items():
        said = one.out + one.err
        assert "Traceback" not in said, (name, said)
        assert "Exception" not in said, (name, said)
        assert one.status in {0, 1, 2, 3, 78}, (name, one)
    return found


def each_says(found: dict[str, Ended], status: int | dict[str, int], *words: str) -> None:
    """Each has this status, and says all of these words in one line."""
    for name, one in found.items():
        assert one.status == (status if isinstance(status, int) else status[name]), (name, one)
        if one.status in {0, 2}:
            continue
        told = [line for line in (one.err + one.out).splitlines() if all(word in line for word in words)]
        assert len(told) == 1, (name, words, one)


@contextlib.contextmanager
def listener(place: Path, answer: bytes | None = None) -> Iterator[None]:
    """Something that listens on a socket: it says `answer` to whoever comes and leaves; None: it never accepts."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
        place.chmod(0o777)
        server.listen(100)
        if answer is None:
            yield
            return

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    with client, contextlib.suppress(OSError):
                        client.recv(2**16)
                        client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


# An ordinary user beside the system's daemon


@pytest.mark.parametrize("what", ["folder", "socket"])
def test_a_daemon_of_another_user_is_permission_denied(fork: Forks, folder: Path, what: str) -> None:
    """Every command that asks it says so and how to do it, and none takes it for no daemon."""
    run = somebody(folder)
    (folder / "run").mkdir()
    socket_file = folder / "run/control.sock"
    with listener(socket_file):
        closed(folder / "run" if what == "folder" else socket_file)
        asked = replace(run, env={**run.env, "RUNTIME_DIRECTORY": str(folder / "run")})
        found = ended(fork, ASKING, asked)
    each_says(found, 1, "permission denied", str(socket_file), "run it with sudo")


def test_a_state_directory_of_another_user_is_permission_denied(fork: Forks, folder: Path) -> None:
    """That of the daemon whose socket lies in it, or whose engines are to be ended."""
    run = somebody(folder)
    (folder / "state").mkdir()
    closed(folder / "state")
    each_says(ended(fork, ASKING, run), 1, "permission denied", str(folder / "state"), "run it with sudo")
    each_says(ended(fork, {"serve": SERVING["serve"]}, run), 1, str(folder / "state"), "Permission denied")


def test_a_file_of_another_user_cannot_be_read(fork: Forks, folder: Path) -> None:
    """78 wherever the file is what the command is about."""
    run = somebody(folder)
    closed(folder / "work/models.toml")
    about = {"check": ("check",), "plan": ("plan",), "serve": SERVING["serve"]}
    each_says(ended(fork, about, run), 78, str(folder / "work/models.toml"), "Permission denied", "sudo")


# No daemon, or something else


@pytest.mark.parametrize("what", ["nothing", "stale", "file", "gone at once"])
def test_where_no_daemon_listens_it_is_3(fork: Forks, folder: Path, what: str) -> None:
    """Be it that a dead one has left its socket, or that it is no socket at all; what needs none does its work."""
    run = somebody(folder)
    (folder / "state").mkdir(mode=0o777)
    (folder / "state").chmod(0o777)
    place = folder / "state/control.sock"
    if what == "file":
        place.write_text("no socket")
    if what == "stale":
        with listener(place):
            pass
    if what == "gone at once":
        with listener(place, b""):
            each_says(ended(fork, ASKING, run), 3, "the daemon", "has ended meanwhile")
    else:
        each_says(ended(fork, ASKING, run), WITHOUT_A_DAEMON, f"none listens on {place}")


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail.example ESMTP\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
        b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n\xff\xfe{}",
    ],
)
def test_what_is_no_daemon_is_told_as_such(fork: Forks, folder: Path, answer: bytes) -> None:
    """No HTTP, no JSON, or none of ours."""
    run = somebody(folder)
    (folder / "state").mkdir()
    with listener(folder / "state/control.sock", answer):
        found = ended(fork, ASKING, run)
    each_says(found, 1, "cannot understand what answers at", "it is no vllm-proxy")


async def test_a_daemon_that_no_longer_answers_is_noticed(fork: Forks, tmp_path: Path, port_start: int) -> None:
    """By who asks it only then, and by who is in the middle of something; none waits for more than a moment."""
    table = CHAT + f'args = {{ fake_phase_until = "weights={tmp_path / "never"}" }}\n'
    async with daemon(fake_engines(port_start) + table, tmp_path) as running:
        middle = await in_the_middle(tmp_path)
        running.process.send_signal(signal.SIGSTOP)
        try:
            run = Run([], str(tmp_path), {**clean_environment(), "VLLM_PROXY_STATE_DIR": str(tmp_path / "state")})
            found = await asyncio.to_thread(ended, fork, ASKING, run, at_once=True)
            each_says(found, 1, "cannot get an answer of the daemon", "it is stopped, hangs or is overloaded")
            for status, said in await ends_of(middle):
                assert (status, said.count("\n")) == (1, 1)
                assert "cannot get an answer of the daemon" in said
        finally:
            running.process.send_signal(signal.SIGCONT)


async def test_a_daemon_that_dies_in_the_middle_is_noticed(tmp_path: Path, port_start: int) -> None:
    """Whoever follows its logs or waits for a model says so, and exits with 3."""
    table = CHAT + f'args = {{ fake_phase_until = "weights={tmp_path / "never"}" }}\n'
    async with daemon(fake_engines(port_start) + table, tmp_path) as running:
        middle = await in_the_middle(tmp_path)
        await running.stop(signal.SIGKILL)
        for status, said in await ends_of(middle):
            assert (status, said.count("\n")) == (3, 1)
            assert "has ended meanwhile; its log says why" in said
    assert (await vllm_proxy(tmp_path, "stop", "--all"))[0] == 0


async def in_the_middle(folder: Path) -> list[asyncio.subprocess.Process]:
    """Commands that wait for the model `chat`, which never comes up; each has said something already."""

    async def begun(*arguments: str) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "vllm_proxy", *arguments, "--state-dir", str(folder / "state")]
        process = await asyncio.create_subprocess_exec(
            *command, env=clean_environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline()
        return process

    commands = (("logs", "chat", "-f"), ("start", "chat"), ("restart", "chat"))
    return list(await asyncio.gather(*(begun(*command) for command in commands)))


async def ends_of(processes: Sequence[asyncio.subprocess.Process]) -> list[tuple[int | None, str]]:
    """Status and complaint of each."""
    async with asyncio.timeout(WAIT_SECONDS):
        said = [(await process.communicate())[1].decode() for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


# Where a command works and what it writes to


@pytest.mark.parametrize("home", [None, ""])
def test_without_a_home_every_command_works_or_says_why(fork: Forks, folder: Path, home: str | None) -> None:
    """Services and containers have none."""
    run = somebody(folder)
    env = {name: value for name, value in run.env.items() if name not in {"HOME", "VLLM_PROXY_STATE_DIR"}}
    run = replace(run, env=env if home is None else {**env, "HOME": home})
    found = ended(fork, ALL, run)
    statuses = WITHOUT_A_DAEMON | {"check": 0, "check --json": 0, "init": 0}
    each_says(found, statuses, "none listens on")


def test_where_nothing_may_be_written_every_command_works_or_says_why(fork: Forks, folder: Path) -> None:
    """Neither in the working directory nor in that of the state."""
    run = somebody(folder)
    for place in (folder, folder / "work"):
        place.chmod(0o555)
        if IS_ROOT:
            os.chown(place, 0, 0)
    found = ended(fork, ALL, run)
    init = {"init": found.pop("init")}
    each_says(init, 1, "cannot write", "Permission denied", "--config")
    each_says(found, WITHOUT_A_DAEMON | {"check": 0, "check --json": 0}, "none listens on")
    each_says(ended(fork, {"serve": SERVING["serve"]}, run), 1, "cannot use the state directory", "--state-dir")
    folder.chmod(0o755)


def test_a_working_directory_that_is_gone_is_told(fork: Forks, folder: Path) -> None:
    """No path can be made whole then."""
    found = ended(fork, ALL, replace(somebody(folder), cwd=""))
    each_says(found, 1, "the working directory is gone; cd into one that is there")


@pytest.mark.skipif(not IS_ROOT, reason="nobody else comes into a folder that is closed to him")
def test_a_working_directory_of_another_user_is_no_hindrance(fork: Forks, folder: Path) -> None:
    """As with `sudo -u vllm-proxy` in root's home: nothing in there can be meant."""
    run = somebody(folder)
    (folder / "mine.toml").write_text(CHAT)
    (folder / "mine.toml").chmod(0o644)
    closed(folder / "work")
    each_says(ended(fork, {"check": ("check", "-c", str(folder / "mine.toml"))}, run), 0)
    asking = {name: tokens for name, tokens in ASKING.items() if not name.startswith("plan")}
    each_says(ended(fork, asking, run), WITHOUT_A_DAEMON, "none listens on")
    each_says(ended(fork, {"check": ("check",)}, run), 78, "models.toml", "Permission denied")


@pytest.mark.parametrize("what", ["folder", "unreadable", "no text"])
def test_a_dotenv_that_cannot_be_used_is_told(fork: Forks, folder: Path, what: str) -> None:
    """A folder of that name is somebody's virtual environment; anything else would be a setting."""
    run = somebody(folder)
    file = folder / "work/.env"
    if what == "folder":
        file.mkdir()
        statuses = WITHOUT_A_DAEMON | dict.fromkeys(OF_A_FILE, 0)
        each_says(ended(fork, {**ASKING, **OF_A_FILE}, run), statuses, "none listens on")
        return
    file.write_bytes(b"A=\xff\n")
    if what == "unreadable":
        closed(file)
    statuses = dict.fromkeys(ASKING, 1) | dict.fromkeys([*OF_A_FILE, "plan", "plan --json", "serve"], 78)
    found = ended(fork, {**ASKING, **OF_A_FILE, "serve": SERVING["serve"]}, run)
    each_says(found, statuses, ".env", "cannot read it", "in another folder")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_knows_no_such_letter_is_told_in_others(fork: Forks, folder: Path, encoding: str) -> None:
    """Nothing that is printed fails for its letters."""
    (folder / "work").rename(folder / "\N{SNOWMAN}")
    (folder / "work").symlink_to(folder / "\N{SNOWMAN}")
    run = replace(somebody(folder), cwd=str(folder / "\N{SNOWMAN}"), encoding=encoding)
    found = ended(fork, OF_A_FILE, run)
    assert found["check"].out == f"{folder}/\\u2603/models.toml: valid, 1 model\n"
    name = os.fsdecode(b"\xff")
    odd = {"stop": ("stop", name), "logs": ("logs", name), "check": ("check", "-c", name), "start": ("start", "\u2603")}
    each_says(ended(fork, odd, run), {"stop": 3, "logs": 3, "check": 78, "start": 3}, "")


async def test_an_output_that_cannot_be_written_is_told(fork: Forks, tmp_path: Path, port_start: int) -> None:
    """A full disk is a failure, and so is none at all; a reader that went away ends the command in silence."""
    models = "".join(f'[models.{name}]\nmodel = "x"\n' for name in ("chat", "two", "three"))
    async with daemon(fake_engines(port_start) + models, tmp_path) as running:
        await running.all_ready()
        env = {**clean_environment(), "VLLM_PROXY_STATE_DIR": str(tmp_path / "state")}
        run = Run([], str(tmp_path), env)
        at_once = {**ALL, "restart": ("restart", "two"), "stop": ("stop", "three")}
        at_once["stop --json"] = ("stop", "three", "--json")
        everything = {name: at_once.pop(name) for name in ("stop --all", "stop --all --json")}
        for batch in (at_once, everything):
            full = await asyncio.to_thread(ended, fork, batch, replace(run, stdout="full"))
            if "init" in full:
                (tmp_path / "first.toml").unlink()
            each_says(full, 1, "vllm-proxy: cannot write to the standard output: No space left on device")
            left = await asyncio.to_thread(ended, fork, batch, replace(run, stdout="left"))
            assert {(one.status, one.err) for one in left.values()} == {(1, "")}
            if "init" in left:
                (tmp_path / "first.toml").unlink()
            none = await asyncio.to_thread(ended, fork, batch, replace(run, stdout="closed"))
            each_says(none, 1, "vllm-proxy: cannot write to the standard output: it is closed")


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["keys", "new", "--help"]], ids=" ".join)
def test_a_help_that_cannot_be_written_is_told(tmp_path: Path, arguments: list[str], buffered: str) -> None:
    """As every other output; argparse would say nothing, and the version be a traceback where nothing is buffered."""
    env = {**clean_environment(), "PYTHONUNBUFFERED": buffered}
    said = []
    for command in ('exec "$@" >/dev/full', 'exec "$@" >&-', '{ "$@"; echo $? >status; } | true; exit "$(cat status)"'):
        done = subprocess.run(
            ["sh", "-c", command, "sh", sys.executable, "-m", "vllm_proxy", *arguments],
            env=env, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        said.append((done.returncode, done.stderr))
    words = "vllm-proxy: cannot write to the standard output: "
    assert said == [(1, f"{words}No space left on device\n"), (1, f"{words}it is closed\n"), (1, "")]
