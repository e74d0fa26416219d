"""What the daemon tells systemd, through a real datagram socket."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import cast

import pytest
import structlog

from tests.engine.virtual import VirtualLoop, settle, virtual
from vllm_proxy import systemd as systemd_module
from vllm_proxy.systemd import Systemd, watchdog_seconds


@pytest.fixture
def notify_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Systemd's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(0)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield end


@contextmanager
def telling() -> Iterator[Systemd]:
    """The daemon's end, which lives as long as the daemon."""
    systemd = Systemd()
    yield systemd
    if systemd._notifier:
        systemd._notifier.socket.close()


def heard(end: socket.socket) -> list[str]:
    """Every message so far."""
    messages = []
    while True:
        try:
            messages.append(end.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_ready_and_stopping_are_told(notify_socket: socket.socket) -> None:
    """Each is one message, in the words of sd_notify(3)."""
    with telling() as systemd:
        systemd.ready()
        systemd.stopping()
    assert heard(notify_socket) == ["READY=1", "STOPPING=1"]


def test_the_status_is_told_only_when_it_changes(notify_socket: socket.socket) -> None:
    """The same sentence twice is one message; an old one that comes back is told again."""
    with telling() as systemd:
        for sentence in ("0 of 1 models ready", "0 of 1 models ready", "1 of 1 models ready", "0 of 1 models ready"):
            systemd.status(sentence)
    assert heard(notify_socket) == [
        "STATUS=0 of 1 models ready", "STATUS=1 of 1 models ready", "STATUS=0 of 1 models ready",
    ]  # fmt: skip


def test_an_abstract_socket_is_reached_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers get a name that begins with @ instead of a path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind("")  # the kernel chooses an abstract name
        end.settimeout(0)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + end.getsockname()[1:].decode())
        with telling() as systemd:
            systemd.ready()
        assert heard(end) == ["READY=1"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sdnotify drops a socket that it could not connect
@pytest.mark.parametrize(("address", "logged"), [(None, 0), ("", 0), ("/nowhere/at/all", 1), ("vsock:2:1234", 1)])
def test_without_systemd_all_of_it_is_silence(
    monkeypatch: pytest.MonkeyPatch, address: str | None, logged: int
) -> None:
    """A socket that nobody listens at is an error in the log: systemd would wait for the daemon until it kills it."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    with structlog.testing.capture_logs() as logs, telling() as systemd:
        systemd.ready()
        systemd.status("fine")
        systemd.stopping()
    assert [(log["event"], log["socket"]) for log in logs] == [
        ("systemd cannot be told that the daemon runs", address)
    ] * logged


def test_a_systemd_that_goes_away_is_no_error(notify_socket: socket.socket) -> None:
    """A message that nobody takes is lost, and the daemon goes on."""
    with telling() as systemd:
        notify_socket.close()
        systemd.ready()


async def test_the_watchdog_hears_the_event_loop(notify_socket: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message at once and one in half of the time that it allows, as sd_watchdog_enabled(3) asks for."""
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    loop, messages = asyncio.get_running_loop(), []
    with telling() as systemd:
        beating = asyncio.create_task(systemd.ping_watchdog())
        times = []
        for _ in range(3):
            messages.append((await loop.sock_recv(notify_socket, 100)).decode())
            times.append(loop.time())
        beating.cancel()
    assert messages == ["WATCHDOG=1"] * 3
    assert times[2] - times[0] > 0.01


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}],
    ids=str,
)
def test_a_watchdog_of_somebody_else_is_none(environment: dict[str, str]) -> None:
    """No time, no number, or another process's."""
    assert watchdog_seconds(environment) is None


async def test_more_time_is_asked_for_until_the_limit(notify_socket: socket.socket) -> None:
    """A stop that never ends must meet systemd's timeout."""
    with telling() as systemd:
        await systemd.extend(0)
        assert heard(notify_socket) == []
        extending = asyncio.create_task(systemd.extend(60))
        message = await asyncio.get_running_loop().sock_recv(notify_socket, 100)
        extending.cancel()
    assert message == b"EXTEND_TIMEOUT_USEC=30000000"


INHERIT = """
import json, os, sys
from vllm_proxy.errors import StartupError
from vllm_proxy.domain.config import Server
from vllm_proxy.listen import inherited
from vllm_proxy import systemd as systemd_module
from vllm_proxy.systemd import inherited_sockets
os.environ["LISTEN_PID"] = sys.argv[1] if len(sys.argv) > 1 else str(os.getpid())
try:
    found = inherited_sockets(os.environ)
    again = inherited_sockets(os.environ)
except StartupError as error:
    print(error)
else:
    inheritable = [listener.get_inheritable() for listener in found]
    urls = [one.listener.url for one in inherited(found, Server())]
    print(json.dumps([urls, len(again), inheritable, "LISTEN_FDS" in os.environ]))
"""


def inherit(listeners: Sequence[socket.socket], *arguments: str) -> str:
    """What a process says of the sockets that it inherits as descriptors 3 and up."""
    given = [listener.fileno() for listener in listeners]
    moves = "".join(f" {3 + place}<&{descriptor}" for place, descriptor in enumerate(given))
    done = subprocess.run(
        ["bash", "-c", f'exec "$@"{moves}', "-", sys.executable, "-c", INHERIT, *arguments],
        env={**os.environ, "LISTEN_FDS": str(len(given)), "LISTEN_FDNAMES": "http"},
        pass_fds=given, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_inherited_sockets_are_taken_once_and_not_passed_on(tmp_path: Path) -> None:
    """TCP and Unix; engines would hold the port otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        addresses = [f"http://127.0.0.1:{tcp.getsockname()[1]}", f"unix:{tmp_path}/s"]
        assert json.loads(inherit([tcp, unix])) == [addresses, 0, [False, False], False]


def test_sockets_for_another_process_are_left_alone() -> None:
    """`LISTEN_PID` says whose they are: a child of the one meant has the variables too."""
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        assert json.loads(inherit([tcp], "1")) == [[], 0, [], True]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_what_does_not_listen_is_refused(kind: socket.SocketKind) -> None:
    """A connection (`Accept=yes`) or datagrams: the unit is wrong, and says so."""
    with socket.socket(type=kind) as other:
        assert "cannot use the inherited descriptor 3: only listening stream sockets" in inherit([other])


def test_more_time_is_asked_for_as_often_as_it_takes_whatever_the_clock_says(notify_socket: socket.socket) -> None:
    """A machine that stood still has not used its time up."""

    @virtual
    async def run() -> None:
        with telling() as systemd:
            asking = asyncio.ensure_future(systemd.extend(45))
            await settle()
            cast("VirtualLoop", asyncio.get_running_loop()).jump(3600)
            await asking

    run()
    assert heard(notify_socket) == ["EXTEND_TIMEOUT_USEC=30000000"] * 5


def test_a_status_has_any_characters_of_unicode_and_one_line(notify_socket: socket.socket) -> None:
    """UTF-8, as systemd asks for; what a quoted key or a path brings along is no assignment of its own."""
    with telling() as systemd:
        systemd.status("rejected: /srv/modèles/模型.toml:1: a\nREADY=1\0\u2028…")
        systemd.status("模" * 4096)
    first, second = heard(notify_socket)
    assert first == "STATUS=rejected: /srv/modèles/模型.toml:1: a READY=1  …"
    assert second == f"STATUS={'模' * ((4095 - len('STATUS=')) // 3)}"


def test_a_systemd_that_reads_nothing_holds_nobody_up(notify_socket: socket.socket) -> None:
    """Its queue holds a few messages; the rest of what is said again is dropped, and later ones are heard."""
    with telling() as systemd:
        taken = [systemd.status(str(number)) for number in range(1000)]
        assert len(heard(notify_socket)) == taken.count(True) < 1000
        assert (taken[0], taken[-1]) == (True, False)
        assert systemd.status("999")
        systemd.ready()
    assert heard(notify_socket) == ["STATUS=999", "READY=1"]


@pytest.mark.usefixtures("notify_socket")
def test_a_systemd_that_takes_no_readiness_is_an_error_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit would stay `reloading`, and nobody would know why."""
    monkeypatch.setattr(systemd_module, "_SEND_SECONDS", 0.01)
    with telling() as systemd, structlog.testing.capture_logs() as logs:
        numbers = count()
        while systemd.status(str(next(numbers))):
            pass
        systemd.ready()
    assert [(log["event"], log["message"]) for log in logs] == [("systemd takes no messages", "READY=1")]
