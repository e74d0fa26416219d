"""The NixOS module and the flake, evaluated without nixpkgs; with NIXPKGS_LIB set, the module with the real lib too."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.harness import clean_environment

pytestmark = pytest.mark.nix

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NIX = ROOT / "packaging/nix"
SHIPPED = ROOT / "packaging/systemd"
MODELS = 'settings.models.chat.model = "org/chat";'

# Where the module's unit is meant to differ from the shipped one: what is left out of the comparison, and why.
DIFFERENT = {
    "ExecStart": (r"^/\S+/", "the program is in the store"),
    "ExecReload": (r"^/\S+/", "the program is in the store"),
    "EnvironmentFile": (r".+", "services.vllm-proxy.environmentFile, never a file that may or may not be there"),
}
KNOWN = set("description wants after wantedBy reloadTriggers environment serviceConfig".split())


@pytest.fixture(autouse=True)
def nix_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nix without its daemon, its users and its channels."""
    if shutil.which("nix-instantiate") is None:
        message = "NEEDS NIX: Debian's nix-bin is enough; `sh packaging/dev test` installs it"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = tmp_path / "nix"
    folder.mkdir()
    (folder / "nix.conf").write_text("build-users-group =\nexperimental-features = nix-command flakes\n")
    monkeypatch.setenv("NIX_CONF_DIR", str(folder))
    monkeypatch.delenv("NIX_PATH", raising=False)


def nix(*command: str, status: int | None = 0) -> str:
    """Run a command of Nix; its output, or what it complains about."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert status is None or done.returncode == status, done.stderr
    return done.stdout if done.returncode == 0 else done.stderr


def evaluate(folder: Path, text: str, *, status: int = 0) -> Any:  # noqa: ANN401 - JSON
    """What the module makes of `services.vllm-proxy` with these options, or its error; `text` may be a whole module."""
    file = folder / "configuration.nix"
    whole = text if text.lstrip().startswith("{") else f"{{ services.vllm-proxy = {{ enable = true; {text} }}; }}"
    file.write_text(whole, encoding="utf-8")
    command = [
        "nix-instantiate",
        "--eval",
        "--read-write-mode",
        "--strict",
        "--json",
        str(HERE / "eval.nix"),
        "--arg",
        "configuration",
        str(file),
    ]
    said = nix(*command, status=status)
    if status:
        return said
    found = json.loads(said)
    if real := os.environ.get("NIXPKGS_LIB"):
        assert json.loads(nix(*command, "--arg", "lib", f"import {real}/lib")) == found
    return found


def generated(found: dict[str, Any]) -> Any:  # noqa: ANN401 - TOML
    """What models.toml is made of."""
    (file,) = re.findall(r"check --config (\S+)$", found["etc"]["vllm-proxy/models.toml"]["text"], re.MULTILINE)
    return json.loads(Path(file).read_text(encoding="utf-8"))


def written(section: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, list[str]]:
    """Directives as the module gives them: each one's values, as systemd reads them."""
    found: dict[str, list[str]] = {}
    for key, value in section.items():
        values = value if isinstance(value, list) else [value]
        found[key] = [
            {True: "yes", False: "no"}.get(one, str(one)) if isinstance(one, bool) else str(one) for one in values
        ]
    if environment:
        found["Environment"] = [f"{key}={value}" for key, value in environment.items()]
    return plain(found)


def documented() -> dict[str, str]:
    """The credentials that the shipped unit shows in comments: where each name's file is."""
    text = (SHIPPED / "vllm-proxy.service").read_text(encoding="utf-8")
    return dict(line.split(":", 1) for line in re.findall(r"^#LoadCredential=(\S+)$", text, re.MULTILINE))


def shipped(*files: str) -> dict[str, dict[str, list[str]]]:
    """The directives of a unit and its drop-ins, by section."""
    sections: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        section = ""
        given: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for line in (SHIPPED / file).read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif line and not line.startswith("#"):
                key, _, value = line.partition("=")
                given[section][key].append(value)
        for name, directives in given.items():
            for key, values in directives.items():
                sections[name][key] = [*sections[name][key], *values] if key == "Environment" else values
    return {name: plain(directives) for name, directives in sections.items()}


def plain(directives: dict[str, list[str]]) -> dict[str, list[str]]:
    """Words in the place of lines where systemd takes either, in no order but where the first one decides."""
    split = {"Wants", "After", "Environment", "RestrictAddressFamilies"}
    found = {key: " ".join(values).split() if key in split else values for key, values in directives.items()}
    return {key: values if key == "SystemCallFilter" else sorted(values) for key, values in found.items() if values}


def differences(ours: dict[str, list[str]], theirs: dict[str, list[str]]) -> dict[str, tuple[object, object]]:
    """Where two sections differ, unless that is meant."""

    def compared(key: str, values: list[str] | None) -> list[str] | None:
        if key not in DIFFERENT:
            return values
        return [rest for value in values or [] if (rest := re.sub(DIFFERENT[key][0], "", value))]

    pairs = {key: (compared(key, ours.get(key)), compared(key, theirs.get(key))) for key in ours.keys() | theirs.keys()}
    return {key: (our, their) for key, (our, their) in pairs.items() if our != their}


@pytest.mark.parametrize("file", sorted([*NIX.rglob("*.nix"), *HERE.rglob("*.nix")]), ids=lambda file: file.name)
def test_every_file_is_nix(file: Path) -> None:
    """It parses, in the parts too that no evaluation reaches."""
    nix("nix-instantiate", "--parse", str(file))


@pytest.mark.parametrize("keeps_models", [False, True])
def test_the_units_do_not_drift_apart(tmp_path: Path, *, keeps_models: bool) -> None:
    """Each directive of the module is that of the shipped files, with the drop-ins for systemd 254."""
    drop_ins = ["notify-reload.conf", "delegate-subgroup.conf", *(["keep-models.conf"] if keeps_models else [])]
    theirs = shipped("vllm-proxy.service", *drop_ins)
    found = evaluate(tmp_path, MODELS + f"keepModels = {str(keeps_models).lower()};")
    service = found["service"]
    unit = {key: service[key.lower()] for key in ("Description", "Wants", "After")}
    assert set(service) <= KNOWN
    assert differences(written(unit), theirs["Unit"]) == {}
    assert differences(written(service["serviceConfig"], service["environment"]), theirs["Service"]) == {}
    assert written({"WantedBy": service["wantedBy"]}) == theirs["Install"]
    socket = found["socket"]
    theirs = shipped("vllm-proxy.socket")
    assert written({"Description": socket["description"]}) == theirs["Unit"]
    assert differences(written(socket["socketConfig"]), theirs["Socket"]) == {}
    assert written({"WantedBy": socket["wantedBy"]}) == theirs["Install"]


def test_the_credentials_are_those_that_the_shipped_unit_shows(tmp_path: Path) -> None:
    """Its lines are what the options give for its paths; nothing else of the unit differs, and the file names them."""
    shown = documented()
    options = {"keysFile": "keys.toml", "tlsCert": "tls.crt", "tlsKey": "tls.key"}
    assert sorted(shown) == sorted(options.values())
    given = "".join(f'{option} = "{shown[name]}";' for option, name in options.items())
    before, found = (evaluate(tmp_path, MODELS + more) for more in ("", given))
    theirs = [f"{name}:{file}" for name, file in shown.items()]
    ours = found["service"]["serviceConfig"]
    assert (before["service"]["serviceConfig"].pop("LoadCredential"), ours.pop("LoadCredential")) == ([], theirs)
    assert ours == before["service"]["serviceConfig"]
    names = {"keys_file": "keys.toml", "tls_cert": "tls.crt", "tls_key": "tls.key"}
    server = {key: f"credential:{name}" for key, name in names.items()}
    assert generated(found) == {"models": {"chat": {"model": "org/chat"}}, "server": server}
    text = (SHIPPED / "vllm-proxy.service").read_text(encoding="utf-8")
    for key, reference in server.items():
        assert f'{key} = "{reference}"' in text


def test_the_user_is_that_of_the_shipped_files(tmp_path: Path) -> None:
    """Home and groups as in sysusers.conf, where the user has the default name."""
    lines = [line.split() for line in (SHIPPED / "sysusers.conf").read_text(encoding="utf-8").splitlines()]
    (home,) = [line[-1] for line in lines if line[:2] == ["u", "vllm-proxy"]]
    groups = sorted(line[2] for line in lines if line[:2] == ["m", "vllm-proxy"])
    user = {"isSystemUser": True, "group": "vllm-proxy", "home": home, "extraGroups": groups}
    found = evaluate(tmp_path, MODELS)
    assert (found["users"], found["groups"]) == ({"vllm-proxy": user}, {"vllm-proxy": {}})
    found = evaluate(tmp_path, MODELS + 'group = "us";')
    assert (found["users"], found["groups"]) == ({"vllm-proxy": user | {"group": "us"}}, {})


def test_a_rebuild_reloads_and_never_restarts_for_the_configuration(tmp_path: Path) -> None:
    """The file is checked by the package itself, lies at a fixed path, and triggers a reload alone."""
    found, other = (evaluate(tmp_path, MODELS + more) for more in ("", 'settings.models.embed.model = "x";'))
    (file,) = found["service"]["reloadTriggers"]
    assert found["etc"]["vllm-proxy/models.toml"]["source"] == file
    assert re.search(
        r"^\S+/bin/vllm-proxy check --config (\S+)\ncp \1 \$out\n$",
        found["etc"]["vllm-proxy/models.toml"]["text"],
        re.MULTILINE,
    )
    changed = {key for key in found["service"] if found["service"][key] != other["service"][key]}
    assert changed == {"reloadTriggers"}
    assert "restartTriggers" not in found["service"]


def test_disabled_it_does_nothing(tmp_path: Path) -> None:
    """No unit, no user, no file."""
    found = evaluate(tmp_path, '{ services.vllm-proxy.settings.models.chat.model = "x"; }')
    assert (found["service"], found["socket"]) == (None, None)
    assert (found["users"], found["groups"], found["etc"], found["ports"]) == ({}, {}, {}, [])
    assert found["packages"] == []
    assert evaluate(tmp_path, MODELS)["packages"] == ["vllm-proxy"]


def test_each_option_does_what_it_says(tmp_path: Path) -> None:
    """And no more."""
    found = evaluate(
        tmp_path, 'configFile = "/srv/ai/models.toml"; environmentFile = "/run/secrets/hf"; user = "me"; group = "us";'
    )
    service = found["service"]["serviceConfig"]
    assert found["service"]["environment"]["VLLM_PROXY_CONFIG"] == "/srv/ai/models.toml"
    assert (service["ReadWritePaths"], service["EnvironmentFile"]) == ("/srv/ai", ["/run/secrets/hf"])
    assert (service["User"], service["Group"], found["users"], found["groups"]) == ("me", "us", {}, {})
    assert (found["etc"], found["service"]["reloadTriggers"]) == ({}, [])
    beside = 'configFile = "/x/models.toml"; settings.server.port = 80; socketActivation = false;'
    assert evaluate(tmp_path, beside)["service"]["environment"]["VLLM_PROXY_PORT"] == "80"
    assert evaluate(tmp_path, MODELS + "socketActivation = false;")["socket"] is None
    assert evaluate(tmp_path, MODELS)["ports"] == []
    assert evaluate(tmp_path, MODELS + "openFirewall = true;")["ports"] == [8000]
    opened = evaluate(tmp_path, MODELS + 'openFirewall = true; settings.server = { host = "::"; port = 80; };')
    assert (opened["ports"], opened["socket"]["socketConfig"]["ListenStream"]) == ([80], ["[::]:80"])
    assert opened["socket"]["socketConfig"].keys() == {"ListenStream", "Backlog", "NoDelay"}


def test_each_address_of_listen_is_one_of_the_socket(tmp_path: Path) -> None:
    """TCP ports, which the firewall opens, and Unix sockets for the group, in a folder that outlives the service."""
    listen = 'settings.server.listen = [ "127.0.0.1:8000" "[::]:8000" "ai.lan:80" "unix:/run/vllm-proxy/http.sock" ];'
    found = evaluate(tmp_path, MODELS + listen + "openFirewall = true;")
    assert "settings.server.host must be an address" in found["failed"][0]
    found = evaluate(tmp_path, MODELS + listen.replace("ai.lan", "10.0.0.1") + "openFirewall = true;")
    socket = found["socket"]["socketConfig"]
    assert found["ports"] == [8000, 80]
    assert socket["ListenStream"] == ["127.0.0.1:8000", "[::]:8000", "10.0.0.1:80", "/run/vllm-proxy/http.sock"]
    assert [socket[f"Socket{what}"] for what in ("User", "Group", "Mode")] == ["vllm-proxy", "vllm-proxy", "0660"]
    assert found["service"]["serviceConfig"]["RuntimeDirectoryPreserve"] is True
    (warning,) = found["warnings"]
    assert ": [::]:8000, 10.0.0.1:80, /run/vllm-proxy/http.sock is not loopback" in warning
    wrong = 'settings.server.listen = [ "8000" ];'
    assert "takes HOST:PORT, [HOST]:PORT and unix:PATH, not 8000" in evaluate(tmp_path, MODELS + wrong, status=1)


def test_secrets_are_named_in_the_file_and_loaded_by_systemd(tmp_path: Path) -> None:
    """A model's `env` and a key's `file` are tables and texts of `settings`; beside a file of one's own, variables."""
    found = evaluate(
        tmp_path,
        """
        credentials.hf-token = "/run/secrets/hf-token";
        settings.models.chat = { model = "org/chat"; env.HF_TOKEN.credential = "hf-token"; };
        settings.keys.ci = { file = "credential:ci-key"; scopes = [ "inference" ]; };
        """,
    )
    assert found["service"]["serviceConfig"]["LoadCredential"] == ["hf-token:/run/secrets/hf-token"]
    assert generated(found) == {
        "models": {"chat": {"model": "org/chat", "env": {"HF_TOKEN": {"credential": "hf-token"}}}},
        "keys": {"ci": {"file": "credential:ci-key", "scopes": ["inference"]}},
    }
    own = 'configFile = "/srv/models.toml"; keysFile = "/run/keys"; tlsCert = "/run/crt"; tlsKey = "/run/key";'
    service = evaluate(tmp_path, own)["service"]
    assert {name: value for name, value in service["environment"].items() if "credential:" in value} == {
        "VLLM_PROXY_KEYS_FILE": "credential:keys.toml",
        "VLLM_PROXY_TLS_CERT": "credential:tls.crt",
        "VLLM_PROXY_TLS_KEY": "credential:tls.key",
    }
    assert service["serviceConfig"]["LoadCredential"] == ["keys.toml:/run/keys", "tls.crt:/run/crt", "tls.key:/run/key"]


@pytest.mark.parametrize(
    ("options", "more", "status"),
    [
        ('keysFile = "/run/secrets/keys.toml";', "", 0),
        ('tlsCert = "/run/secrets/crt"; tlsKey = "/run/secrets/key";', "", 0),
        ('settings.server.keys_file = "/var/lib/vllm-proxy/keys.toml";', "", 0),  # it is not there in a build
        ('settings.server = { tls_cert = "/var/lib/acme/crt"; tls_key = "/var/lib/acme/key"; };', "", 0),
        ("", "settings.keys.anonymous.scopes = [ ];", 0),
        ("", 'settings.keys.ci.hash = "sha256:0";', 1),
    ],
)
def test_a_build_checks_the_file_without_any_secret(tmp_path: Path, options: str, more: str, status: int) -> None:
    """Our own `check` takes what the module generates where no credential is, and refuses what is wrong."""
    secrets = """
        credentials = { app-key = "/run/secrets/app"; hf-token = "/run/secrets/hf"; };
        settings.keys.app.file = "credential:app-key";
        settings.defaults.env.HF_TOKEN.credential = "hf-token";
    """
    found = evaluate(tmp_path, MODELS + secrets + options + more)
    (tmp_path / "generated.toml").write_text(tomli_w.dumps(generated(found)), encoding="utf-8")
    script = found["etc"]["vllm-proxy/models.toml"]["text"]
    script = re.sub(r"/nix/store/\S+/bin/vllm-proxy", f"{sys.executable} -m vllm_proxy", script)
    script = re.sub(r"/nix/store/\S+\.toml", str(tmp_path / "generated.toml"), script)
    env = {**clean_environment(), "out": str(tmp_path / "out"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert bool(done.returncode) == bool(status), done.stderr
    assert (tmp_path / "out").exists() != bool(status)
    assert not status or re.search(r"generated\.toml:\d+: keys\.ci\.hash", done.stdout)


NETWORK = 'settings.server.host = "0.0.0.0"; ' + MODELS


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (MODELS, None),
        (MODELS + 'settings.server.host = "::1";', None),
        (MODELS + 'settings.server.listen = [ "127.0.0.2:80" "localhost:80" ]; socketActivation = false;', None),
        (NETWORK, "0.0.0.0:8000 is not loopback"),
        (NETWORK + 'environmentFile = "/run/env";', "unless environmentFile has VLLM_PROXY_API_KEY"),
        (NETWORK + "settings.keys = { };", "0.0.0.0:8000"),
        (MODELS + 'settings.server.host = "::"; settings.server.port = 80;', "[::]:80"),
        (MODELS + 'settings.server.listen = [ "unix:/run/x.sock" ];', "/run/x.sock"),
        (NETWORK + 'settings.server.listen = [ "127.0.0.1:8000" ];', None),  # it wins over host and port
        (NETWORK + 'keysFile = "/run/keys";', None),
        (NETWORK + 'settings.server.keys_file = "/run/keys";', None),
        (NETWORK + 'settings.keys.ci.hash = "sha256:0";', None),
        (NETWORK + 'settings.keys.anonymous.scopes = [ "inference" ];', None),
        (NETWORK + "settings.server.allow_remote_admin = true;", None),
        ('configFile = "/srv/models.toml"; settings.server.host = "0.0.0.0";', None),  # its keys are not known here
    ],
)
def test_a_network_address_without_keys_is_warned_of(tmp_path: Path, options: str, warned: str | None) -> None:
    """Every request would be answered 401; the warning names both ways out. Assertions stay out of it."""
    found = evaluate(tmp_path, options)
    assert found["failed"] == []
    assert len(found["warnings"]) == (warned is not None)
    for text in found["warnings"]:
        assert warned
        assert warned in text
        for part in ("401", "settings.keys or keysFile", "settings.keys.anonymous.scopes"):
            assert part in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ('configFile = "/x/models.toml"; ' + MODELS, "with configFile all is in that file"),
        ('configFile = "/x/models.toml"; settings.server.on_exit = "keep";', "with configFile all is in that file"),
        ('configFile = "models.toml";', "configFile must be an absolute path outside of the store, not models.toml"),
        ('configFile = "/nix/store/x/models.toml";', "configFile must be an absolute path outside of the store"),
        (
            'settings.server.host = "ai.example.org"; ' + MODELS,
            "settings.server.host must be an address for socketActivation",
        ),
        (MODELS + 'tlsCert = "/run/crt";', "tlsCert and tlsKey go together"),
        (MODELS + 'tlsKey = "/run/key";', "tlsCert and tlsKey go together"),
        (MODELS + 'keysFile = "/run/keys"; settings.server.keys_file = "x";', "must not stand in settings.server too"),
        (MODELS + 'credentials."tls.key" = "/run/x";', "are those of keysFile, tlsCert and tlsKey"),
        (MODELS + 'keysFile = "/nix/store/x/keys.toml";', "must be outside of the store"),
        (MODELS + 'credentials.x = "/nix/store/x/token";', "must be outside of the store"),
    ],
)
def test_what_cannot_work_is_an_assertion(tmp_path: Path, options: str, sentence: str) -> None:
    """One sentence that names the option."""
    (message,) = evaluate(tmp_path, options)["failed"]
    assert sentence in message


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("keepModels = 1;", "services.vllm-proxy.keepModels"),
        ('keysFile = "keys.toml";', "services.vllm-proxy.keysFile"),
        ("keepModel = true;", "`services.vllm-proxy.keepModel' does not exist"),
    ],
)
def test_a_mistake_stops_the_evaluation(tmp_path: Path, options: str, sentence: str) -> None:
    """A wrong type and an unknown option are named."""
    assert sentence in evaluate(tmp_path, options + MODELS, status=1)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Flags that give a flake the repository and the stand-in for nixpkgs instead of what is on the network."""
    source, stub = tmp_path / "src", tmp_path / "stub"
    shutil.copytree(NIX, source / "packaging/nix")
    shutil.copytree(ROOT / "vllm_proxy", source / "vllm_proxy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for line in ("init -q", "add -A", "-c user.name=x -c user.email=x commit -qm x"):
        subprocess.run(["git", "-C", str(source), *line.split()], check=True)
    shutil.copytree(HERE / "stub", stub)
    for name in ("minilib.nix", "system.nix"):
        shutil.copy(HERE / name, stub)
    return ["--offline", "--no-write-lock-file", "--override-input", "nixpkgs", f"path:{stub}"]


def test_the_flake_offers_what_others_take(tmp_path: Path, inputs: list[str]) -> None:
    """Package, overlay, module, shell, check and formatter, as `nix flake show` lists them."""
    here = f"git+file://{tmp_path}/src?dir=packaging/nix"
    shown = json.loads(nix("nix", "flake", "show", "--json", *inputs, here))
    nix("nix", "flake", "check", "--no-build", *inputs, here)
    for system in ("x86_64-linux", "aarch64-linux"):
        assert shown["packages"][system]["default"]["name"] == "vllm-proxy"
    assert set(shown) == {"checks", "devShells", "formatter", "nixosModules", "overlays", "packages"}


def test_the_package_takes_what_the_project_asks_for(tmp_path: Path, inputs: list[str]) -> None:
    """Its dependencies and its extras are those of pyproject.toml, by name; the extra `docs` is always there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = f"git+file://{tmp_path}/src?dir=packaging/nix#packages.x86_64-linux.default"
    names = "package: with package; map (map (p: p.name)) [ dependencies optional-dependencies.vllm ]"
    found = json.loads(nix("nix", "eval", "--json", *inputs, package, "--apply", names))
    extras = project["optional-dependencies"]
    wanted = (project["dependencies"] + extras["docs"], extras["vllm"])
    assert found == [[re.split("[<>=]", requirement)[0] for requirement in kind] for kind in wanted]


def test_the_page_is_a_machine(tmp_path: Path, inputs: list[str]) -> None:
    """The flake and the configurations in docs/nixos.md, word for word."""
    page = (ROOT / "vllm_proxy/docs/nixos.md").read_text(encoding="utf-8")
    flake, configuration, secrets = re.findall(r"^```nix\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    machine = tmp_path / "machine"
    machine.mkdir()
    (machine / "flake.nix").write_text(flake.replace("./configuration.nix", "./configuration.nix ./secrets.nix"))
    (machine / "configuration.nix").write_text(configuration, encoding="utf-8")
    (machine / "secrets.nix").write_text(secrets, encoding="utf-8")
    ours = ["--override-input", "vllm-proxy", f"git+file://{tmp_path}/src?dir=packaging/nix"]
    where = f"path:{machine}#nixosConfigurations.server.config"
    service = json.loads(nix("nix", "eval", "--json", *inputs, *ours, f"{where}.systemd.services.vllm-proxy"))
    assert service["serviceConfig"]["KillMode"] == "process"
    assert re.fullmatch(r"/nix/store/\S+-vllm-proxy/bin/vllm-proxy serve", service["serviceConfig"]["ExecStart"])
    assert "hf-token:/run/secrets/hf-token" in service["serviceConfig"]["LoadCredential"]
    assert json.loads(nix("nix", "eval", "--json", *inputs, *ours, f"{where}.warnings")) == []
    assertions = json.loads(nix("nix", "eval", "--json", *inputs, *ours, f"{where}.assertions"))
    assert all(found["assertion"] for found in assertions)


@pytest.mark.parametrize("keeps_models", ["false", "true"])
def test_the_generated_unit_is_one_that_systemd_takes(tmp_path: Path, keeps_models: str) -> None:
    """`systemd-analyze verify` prints nothing, but for what the systemd of this machine is too old for."""
    found = evaluate(tmp_path, MODELS + f"keepModels = {keeps_models};")
    service = found["service"]
    directives = written(service["serviceConfig"], service["environment"])
    directives |= {"ExecStart": ["/usr/bin/true"], "ExecReload": ["/usr/bin/true"], "Type": ["notify"]}
    del directives["DelegateSubgroup"]
    unit = written({key: service[key.lower()] for key in ("Description", "Wants", "After")})
    sections = {
        "vllm-proxy.service": {"Unit": unit, "Service": directives},
        "vllm-proxy.socket": {"Socket": written(found["socket"]["socketConfig"])},
    }
    for file, content in sections.items():
        lines = [
            line
            for name, of in content.items()
            for line in [f"[{name}]", *(f"{key}={value}" for key, values in of.items() for value in values)]
        ]
        (tmp_path / file).write_text("\n".join([*lines, ""]), encoding="utf-8")
    units = [str(tmp_path / file) for file in sections]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
