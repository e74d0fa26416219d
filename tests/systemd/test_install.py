"""docs/install.md, word for word."""

import json

import pytest

from tests.systemd.conftest import CHAT, EMBED, ENGINES, blocks, configure, ready
from tests.systemd.machine import Machine

pytestmark = pytest.mark.systemd

INSTALL, START, RELOAD, UPGRADE, KEEP, END, UNINSTALL = range(7)


def test_every_block_does_what_the_text_says(machine: Machine) -> None:
    """From the first file to the uninstalled service; the installer has run already, once."""
    lines = [f"cd /src\n{block}" for block in blocks()]
    assert len(lines) == 7
    configure(machine, ENGINES + CHAT + EMBED)
    health = json.loads(machine.shell(lines[START]).splitlines()[-1])
    assert health["status"] == "ok"
    assert machine.run("systemctl", "is-enabled", "vllm-proxy.service", "vllm-proxy.socket").stdout == "enabled\n" * 2
    first = ready(machine)

    machine.shell(lines[RELOAD])
    configure(machine, "[rubbish")
    machine.shell(lines[RELOAD], status=1)
    assert ready(machine) == first
    configure(machine, ENGINES + CHAT + EMBED)

    machine.shell(lines[UPGRADE], online=True)
    second = ready(machine)
    assert not set(second.values()) & set(first.values())

    machine.shell(lines[KEEP])
    third = ready(machine)
    machine.run("systemctl", "restart", "vllm-proxy")
    assert ready(machine) == third
    machine.run("systemctl", "stop", "vllm-proxy.socket", "vllm-proxy.service")
    machine.shell(lines[END])
    assert not any(machine.path(f"/proc/{pid}").exists() for pid in third.values())


def test_what_is_installed_can_be_taken_away_and_comes_back(machine: Machine) -> None:
    """Also while it runs; configuration and state stay, and a later installation finds them."""
    machine.run("systemctl", "start", "vllm-proxy.socket", "vllm-proxy.service")
    before = ready(machine)
    text = machine.path("/etc/vllm-proxy/models.toml").read_text()
    machine.shell(f"cd /src\n{blocks()[UNINSTALL]}")
    assert not any(machine.path(f"/proc/{pid}").exists() for pid in before.values())
    for name in ("/opt/vllm-proxy", "/usr/local/bin/vllm-proxy", "/usr/local/lib/systemd/system/vllm-proxy.service"):
        assert not machine.path(name).exists()
    assert machine.path("/var/lib/vllm-proxy/logs").is_dir()
    machine.shell(f"cd /src\n{blocks()[INSTALL]}", online=True)
    assert machine.path("/etc/vllm-proxy/models.toml").read_text() == text
    machine.run("systemctl", "start", "vllm-proxy")
    ready(machine)
    machine.shell(f"cd /src\n{blocks()[UNINSTALL]}")


def test_the_installer_says_what_it_lacks(machine: Machine) -> None:
    """Not root, a Python that the service could not see, a word that it does not know: one sentence, nothing done."""
    said = machine.run("runuser", "-u", "vllm-proxy", "--", "sh", "/src/packaging/install.sh", status=1).stderr
    assert said == "packaging/install.sh: needs root: sudo sh packaging/install.sh\n"
    machine.shell("mkdir -p /root/py/bin; cp /usr/local/bin/python3.13 /root/py/bin; ln -s /usr/local/lib /root/py/lib")
    python = "/root/py/bin/python3.13"
    said = machine.run("env", f"UV_PYTHON={python}", "sh", "/src/packaging/install.sh", status=1).stderr
    assert said == f"packaging/install.sh: UV_PYTHON is where the service cannot see it: {python}\n"
    said = machine.run("sh", "/src/packaging/install.sh", "--help", status=2).stderr
    assert [line.split()[:2] for line in said.splitlines()[1:]] == [["sh", "packaging/install.sh"]] * 3
