"""Secrets that root alone may read, as systemd hands them to the hardened unit: `LoadCredential=`."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.systemd.conftest import CHAT, EMBED, ENGINES, configure, drop_in, ready, serve
from tests.systemd.machine import CONTROL, Machine
from vllm_proxy.domain.keys import hash_of, new_key

pytestmark = pytest.mark.systemd

UNIT = Path(__file__).parents[2] / "packaging/systemd/vllm-proxy.service"
KEY, OWN_KEY = new_key(os.urandom(32)), "this-is-the-key-of-somebody-else-0123456789"
TOKEN = "hf_planted-token-of-the-hub"
ASK = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]})


def documented() -> dict[str, str]:
    """The credentials that the unit shows in comments: where each name's file is."""
    found = re.findall(r"^#LoadCredential=(\S+?):(\S+)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return dict(found)


def load(machine: Machine, **content: str) -> None:
    """Make files for root alone, and have the service load each by its name; `_` stands for a dot."""
    lines = []
    for spelled, text in content.items():
        name = spelled.replace("_", ".")
        place = documented().get(name, f"/etc/credstore/{name}")
        save(machine, place, text)
        lines.append(f"LoadCredential={name}:{place}")
    drop_in(machine, "\n".join(lines))


def save(machine: Machine, place: str, text: str) -> None:
    """Make a file that root alone may read."""
    machine.shell(f"install -D -m 600 /dev/null {place}; chmod 700 /etc/credstore")
    machine.path(place).write_text(text, encoding="utf-8")


def environ(machine: Machine, pid: int) -> list[str]:
    """The environment of a process, as it was started with."""
    return machine.path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")


def keys_toml(*, enabled: bool = True) -> str:
    """A key's table."""
    return f'[keys.ci]\nhash = "{hash_of(KEY)}"\nenabled = {str(enabled).lower()}\n'


def status(machine: Machine, key: str = "", url: str = "http://localhost:8000", options: str = "") -> str:
    """The HTTP status of a chat completion with a key."""
    header = f"-H 'Authorization: Bearer {key}'" if key else ""
    return machine.shell(
        f"curl -sS -o /dev/null -w '%{{http_code}}' {options} {header} -H 'Content-Type: application/json' -d '{ASK}' "
        f"{url}/v1/chat/completions"
    )


def until_status(machine: Machine, wanted: str, key: str) -> None:
    """Have the daemon read its file, and see what a key is worth then."""
    machine.run("vllm-proxy", "reload")
    assert status(machine, key) == wanted


def test_keys_come_from_files_that_root_alone_may_read(machine: Machine) -> None:
    """A `keys_file` and a key's `file`: who has a key is let in, nobody else; other users cannot read either file."""
    load(machine, keys_toml=keys_toml(), own=f"{OWN_KEY}\n")
    server = '[server]\nkeys_file = "credential:keys.toml"\n[keys.own]\nfile = "credential:own"\nscopes = ["read"]\n'
    configure(machine, server + ENGINES + CHAT + EMBED)
    engines = serve(machine)
    assert [status(machine, key) for key in (KEY, "", new_key(os.urandom(32)), OWN_KEY)] == ["200", "401", "401", "403"]
    read = machine.shell(f"curl -sS --fail-with-body -H 'x-api-key: {OWN_KEY}' localhost:8000/models")
    assert [model["id"] for model in json.loads(read)["models"]] == ["chat", "embed"]
    other = machine.run("runuser", "-u", "nobody", "--", "ls", "/run/credentials/vllm-proxy.service", status=2)
    assert "Permission denied" in other.stderr
    assert not any(
        name.startswith("CREDENTIALS_DIRECTORY=") for pid in engines.values() for name in environ(machine, pid)
    )
    journal = machine.journal()
    for secret in (KEY, OWN_KEY, hash_of(KEY)):
        assert secret not in journal


def test_a_credential_stays_what_it_was_until_a_restart_and_a_plain_file_does_not(machine: Machine) -> None:
    """So a key that is revoked in its source goes on; in a plain file the same edit is in force with the reload."""
    load(machine, keys_toml=keys_toml())
    configure(machine, '[server]\nkeys_file = "credential:keys.toml"\n' + ENGINES + CHAT + EMBED)
    serve(machine)
    machine.path(documented()["keys.toml"]).write_text(keys_toml(enabled=False), encoding="utf-8")
    until_status(machine, "200", KEY)
    machine.run("systemctl", "restart", "vllm-proxy")
    ready(machine)
    assert status(machine, KEY) == "401"
    plain = machine.path("/etc/vllm-proxy/keys.toml")
    plain.write_text(keys_toml(), encoding="utf-8")
    machine.shell("chown root:vllm-proxy /etc/vllm-proxy/keys.toml; chmod 640 /etc/vllm-proxy/keys.toml")
    configure(machine, '[server]\nkeys_file = "keys.toml"\n' + ENGINES + CHAT + EMBED)
    until_status(machine, "200", KEY)
    plain.write_text(keys_toml(enabled=False), encoding="utf-8")
    until_status(machine, "401", KEY)


def test_a_credential_that_is_missing_is_named(machine: Machine) -> None:
    """Without `LoadCredential=` the service does not start with nobody to refuse: exit status 78, and what to do."""
    configure(machine, '[server]\nkeys_file = "credential:keys.toml"\n' + ENGINES + CHAT)
    machine.run("systemctl", "start", "vllm-proxy", status=1)
    assert machine.show("vllm-proxy", "ExecMainStatus")["ExecMainStatus"] == "78"
    assert re.search(r"server\.keys_file: cannot read .*LoadCredential=", machine.journal())


def test_a_model_gets_its_secret_and_nobody_sees_it(machine: Machine) -> None:
    """Its engine has the value in its environment, another model's has not; answers and logs have neither."""
    load(machine, token=f"{TOKEN}\n")
    secret = '[models.chat.env]\nHF_TOKEN = { credential = "token" }\n'
    configure(machine, ENGINES + CHAT + secret + EMBED)
    engines = serve(machine)
    assert f"HF_TOKEN={TOKEN}" in environ(machine, engines["chat"])
    assert not any(entry.startswith("HF_TOKEN=") for entry in environ(machine, engines["embed"]))
    for path in ("/models", "/models/chat", "/health", "/metrics", "/config", "/models/chat/logs"):
        answer = machine.shell(f"curl -sS --fail-with-body --unix-socket {CONTROL} http://localhost{path}")
        assert TOKEN not in answer
    assert TOKEN not in machine.journal()
    assert TOKEN not in machine.run("ps", "-eo", "args").stdout


def test_the_page_about_secrets_is_a_service(machine: Machine) -> None:
    """docs/install.md, word for word: its drop-in and its file give HTTPS, keys and a token, all from root's files."""
    text = (UNIT.parents[2] / "vllm_proxy/docs/install.md").read_text(encoding="utf-8")
    (drop_ins,) = re.findall(r"^```ini\n(\[Service\].*?)^```$", text, re.DOTALL | re.MULTILINE)
    (configuration,) = re.findall(r"^```toml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    machine.shell(
        "cd /tmp; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout tls.key -out tls.crt 2>/dev/null"
    )
    certificate, private = (machine.path(f"/tmp/tls.{kind}").read_text(encoding="utf-8") for kind in ("crt", "key"))
    content = {"hf-token": TOKEN, "keys.toml": keys_toml(), "tls.crt": certificate, "tls.key": private}
    places = re.findall(r"^LoadCredential=(\S+?):(\S+)$", drop_ins, re.MULTILINE)
    assert {name: place for name, place in places if name != "hf-token"} == documented()
    for name, place in places:
        save(machine, place, content[name])
    drop_in(machine, drop_ins)
    configure(machine, configuration + ENGINES + CHAT)
    machine.run("systemctl", "start", "vllm-proxy")
    answer = machine.eventually("/models/chat", "status.state", "ready", control=True)
    assert f"HF_TOKEN={TOKEN}" in environ(machine, answer["status"]["instances"][0]["pid"])
    https = {"url": "https://localhost:8000", "options": "--cacert /tmp/tls.crt --tlsv1.2"}
    assert [status(machine, key, **https) for key in (KEY, "")] == ["200", "401"]
    assert not {secret for secret in ("PRIVATE KEY", TOKEN, KEY) if secret in machine.journal()}


def test_a_unix_socket_of_systemd_is_for_who_has_a_key(machine: Machine) -> None:
    """As the NixOS module makes it from `server.listen`: a restart of the service leaves it where it is."""
    folder = machine.path("/etc/systemd/system/vllm-proxy.socket.d")
    folder.mkdir()
    lines = "ListenStream=/run/vllm-proxy/http.sock\nSocketUser=vllm-proxy\nSocketGroup=vllm-proxy\nSocketMode=0660\n"
    (folder / "unix.conf").write_text(f"[Socket]\n{lines}", encoding="utf-8")
    drop_in(machine, "RuntimeDirectoryPreserve=yes")
    machine.path("/etc/vllm-proxy/keys.toml").write_text(keys_toml(), encoding="utf-8")
    machine.shell("chown vllm-proxy: /etc/vllm-proxy/keys.toml")
    configure(machine, '[server]\nkeys_file = "keys.toml"\n' + ENGINES + CHAT + EMBED)
    machine.run("systemctl", "start", "vllm-proxy.socket", "vllm-proxy.service")
    for restart in (False, True):
        if restart:
            machine.run("systemctl", "restart", "vllm-proxy.service")
        ready(machine)
        unix = "--unix-socket /run/vllm-proxy/http.sock"
        assert [status(machine, key, "http://localhost", unix) for key in (KEY, "")] == ["200", "401"]
    assert machine.shell("stat -c '%U %G %a' /run/vllm-proxy/http.sock") == "vllm-proxy vllm-proxy 660\n"
