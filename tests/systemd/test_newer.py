"""What systemd 253 and 254 add: `Type=notify-reload`, and a subgroup for the daemon."""

import re

import pytest

from tests.systemd.conftest import CHAT, EMBED, ENGINES, configure, drop_in, ready, serve
from tests.systemd.machine import Machine

pytestmark = pytest.mark.systemd


def group_of(machine: Machine, pid: str | int) -> str:
    """The cgroup of a process, below the unit's."""
    text = machine.run("cat", f"/proc/{pid}/cgroup").stdout
    return text.split("0::/system.slice/vllm-proxy.service")[1].strip()


def test_the_installer_adds_what_this_systemd_knows(newer: Machine) -> None:
    """Both drop-ins are there, `verify` prints nothing, and the daemon has a group of its own beside its engines'."""
    verified = newer.run("systemd-analyze", "verify", "--man=no", "vllm-proxy.service", "vllm-proxy.socket")
    assert verified.stdout + verified.stderr == ""
    engines = serve(newer)
    shown = newer.show("vllm-proxy", "Type", "DelegateSubgroup", "MainPID")
    assert (shown["Type"], shown["DelegateSubgroup"]) == ("notify-reload", "daemon")
    assert group_of(newer, shown["MainPID"]) == "/daemon"
    assert re.fullmatch(r"/chat%2F0\.[0-9a-f]{8}", group_of(newer, engines["chat"]))


def test_a_reload_waits_for_the_verdict(newer: Machine) -> None:
    """Accepted: the new file is what runs when `systemctl reload` returns. Refused: it fails, and nothing changes."""
    before = serve(newer)
    configure(newer, ENGINES + CHAT + "max_model_len = 512\n" + EMBED)
    newer.run("systemctl", "reload", "vllm-proxy")
    assert newer.get("/models/chat")["spec"]["max_model_len"] == 512
    newer.eventually("/models/chat", "status.state", "ready")
    after = ready(newer)
    assert after["embed"] == before["embed"]
    configure(newer, "[rubbish")
    newer.run("systemctl", "reload", "vllm-proxy", status=1)
    newer.until("vllm-proxy", ActiveState="active", SubState="running")
    assert ready(newer) == after


def test_kept_engines_do_not_hinder_the_next_daemon(newer: Machine) -> None:
    """They stay in groups below the unit's, where controllers may be enabled; restarts and reloads work as ever."""
    drop_in(newer, newer.path("/src/packaging/systemd/keep-models.conf").read_text(encoding="utf-8"), "keep-models")
    before = serve(newer)
    newer.run("systemctl", "restart", "vllm-proxy")
    assert ready(newer) == before
    newer.run("systemctl", "reload", "vllm-proxy")
    newer.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "vllm-proxy")
    newer.until("vllm-proxy", NRestarts="1", ActiveState="active")
    assert ready(newer) == before
