"""examples/gitops, its README word for word, with a repository on the machine itself."""

import re

import pytest

from tests.systemd.conftest import CHAT, EMBED, ENGINES, ROOT, ready
from tests.systemd.machine import CONTROL, Machine

pytestmark = pytest.mark.systemd

README = (ROOT / "examples/gitops/README.md").read_text(encoding="utf-8")
FOLLOW, KEYS_OUTSIDE, KEYS_INSIDE = re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
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


def pull(machine: Machine, text: str) -> None:
    """A commit that arrives."""
    commit(machine, text)
    machine.run("systemctl", "start", PULL)


def scopes_of(machine: Machine, key: str) -> list[str]:
    """What a key may do, by what it is answered: infer, read, administer."""
    routes = {"inference": "/v1/models", "read": "/models", "admin": "/config"}
    ask = "curl -sS -o /dev/null -w '%{http_code}' -H"
    answered = {
        scope: machine.shell(f"{ask} 'Authorization: Bearer {key}' localhost:8000{path}")
        for scope, path in routes.items()
    }
    assert set(answered.values()) <= {"200", "401", "403"}
    return [scope for scope, status in answered.items() if status == "200"]


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
    machine.shell(f"export REPOSITORY=/srv/models.git; cd /src\n{FOLLOW}")
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
    """A pull that would overwrite it fails; with the folder read-only, the API refuses, and keys may lie elsewhere."""
    patch = (
        "curl -sS --fail-with-body -X PATCH -H 'Content-Type: application/json' -d '{\"max_model_len\": 256}' "
        f"--unix-socket {CONTROL} http://localhost/models/chat"
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
    (elsewhere,) = re.findall(r"`(keys_file = \"(/.*?)\")`", README)
    following.shell(f"install -o vllm-proxy -g vllm-proxy -m 640 /dev/null {elsewhere[1]}")
    pull(following, f"{GOOD}[server]\n{elsewhere[0]}\n")
    folder = following.path("/etc/systemd/system/vllm-proxy.service.d")
    folder.mkdir()
    (folder / "read-only.conf").write_text("[Service]\nReadOnlyPaths=/etc/vllm-proxy\n", encoding="utf-8")
    following.run("systemctl", "daemon-reload")
    following.run("systemctl", "restart", "vllm-proxy")
    assert "config_read_only" in following.shell(patch, status=22)
    key = following.run("vllm-proxy", "keys", "new", "ada").stdout.strip()
    assert (scopes_of(following, key), scopes_of(following, "")) == (["inference"], [])


def test_keys_outside_of_git_live_beside_a_public_configuration(following: Machine) -> None:
    """Made on the server, never seen by git, untouched by a pull; a revoked one is refused."""
    following.path("/tmp/work/.gitignore").write_text("keys.toml\n", encoding="utf-8")
    following.shell("cd /tmp/work; git add .gitignore")
    public = GOOD + '[server]\nkeys_file = "keys.toml"\n'
    pull(following, public)
    following.run("vllm-proxy", "reload")
    ada, website = following.shell(KEYS_OUTSIDE).split()
    expected = [["inference", "read", "admin"], ["inference"], []]
    assert [scopes_of(following, key) for key in (ada, website, "")] == expected
    pull(following, public.replace('"org/chat"', '"org/chat"\nmax_model_len = 512'))
    following.eventually("/models/chat", "effective.max_model_len", 512, control=True)
    assert [scopes_of(following, key) for key in (ada, website, "")] == expected
    assert following.shell("runuser -u vllm-proxy -- git -C /etc/vllm-proxy status --porcelain") == ""
    following.run("vllm-proxy", "keys", "revoke", "website")
    assert [scopes_of(following, key) for key in (ada, website)] == [expected[0], []]


def test_hashes_in_git_are_made_and_revoked_by_commits(following: Machine) -> None:
    """A key is made in somebody's clone, and its commit brings it to the server; so does the one that revokes it."""
    made = (
        "export VLLM_PROXY_STATE_DIR=/tmp/nothing GIT_AUTHOR_NAME=Ada GIT_AUTHOR_EMAIL=ada@example.org "
        "GIT_COMMITTER_NAME=Ada GIT_COMMITTER_EMAIL=ada@example.org; cd /tmp/work; "
        "git branch -q --set-upstream-to=origin/main"
    )
    key = following.shell(f"{made}\n{KEYS_INSIDE}chown -R vllm-proxy: /srv/models.git").strip()
    following.run("systemctl", "start", PULL)
    following.run("vllm-proxy", "reload")
    assert (scopes_of(following, key), scopes_of(following, "")) == (["inference"], [])
    (revoke,) = re.findall(r"`(vllm-proxy keys revoke .*?)`", README)
    following.shell(f"{made}; {revoke}")
    text = following.path("/tmp/work/models.toml").read_text(encoding="utf-8")
    assert "enabled = false" in text
    pull(following, text)
    following.run("vllm-proxy", "reload")
    assert (scopes_of(following, key), scopes_of(following, "")) == ([], [])
