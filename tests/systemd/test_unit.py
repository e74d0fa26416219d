"""The unit files, on a machine with the systemd of this one's root."""

import json
import re
from pathlib import Path

import pytest

from tests.systemd.conftest import CHAT, EMBED, ENGINES, configure, drop_in, ready, serve
from tests.systemd.machine import CONTROL, Machine

pytestmark = pytest.mark.systemd

FILE = "/etc/vllm-proxy/models.toml"
ASK = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]})
POST = "curl -sS --fail-with-body -H 'Content-Type: application/json'"
PATCH = f"{POST} --unix-socket {CONTROL} -X PATCH -d '{{\"max_model_len\": 256}}' http://localhost/models/chat"
GROUP = "/sys/fs/cgroup/system.slice/vllm-proxy.service"


def ask(machine: Machine, model: str = "chat") -> str:
    """A chat completion."""
    body = ASK.replace('"chat"', f'"{model}"')
    return machine.shell(f"{POST} -d '{body}' localhost:8000/v1/chat/completions")


@pytest.mark.parametrize("keeps_models", [False, True])
def test_systemd_finds_no_fault_and_little_exposure(machine: Machine, *, keeps_models: bool) -> None:
    """`verify` prints nothing, and `security` says 2.5 at most, out of 10; also when engines are kept."""
    if keeps_models:
        machine.shell(
            "install -D -m 644 -t /etc/systemd/system/vllm-proxy.service.d /src/packaging/systemd/keep-models.conf"
        )
    verified = machine.run("systemd-analyze", "verify", "--man=no", "vllm-proxy.service", "vllm-proxy.socket")
    assert verified.stdout + verified.stderr == ""
    machine.run("systemd-analyze", "security", "--threshold=25", "--no-pager", "vllm-proxy.service")


def test_a_start_is_done_when_the_daemon_listens(machine: Machine) -> None:
    """`activating` while it reads what it needs; then active, with models that still load, as STATUS= tells."""
    configure(machine, ENGINES + CHAT + 'args = { fake_load_until = "/tmp/go" }\n')
    machine.shell("mkdir -p /opt/slow")
    machine.path("/opt/slow/sitecustomize.py").write_text(
        'import os, time\nwhile not os.path.exists("/opt/slow/go"):\n    time.sleep(0.01)\n', encoding="utf-8"
    )
    drop_in(machine, "Environment=PYTHONPATH=/opt/slow")
    machine.run("systemctl", "start", "--no-block", "vllm-proxy")
    machine.until("vllm-proxy", ActiveState="activating", SubState="start")
    machine.shell("touch /opt/slow/go")
    machine.until("vllm-proxy", ActiveState="active", SubState="running")
    assert machine.get("/health")["models"]["loading"] == 1
    assert machine.show("vllm-proxy", "StatusText")["StatusText"].startswith("0 of 1 models ready; loading: chat")


def test_the_status_is_a_sentence_about_the_fleet(machine: Machine) -> None:
    """As `systemctl status` shows it."""
    serve(machine)
    machine.until_status("2 of 2 models ready")
    assert 'Status: "2 of 2 models ready"' in machine.run("systemctl", "status", "--no-pager", "vllm-proxy").stdout


def test_a_reload_moves_only_what_changed(machine: Machine) -> None:
    """`systemctl reload` returns when the file is adopted, and the other model keeps its process."""
    before = serve(machine)
    drop_in(machine, "")  # so that it is not the watcher that was quicker
    configure(machine, ENGINES + CHAT + "max_model_len = 512\n" + EMBED)
    machine.run("systemctl", "reload", "vllm-proxy")
    assert machine.get("/models/chat")["spec"]["max_model_len"] == 512
    machine.eventually("/models/chat", "status.state", "ready")
    after = ready(machine)
    assert after["embed"] == before["embed"]
    assert after["chat"] != before["chat"]


def test_a_refused_reload_fails_and_changes_nothing(machine: Machine) -> None:
    """The exit status is not 0, the journal names key and line, and what ran goes on."""
    before = serve(machine)
    configure(machine, ENGINES + CHAT + "max_model_length = 512\n" + EMBED)
    machine.run("systemctl", "reload", "vllm-proxy", status=1)
    assert re.search(r"models\.toml:7: models\.chat\.max_model_length: .*max_model_len\b", machine.journal())
    assert ready(machine) == before
    machine.until_status("configuration rejected")
    machine.until("vllm-proxy", ActiveState="active")


def test_sighup_reloads_too(machine: Machine) -> None:
    """RELOADING=1, then READY=1: also after a refusal the unit is active again, not `reloading` for good."""
    serve(machine)
    configure(machine, "[rubbish")
    machine.run("systemctl", "kill", "--kill-who=main", "--signal=HUP", "vllm-proxy")
    machine.eventually("/health", "models.ready", 2)
    machine.until_status("configuration rejected")
    machine.until("vllm-proxy", ActiveState="active")


def test_a_blocked_event_loop_is_found_and_named(machine: Machine) -> None:
    """The watchdog ends the daemon; the journal shows where it hung; the next one serves."""
    hang = "import signal, time\ndef hang(*_): time.sleep(3600)\nsignal.signal(signal.SIGUSR1, hang)\n"
    machine.path("/opt/hang").mkdir()
    machine.path("/opt/hang/sitecustomize.py").write_text(hang, encoding="utf-8")
    drop_in(machine, "WatchdogSec=2\nEnvironment=PYTHONPATH=/opt/hang")
    before = serve(machine)
    machine.run("systemctl", "kill", "--kill-who=main", "--signal=USR1", "vllm-proxy")
    machine.until("vllm-proxy", NRestarts="1", ActiveState="active")
    journal = machine.journal()
    assert "Watchdog timeout (limit 2s)!" in journal
    assert 'File "/opt/hang/sitecustomize.py", line 2 in hang' in journal
    after = ready(machine)
    assert not set(after.values()) & set(before.values())
    ask(machine)


def test_a_stubborn_engine_does_not_hold_a_stop(machine: Machine) -> None:
    """It gets SIGKILL after `stop_timeout`; the stop is a success, and nothing is left."""
    configure(machine, ENGINES + CHAT + 'stop_timeout = "1s"\nargs = { fake_ignore_sigterm = true }\n' + EMBED)
    before = serve(machine)
    machine.run("systemctl", "stop", "vllm-proxy")
    shown = machine.show("vllm-proxy", "ActiveState", "Result", "ExecMainStatus")
    assert shown == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert not any(machine.path(f"/proc/{pid}").exists() for pid in before.values())
    assert not machine.path(GROUP).exists()


def test_a_drain_may_take_longer_than_systemd_would_wait(machine: Machine) -> None:
    """The daemon asks for more time while a request runs, which ends whole."""
    drop_in(machine, "TimeoutStopSec=1")
    serve(machine)
    body = '{"model": "chat", "stream": true, "fake": {"chunks": 12, "interval": 0.25}}'
    stream = machine.start(["sh", "-c", f"{POST} -N -d '{body}' localhost:8000/v1/chat/completions"], stdout=-1)
    assert stream.stdout is not None
    first = stream.stdout.readline()
    machine.run("systemctl", "stop", "vllm-proxy")
    assert (first + stream.communicate()[0]).endswith("data: [DONE]\n\n")
    assert machine.show("vllm-proxy", "Result")["Result"] == "success"


def test_an_invalid_file_fails_at_once_and_for_good(machine: Machine) -> None:
    """Exit status 78, the problems in the journal, and no restart."""
    configure(machine, ENGINES + CHAT + 'replicas = "many"\n')
    machine.run("systemctl", "start", "vllm-proxy", status=1)
    shown = machine.show("vllm-proxy", "ActiveState", "ExecMainStatus", "NRestarts")
    assert shown == {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0"}
    assert "models.toml:7: models.chat.replicas: expected" in machine.journal()


def test_rest_writes_the_file(machine: Machine) -> None:
    """The service may write its folder in /etc; comments, mode and owner stay."""
    configure(machine, "# mine\n" + ENGINES + CHAT + EMBED)
    serve(machine)
    machine.shell(PATCH)
    file = machine.path(FILE)
    assert file.read_text().startswith("# mine\n")
    assert "max_model_len = 256" in file.read_text()
    assert machine.shell(f"stat -c '%U %G %a' {FILE}") == "vllm-proxy vllm-proxy 640\n"


@pytest.mark.parametrize(
    "how",
    [f"chmod 444 {FILE}", "chown root /etc/vllm-proxy", "mount --bind -r /etc/vllm-proxy /etc/vllm-proxy"],
)
def test_a_read_only_file_stays_as_it_is(machine: Machine, how: str) -> None:
    """409 `config_read_only`, and what an editor writes is followed all the same."""
    machine.shell(how)
    serve(machine)
    text = machine.path(FILE).read_text()
    assert json.loads(machine.shell(PATCH, status=22))["error"]["code"] == "config_read_only"
    assert machine.path(FILE).read_text() == text


def test_the_service_is_confined(machine: Machine) -> None:
    """It and its engines run as a user of their own, may gain no rights, and reach few devices and system calls."""
    engines = serve(machine)
    for pid in engines.values():
        status = dict(
            line.split(":\t", 1)
            for line in machine.path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["Uid"].split()[0] == machine.shell("id -u vllm-proxy").strip()
        assert (status["NoNewPrivs"], status["Seccomp"], int(status["CapBnd"], 16)) == ("1", "2", 0)
    inside = f"nsenter -t {engines['chat']} -m --"
    machine.shell(f"{inside} touch /usr/x", status=1)
    machine.shell(f"{inside} ls /root", status=None)
    assert machine.shell(f"{inside} ls /root") == ""


def test_an_engine_is_ended_to_its_last_process(machine: Machine) -> None:
    """Each engine is in a cgroup of its own; what it started in another session dies with it; the group is removed."""
    straying = machine.path("/opt/straying")
    straying.write_text(
        '#!/bin/sh\nsetsid sleep 4711 & exec /usr/local/bin/python3.13 -S /opt/fakes/fake_vllm.py "$@"\n'
    )
    straying.chmod(0o755)
    configure(machine, ENGINES + CHAT + 'command = ["/opt/straying", "serve"]\n' + EMBED)
    before = serve(machine)
    groups = {
        Path(machine.path(f"/proc/{pid}/cgroup").read_text().split("0::")[1].strip()).name for pid in before.values()
    }
    assert {re.sub(r"\.[0-9a-f]{8}$", "", name) for name in groups} == {"chat%2F0", "embed%2F0"}
    stray = machine.run("pgrep", "-x", "sleep").stdout.strip()
    machine.run("vllm-proxy", "stop", "chat")
    assert not machine.path(f"/proc/{stray}").exists()
    left = [entry.name for entry in machine.path(GROUP).iterdir() if entry.is_dir()]
    assert [name.partition(".")[0] for name in left] == ["embed%2F0"]
    assert ready(machine, 1)["embed"] == before["embed"]


def test_engines_outlive_the_daemon_where_they_are_kept(machine: Machine) -> None:
    """With keep-models.conf a restart and a SIGKILL leave the engines; the next daemon adopts them and they serve."""
    machine.shell(
        "install -D -m 644 -t /etc/systemd/system/vllm-proxy.service.d /src/packaging/systemd/keep-models.conf"
    )
    machine.run("systemctl", "daemon-reload")
    before = serve(machine)
    machine.run("systemctl", "restart", "vllm-proxy")
    assert ready(machine) == before
    ask(machine)
    machine.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", "vllm-proxy")
    machine.until("vllm-proxy", NRestarts="1", ActiveState="active")
    assert ready(machine) == before
    ask(machine)
    machine.run("systemctl", "stop", "vllm-proxy")
    assert all(machine.path(f"/proc/{pid}").exists() for pid in before.values())
    machine.run("vllm-proxy", "stop", "--all", "--state-dir", "/var/lib/vllm-proxy")
    assert not any(machine.path(f"/proc/{pid}").exists() for pid in before.values())


def test_the_journal_finds_entries_by_their_model(machine: Machine) -> None:
    """By fields of ours, with priorities, under the unit's name; an engine's errors are errors there too."""
    dying = 'restart = { max_failures = 1 }\nargs = { fake_exit_at = "weights", fake_exit_text = "BadLuck: no" }\n'
    configure(machine, ENGINES + CHAT + EMBED + dying)
    machine.run("systemctl", "start", "vllm-proxy")
    machine.eventually("/models/embed", "status.state", "error", control=True)
    machine.eventually("/models/chat", "status.state", "ready", control=True)
    ask(machine)
    (request,) = machine.entries("MODEL=chat", "INSTANCE=chat/0", "PRIORITY=6", having="REQUEST_ID")
    serious = machine.entries("MODEL=embed", "-p", "err")
    assert {entry["SYSLOG_IDENTIFIER"] for entry in serious} == {"vllm-proxy"}
    assert {entry["MODEL"] for entry in serious} == {"embed"}
    assert any(entry.get("CODE_FILE", "").endswith(".py") for entry in serious)
    by_model = machine.entries("MODEL=chat")
    assert request in by_model
    assert all(entry["PRIORITY"] > "3" for entry in by_model)
    assert machine.entries(f"REQUEST_ID={request['REQUEST_ID']}") == [request]
