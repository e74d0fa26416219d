"""What the daemon tells systemd, through a real datagram socket."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_proxy.systemd import Systemd


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
    if systemd._notifier and systemd._notifier.socket:
        systemd._notifier.socket.close()


def heard(end: socket.socket) -> list[str]:
    """Every letter so far."""
    letters = []
    while True:
        try:
            letters.append(end.recv(4096).decode())
        except BlockingIOError:
            return letters


def test_ready_and_stopping_are_told(notify_socket: socket.socket) -> None:
    """Each is one letter, in the words of sd_notify(3)."""
    with telling() as systemd:
        systemd.ready()
        systemd.stopping()
    assert heard(notify_socket) == ["READY=1", "STOPPING=1"]


def test_the_status_is_told_only_when_it_changes(notify_socket: socket.socket) -> None:
    """The same sentence twice is one letter; an old one that comes back is told again."""
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
@pytest.mark.parametrize("address", [None, "", "/nowhere/at/all"])
def test_without_systemd_all_of_it_is_silence(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """No socket, or one that nobody listens at, is no error."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    with telling() as systemd:
        systemd.ready()
        systemd.status("fine")
        systemd.stopping()


def test_a_systemd_that_goes_away_is_no_error(notify_socket: socket.socket) -> None:
    """A letter that nobody takes is lost, and the daemon goes on."""
    with telling() as systemd:
        notify_socket.close()
        systemd.ready()
