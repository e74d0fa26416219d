"""Restarts of the daemon while clients ask it, with the socket unit."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.systemd.conftest import configure, drop_in, ready
from tests.systemd.machine import WAIT_SECONDS, Machine

pytestmark = pytest.mark.systemd

KEEP = Path(__file__).parents[2] / "packaging/systemd/keep-models.conf"
LOAD = Path(__file__).parent / "load.py"
BOTH = "vllm-proxy.socket", "vllm-proxy.service"
STREAM = '{"model": "chat", "stream": true, "fake": {"chunks": 8, "interval": 0.25}}'


class Clients:
    """Clients that ask until they are told to stop."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.result: dict[str, Any] = {}

    def until_answered(self, hundreds: int) -> None:
        """Wait for so many hundreds of answers more."""
        assert self._process.stdout is not None
        for _ in range(hundreds):
            assert self._process.stdout.readline().strip().isdigit()

    def stop(self) -> None:
        """Have them stop, and learn what became of their requests."""
        out, _ = self._process.communicate(timeout=60)
        self.result = json.loads(out.splitlines()[-1])


@contextlib.contextmanager
def asking(machine: Machine, kind: str) -> Iterator[Clients]:
    """Clients that ask while the block runs; `result` is there behind it."""
    command = ["nsenter", "-t", str(machine.pid), "-n", "--", sys.executable, str(LOAD), kind, "8000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        clients = Clients(process)
        try:
            clients.until_answered(1)
            yield clients
            clients.until_answered(2)
            clients.stop()
        finally:
            process.kill()


@pytest.fixture(params=["engines end with the daemon", "engines are kept"])
def serving(machine: Machine, request: pytest.FixtureRequest) -> Machine:
    """A machine with the socket unit and ready models."""
    if "kept" in request.param:
        drop_in(machine, KEEP.read_text(encoding="utf-8"), "keep-models")
    machine.run("systemctl", "start", "vllm-proxy.socket", "vllm-proxy.service")
    ready(machine)
    return machine


def test_nobody_notices_a_restart(serving: Machine) -> None:
    """Eight clients, a connection a request: none is refused and none fails while the daemon is replaced, twice."""
    with asking(serving, "raw") as clients:
        for _ in range(2):
            before = serving.show("vllm-proxy", "MainPID")
            serving.run("systemctl", "restart", "vllm-proxy")
            assert serving.show("vllm-proxy", "MainPID") != before
            ready(serving)  # what waits for a model that loads is told 503 by a daemon that stops
    assert (clients.result["refused"], clients.result["failed"]) == (0, {})


def test_nobody_is_refused_when_the_daemon_is_killed(serving: Machine) -> None:
    """What was in flight is lost, at most one request a client; everybody else is served by the next daemon."""
    with asking(serving, "raw") as clients:
        serving.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", "vllm-proxy")
        serving.until("vllm-proxy", NRestarts="1", ActiveState="active")
    assert clients.result["refused"] == 0
    assert sum(clients.result["failed"].values()) <= 8


def test_the_openai_client_does_not_notice_that_the_daemon_is_killed(serving: Machine) -> None:
    """It sends again what was lost in flight, and meets no refusal."""
    with asking(serving, "openai") as clients:
        serving.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", "vllm-proxy")
        serving.until("vllm-proxy", NRestarts="1", ActiveState="active")
    assert (clients.result["refused"], clients.result["failed"]) == (0, {})


def test_a_stream_ends_whole_before_a_restart_and_cut_where_the_daemon_is_killed(serving: Machine) -> None:
    """The drain lets it finish; after a SIGKILL the client sees that it is not complete."""
    line = f"curl -sSN -H 'Content-Type: application/json' -d '{STREAM}' localhost:8000/v1/chat/completions"
    for stop, whole in ((["restart"], True), (["kill", "--kill-who=main", "--signal=KILL"], False)):
        stream = serving.start(["sh", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert stream.stdout is not None
        first = stream.stdout.readline()
        serving.run("systemctl", *stop, "vllm-proxy")
        text = first + stream.communicate()[0]
        assert text.endswith("data: [DONE]\n\n") == whole
        assert (stream.returncode == 0) == whole
        ready(serving)


def test_an_address_of_systemd_that_is_not_loopback_is_open_to_nobody_without_a_key(machine: Machine) -> None:
    """As if the daemon had opened it, whoever connects to it from where; `[keys.anonymous]` opens what it says."""
    folder = machine.path("/etc/systemd/system/vllm-proxy.socket.d")
    folder.mkdir()
    (folder / "address.conf").write_text("[Socket]\nListenStream=\nListenStream=0.0.0.0:8000\n", encoding="utf-8")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "vllm-proxy.socket", "vllm-proxy.service")
    machine.eventually("/health", "models.ready", 2)
    for path in ("/models", "/v1/models"):
        refused = machine.shell(f"curl -sS --fail-with-body localhost:8000{path}", status=22)
        assert json.loads(refused)["error"]["code"] == "missing_api_key"
    assert "[keys.anonymous]" in machine.journal(), "a warning names both ways out"
    text = machine.path("/etc/vllm-proxy/models.toml").read_text()
    configure(machine, text + '[server]\nport = 9000\n[keys.anonymous]\nscopes = ["inference"]\n')
    machine.run("systemctl", "reload", "vllm-proxy")
    assert [model["id"] for model in machine.get("/v1/models")["data"]] == ["chat", "embed"]
    assert "missing_api_key" in machine.shell("curl -sS --fail-with-body localhost:8000/models", status=22)
    pending = machine.get("/health", control=True)["config"]["pending_restart"]
    assert pending == [], "the file does not say where it listens"


def test_a_client_that_waits_makes_no_loop_of_an_invalid_file(machine: Machine) -> None:
    """A few starts, then both units fail; with the file mended a plain start is enough, soon after."""
    good = machine.path("/etc/vllm-proxy/models.toml").read_text()
    drop_in(machine, "[Unit]\nStartLimitIntervalSec=40")  # systemd's 10 are too short for five starts on a busy machine
    configure(machine, "[rubbish")
    machine.run("systemctl", "start", "vllm-proxy.socket")
    machine.shell("curl -sS localhost:8000/health", status=None)
    machine.until("vllm-proxy.socket", ActiveState="failed", Result="service-start-limit-hit")
    assert machine.show("vllm-proxy", "ActiveState", "NRestarts") == {"ActiveState": "failed", "NRestarts": "0"}
    configure(machine, good)
    deadline = time.monotonic() + WAIT_SECONDS
    # One behind the other: the socket has a start limit of its own, which so many tries reach, and is refused for good
    # beside a service that runs without it.
    while any(machine.run("systemctl", "start", unit, status=None).returncode for unit in BOTH):
        assert time.monotonic() < deadline
    ready(machine)


def test_the_first_request_starts_the_service(machine: Machine) -> None:
    """With the socket alone nothing runs until somebody asks; that request is served."""
    machine.run("systemctl", "start", "vllm-proxy.socket")
    assert machine.show("vllm-proxy", "ActiveState")["ActiveState"] == "inactive"
    assert machine.get("/v1/models")["data"][0]["id"] == "chat"
    machine.until("vllm-proxy", ActiveState="active")
