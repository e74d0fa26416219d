"""Machines with vllm-proxy installed as docs/install.md says."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.machine import WAIT_SECONDS, Machine, booted

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENGINES = """
[engine]
command = ["/usr/local/bin/python3.13", "-S", "/opt/fakes/fake_vllm.py", "serve"]
"""
CHAT = '\n[models.chat]\nmodel = "org/chat"\n'
EMBED = '\n[models.embed]\nmodel = "org/embed"\n'
# What an installation makes, as seen from the root.
_INSTALLED = """
opt/vllm-proxy usr/local/bin/vllm-proxy usr/local/lib/systemd etc/vllm-proxy etc/systemd/system
etc/passwd etc/group etc/shadow etc/gshadow
""".split()


def blocks() -> list[str]:
    """The blocks of shell in docs/install.md, in order."""
    text = (ROOT / "vllm_proxy/docs/install.md").read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root there are no machines: that is a loud skip, and in CI a failure."""
    if os.geteuid() != 0 and not os.environ.get("CI"):
        skip = pytest.mark.skip(reason="NEEDS ROOT: boots machines with systemd in namespaces; CI runs it")
        for item in items:
            if item.get_closest_marker("systemd"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to lie over a machine's root, with what is in a checkout at /src, and the fake engine in /opt/fakes."""
    folder = tmp_path_factory.mktemp("checkout")
    folder.chmod(0o755)
    files = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(files, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "src" / name)
    shutil.copytree(ROOT / "tests/fakes", folder / "opt/fakes", ignore=shutil.ignore_patterns("__pycache__"))
    sudo = folder / "usr/local/bin/sudo"  # everything is root's there
    sudo.parent.mkdir(parents=True)
    sudo.write_text('#!/bin/sh\nexec "$@"\n', encoding="utf-8")
    sudo.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first block of docs/install.md makes, as a folder to lie over a machine's root."""
    folder = tmp_path_factory.mktemp("installed")
    folder.chmod(0o755)
    with booted(checkout) as machine:
        machine.shell(f"cd /src; {blocks()[0]}", online=True)
        machine.run("tar", "-C", "/", "-cf", "/tmp/installed.tar", *_INSTALLED)
        tar = machine.path("/tmp/installed.tar")
        subprocess.run(["tar", "-C", str(folder), "--same-owner", "-xf", tar], check=True)
    return folder


@pytest.fixture
def machine(checkout: Path, installed: Path) -> Iterator[Machine]:
    """An installed machine with two fake models in its configuration; the daemon does not run yet."""
    with booted(checkout, installed) as found:
        configure(found, ENGINES + CHAT + EMBED)
        yield found


@pytest.fixture(scope="session")
def newer_systemd(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What brings systemd 254 to a machine; nothing where this one has it."""
    version = subprocess.run(["systemctl", "--version"], check=True, capture_output=True, text=True).stdout
    if int(version.split()[1]) >= 254:
        return []
    folder = tmp_path_factory.mktemp("backports")
    done = subprocess.run(["sh", str(HERE / "backports.sh"), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"cannot fetch a newer systemd from bookworm-backports: {done.stderr}"
    return [folder / "root"]


@pytest.fixture
def newer(checkout: Path, installed: Path, newer_systemd: list[Path]) -> Iterator[Machine]:
    """As `machine`, with systemd 254 or later, and installed with that."""
    with booted(checkout, installed, *newer_systemd) as found:
        found.shell(f"cd /src; {blocks()[0]}", online=True)
        configure(found, ENGINES + CHAT + EMBED)
        yield found


def configure(machine: Machine, text: str) -> None:
    """Save the machine's configuration."""
    machine.path("/etc/vllm-proxy/models.toml").write_text(text, encoding="utf-8")


def drop_in(machine: Machine, text: str, name: str = "test") -> None:
    """Change the service as `systemctl edit` does; `text`: what goes below [Service]."""
    folder = machine.path("/etc/systemd/system/vllm-proxy.service.d")
    folder.mkdir(exist_ok=True)
    head = "" if "[Service]" in text else "[Service]\n"
    (folder / f"{name}.conf").write_text(f"{head}{text}\n", encoding="utf-8")
    machine.run("systemctl", "daemon-reload")


def serve(machine: Machine) -> dict[str, int]:
    """Start the service and wait until all models are ready; the process id of each one's engine."""
    machine.run("systemctl", "start", "vllm-proxy")
    return ready(machine)


def ready(machine: Machine, count: int = 2, seconds: float = WAIT_SECONDS) -> dict[str, int]:
    """Wait until so many models are ready; the process id of each one's engine."""
    machine.eventually("/health", "models.ready", count, seconds)
    models = machine.get("/models", control=True)["models"]
    return {model["id"]: model["status"]["instances"][0]["pid"] for model in models}
