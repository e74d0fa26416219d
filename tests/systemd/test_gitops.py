"""examples/gitops, its README word for word, with a repository on the machine itself."""

import re

import pytest

from tests.systemd.conftest import CHAT, EMBED, ENGINES, ROOT, ready
from tests.systemd.machine import Machine

pytestmark = pytest.mark.systemd

README = (ROOT / "examples/gitops/README.md").read_text(encoding="utf-8")
GOOD = ENGINES + CHAT + EMBED
AUTHOR = "-c user.name=Ada -c user.email=ada@example.org"
PULL = "vllm-proxy-pull.service"


def commit(machine: Machine, text: str, *, force: bool = False) -> None:
    """Somebody pushes another models.toml; `force`: in the place of the last commit."""
    machine.path("/tmp/work/models.toml").write_text(text, encoding="utf-8")
    amend, plus = ("--amend", "+") if force else ("", "")
    machine.shell(
        f"cd /tmp/work; git add models.toml; git {AUTHOR} commit -qm change {amend};"
        f"git push -q origin {plus}HEAD:main; chown -R vllm-proxy: /srv/models.git"
    )


@pytest.fixture
def following(machine: Machine) -> Machine:
    """A machine that follows a repository, as the README says; the timer is stopped, so that each test pulls itself."""
    machine.shell(
        "git init -q --bare -b main /srv/models.git; git init -q -b main /tmp/work;"
        "cd /tmp/work; git remote add origin /srv/models.git; git config --global safe.directory '*'"
    )
    sudo = '#!/bin/sh\n[ "$1" != -u ] || { user=$2; shift 2; exec runuser -u "$user" -- "$@"; }\nexec "$@"\n'
    machine.path("/usr/local/bin/sudo").write_text(sudo, encoding="utf-8")
    commit(machine, GOOD)
    (words,) = re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    machine.shell(f"export REPOSITORY=/srv/models.git; cd /src\n{words}")
    verified = machine.run("systemd-analyze", "verify", "--man=no", PULL, "vllm-proxy-pull.timer")
    assert verified.stdout + verified.stderr == ""
    assert machine.show("vllm-proxy-pull.timer", "ActiveState")["ActiveState"] == "active"
    machine.run("systemctl", "stop", "vllm-proxy-pull.timer")
    return machine


def test_a_commit_moves_only_the_model_that_it_changes(following: Machine) -> None:
    """Pulled, seen and done, with no call to the daemon; the other model keeps its process."""
    before = ready(following)
    commit(following, GOOD.replace('"org/chat"', '"org/chat"\nmax_model_len = 512'))
    following.run("systemctl", "start", PULL)
    following.eventually("/models/chat", "effective.max_model_len", 512)
    following.eventually("/models/chat", "status.state", "ready")
    after = ready(following)
    assert after["embed"] == before["embed"]
    assert after["chat"] != before["chat"]


def test_a_broken_commit_is_reported_and_the_next_good_one_heals(following: Machine) -> None:
    """What runs goes on; health and status name the problem until it is gone."""
    before = ready(following)
    commit(following, GOOD + "replicas = -1\n")
    following.run("systemctl", "start", PULL)
    following.until_status("configuration rejected: /etc/vllm-proxy/models.toml:")
    assert "models.embed.replicas" in str(following.get("/health")["config"]["error"])
    assert ready(following) == before
    commit(following, GOOD)
    following.run("systemctl", "start", PULL)
    following.eventually("/health", "config.error", None)
    assert ready(following) == before


def test_a_forced_push_is_not_followed(following: Machine) -> None:
    """The pull fails and says why; the file stays, until somebody takes the new history over as the README says."""
    before = ready(following)
    commit(following, GOOD.replace("org/chat", "org/other"), force=True)
    following.run("systemctl", "start", PULL, status=1)
    assert "Not possible to fast-forward" in following.journal(PULL)
    assert ready(following) == before
    (words,) = re.findall(r"`(sudo .*reset --hard .*?)`", README)
    following.shell(words)
    following.eventually("/models/chat", "effective.model", "org/other")


def test_a_change_over_rest_is_not_lost(following: Machine) -> None:
    """A pull that would overwrite it fails; with the folder read-only, the API refuses in the first place."""
    patch = (
        "curl -sS --fail-with-body -X PATCH -H 'Content-Type: application/json' -d '{\"max_model_len\": 256}' "
        "localhost:8000/models/chat"
    )
    ready(following)
    following.shell(patch)
    commit(following, GOOD.replace("org/embed", "org/other"))
    following.run("systemctl", "start", PULL, status=1)
    assert "would be overwritten by merge" in following.journal(PULL)
    assert following.get("/models/chat")["effective"]["max_model_len"] == 256
    following.shell("runuser -u vllm-proxy -- git -C /etc/vllm-proxy checkout -q models.toml")
    following.run("systemctl", "start", PULL)
    following.eventually("/models/embed", "effective.model", "org/other")
    folder = following.path("/etc/systemd/system/vllm-proxy.service.d")
    folder.mkdir()
    (folder / "read-only.conf").write_text("[Service]\nReadOnlyPaths=/etc/vllm-proxy\n", encoding="utf-8")
    following.run("systemctl", "daemon-reload")
    following.run("systemctl", "restart", "vllm-proxy")
    assert "config_read_only" in following.shell(patch, status=22)
