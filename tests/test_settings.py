"""What comes from outside the file."""

import os
from pathlib import Path
from typing import Any

import pytest

from vllm_proxy import settings
from vllm_proxy.domain.config import Server
from vllm_proxy.domain.file.parse import Override, parse_config
from vllm_proxy.domain.references import NoFiles
from vllm_proxy.errors import ConfigError
from vllm_proxy.settings import Settings

NO_DOTENV = Path("/nonexistent/.env")


def load(env: dict[str, str] | None = None, dotenv: Path = NO_DOTENV, **flags: str | int | None) -> Settings:
    """Settings from an environment, a `.env` file and flags."""
    return settings.load(env or {}, flags, dotenv)


def dotenv(folder: Path, text: str) -> Path:
    """A `.env` file."""
    file = folder / ".env"
    file.write_text(text, encoding="utf-8")
    return file


def test_nothing_from_outside_overrides_nothing() -> None:
    """With no flag and no variable the file decides alone."""
    loaded = load()
    assert loaded.overrides == {}
    assert loaded.warnings == ()
    assert loaded.engine_environment == {}


@pytest.mark.parametrize(
    ("flags", "environ", "in_dotenv", "port", "source"),
    [
        ({"port": 1}, {"VLLM_PROXY_PORT": "2", "APP_PORT": "3"}, "VLLM_PROXY_PORT=4\nAPP_PORT=5", 1, "--port"),
        ({}, {"VLLM_PROXY_PORT": "2", "APP_PORT": "3"}, "VLLM_PROXY_PORT=4\nAPP_PORT=5", 2, "VLLM_PROXY_PORT"),
        ({"port": None}, {"APP_PORT": "3"}, "VLLM_PROXY_PORT=4\nAPP_PORT=5", 3, "APP_PORT"),
        ({}, {}, "VLLM_PROXY_PORT=4\nAPP_PORT=5", 4, "VLLM_PROXY_PORT"),
        ({}, {}, "APP_PORT=5", 5, "APP_PORT"),
    ],
)
def test_the_stronger_place_wins(
    tmp_path: Path, flags: dict[str, int | None], environ: dict[str, str], in_dotenv: str, port: int, source: str
) -> None:
    """Flag, environment, `.env`; within one of them APP_PORT is the weaker name."""
    loaded = load(environ, dotenv(tmp_path, in_dotenv), **flags)
    assert loaded.overrides["port"] == Override(port, source)


class EmptyFiles(NoFiles):
    """Every file is there, with nothing in it."""

    def read(self, _text: str) -> bytes:
        """Nothing."""
        return b""


@pytest.mark.parametrize(
    ("flags", "environ", "in_dotenv", "left"),
    [
        ({"port": 1}, {"VLLM_PROXY_LISTEN": "[::1]:2"}, "", {"port", "listen"}),
        ({}, {"VLLM_PROXY_LISTEN": "[::1]:2", "APP_PORT": "3"}, "", {"port", "listen"}),
        ({}, {"VLLM_PROXY_LISTEN": "[::1]:2"}, "VLLM_PROXY_HOST=x\nAPP_PORT=5", {"listen"}),
        ({"host": "x"}, {"VLLM_PROXY_LISTEN": "[::1]:2"}, "APP_PORT=5", {"host", "listen"}),
        ({"port": 1}, {}, "VLLM_PROXY_LISTEN=[::1]:2", {"port", "listen"}),
    ],
)
def test_a_weaker_host_or_port_does_not_replace_a_stronger_list(
    tmp_path: Path, flags: dict[str, int | str], environ: dict[str, str], in_dotenv: str, left: set[str]
) -> None:
    """They replace the TCP addresses of a list that is as strong as they, or weaker."""
    assert load(environ, dotenv(tmp_path, in_dotenv), **flags).overrides.keys() == left


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("HOST", "0.0.0.0", "0.0.0.0"),
        ("HOST", "gpu7", "gpu7"),
        ("HOST", "true", "true"),
        ("PORT", "9000", 9000),
        ("KEYS_FILE", "/etc/keys.toml", "/etc/keys.toml"),
        ("KEYS_FILE", "credential:keys.toml", "credential:keys.toml"),
        ("LISTEN", "127.0.0.1:8000, unix:/run/x.sock", ("127.0.0.1:8000", "unix:/run/x.sock")),
        ("TLS_CERT", "server.crt", "server.crt"),
        ("TLS_KEY", "credential:key", "credential:key"),
        ("CORS_ORIGINS", "https://a.example, http://b:1 ,", ("https://a.example", "http://b:1")),
        ("CORS_ORIGINS", "*", ("*",)),
        ("ALLOWED_HOSTS", "", ()),
        ("ALLOW_REMOTE_ADMIN", "true", True),
        ("ALLOW_REMOTE_ADMIN", "False", False),
        ("MAX_BODY_SIZE", "1MiB", 2**20),
        ("MAX_BODY_SIZE", "4096", 4096),
        ("MAX_BUFFERED", "2GiB", 2**31),
        ("MAX_CONNECTIONS", "500", 500),
        ("HEAD_TIMEOUT", "0", 0.0),
        ("BODY_TIMEOUT", "2m", 120.0),
        ("SHUTDOWN_TIMEOUT", "1m", 60.0),
        ("SHUTDOWN_TIMEOUT", "90", 90.0),
        ("SHUTDOWN_TIMEOUT", "1.5", 1.5),
        ("USAGE", "true", True),
        ("FAIR", "true", True),
        ("ON_EXIT", "keep", "keep"),
    ],
)
def test_every_server_key_has_a_variable(name: str, value: str, meaning: object) -> None:
    """The variable's text means what the same value means in the file; lists are separated by commas."""
    beside = {"TLS_CERT": "TLS_KEY", "TLS_KEY": "TLS_CERT"}  # given both or neither
    env = {f"VLLM_PROXY_{beside[name]}": "x"} if name in beside else {}
    loaded = load({**env, f"VLLM_PROXY_{name}": value})
    server = parse_config(b"", "f", loaded.overrides, files=EmptyFiles()).server
    assert getattr(server, name.lower()) == meaning


def test_no_server_key_is_without_a_test_of_its_variable() -> None:
    """Every key of `[server]` is listed above."""
    marks = test_every_server_key_has_a_variable.pytestmark  # type: ignore[attr-defined]
    assert {case[0].lower() for case in marks[0].args[1]} == set(Server.model_fields)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VLLM_PROXY_PORT", "eighty", 'expected a whole number, got "eighty"'),
        ("VLLM_PROXY_PORT", "", 'expected a whole number, got ""'),
        ("VLLM_PROXY_PORT", "80.5", "expected a whole number, got 80.5"),
        ("VLLM_PROXY_PORT", "9" * 5000, "expected a whole number, got "),
        ("APP_PORT", "70000", "expected at most 65535, got 70000"),
        ("VLLM_PROXY_ALLOW_REMOTE_ADMIN", "yes", 'expected true or false, got "yes"'),
        ("VLLM_PROXY_ON_EXIT", "true", 'expected one of "stop", "keep", got "true"'),
    ],
)
def test_a_wrong_variable_is_named_with_what_was_expected(name: str, value: str, message: str) -> None:
    """The message names the variable, not a line of the file that does not hold the value."""
    with pytest.raises(ConfigError) as raised:
        parse_config(b"[server]\nport = 1\n", "f", load({name: value}).overrides)
    (line,) = raised.value.lines()
    assert line.startswith(f"f: {name}: {message}")


def test_a_url_that_kubernetes_injects_is_ignored_with_a_warning() -> None:
    """A Service called vllm-proxy sets VLLM_PROXY_PORT for every pod; the next name counts instead."""
    loaded = load({"VLLM_PROXY_PORT": "tcp://10.0.0.1:80", "APP_PORT": "9000", "VLLM_PROXY_HOST": "udp://x"})
    assert loaded.overrides == {"port": Override(9000, "APP_PORT")}
    assert len(loaded.warnings) == 2
    assert any("VLLM_PROXY_PORT" in warning and "tcp://10.0.0.1:80" in warning for warning in loaded.warnings)


def test_other_variables_of_dotenv_reach_the_engines(tmp_path: Path) -> None:
    """As if they had been exported, though the real environment is stronger."""
    loaded = load({"A": "real"}, dotenv(tmp_path, "A=file\nHF_TOKEN='hf_x'\nexport B=2\n# C=3\nD\n"))
    assert loaded.engine_environment == {"A": "real", "HF_TOKEN": "hf_x", "B": "2"}


def test_a_dotenv_that_is_no_text_is_an_error_that_names_it(tmp_path: Path) -> None:
    """Not a traceback, and not silence."""
    file = tmp_path / ".env"
    file.write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigError) as raised:
        load(dotenv=file)
    assert raised.value.lines() == [
        f"{file}: cannot read it: expected UTF-8, got other bytes; mend it, or run this in another folder"
    ]


def test_the_file_is_the_flags_then_the_variables_then_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-c`, $VLLM_PROXY_CONFIG, ./models.toml; always absolute, so that a change of folder changes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.toml").touch()
    assert load().config_file == tmp_path / "models.toml"
    assert load({"VLLM_PROXY_CONFIG": "sub/e.toml"}).config_file == tmp_path / "sub/e.toml"
    assert load({"VLLM_PROXY_CONFIG": "e.toml"}, config="/x/c.toml").config_file == Path("/x/c.toml")
    assert load({"VLLM_PROXY_CONFIG": ""}).config_file == tmp_path / "models.toml"
    assert load({}, dotenv(tmp_path, "VLLM_PROXY_CONFIG=d.toml")).config_file == tmp_path / "d.toml"


@pytest.mark.parametrize(
    ("flag", "environ", "expected"),
    [
        ("/f", {"VLLM_PROXY_STATE_DIR": "/v"}, "/f"),
        (None, {"VLLM_PROXY_STATE_DIR": "/v", "STATE_DIRECTORY": "/s"}, "/v"),
        (None, {"STATE_DIRECTORY": "/s:/second", "XDG_STATE_HOME": "/x"}, "/s"),
        (None, {"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/vllm-proxy"),
        (None, {"HOME": "/h"}, "/h/.local/state/vllm-proxy"),
        (None, {"STATE_DIRECTORY": "", "XDG_STATE_HOME": "", "HOME": "/h"}, "/h/.local/state/vllm-proxy"),
    ],
)
def test_the_state_directory_is_found_in_the_order_of_the_contract(
    flag: str | None, environ: dict[str, str], expected: str
) -> None:
    """Flag, own variable, systemd's, XDG's, home; of several that systemd names the first."""
    assert load(environ, state_dir=flag).state_dir == Path(expected)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, "/tmp"), ({"TMPDIR": "/long"}, "/tmp"), ({"RUNTIME_DIRECTORY": "/run/v:/w"}, "/run/v")],
)
def test_scratch_is_short(environ: dict[str, str], expected: str) -> None:
    """Sockets lie there, whose paths may have 107 bytes: never under a TMPDIR of unknown length."""
    assert load(environ).scratch == Path(expected)


SYSTEM = Path("/run/vllm-proxy/control.sock")


@pytest.mark.parametrize(
    ("env", "flags", "asked"),
    [
        ({"HOME": "/h"}, {}, True),
        ({"STATE_DIRECTORY": "/var/lib/vllm-proxy"}, {}, True),
        ({}, {"state_dir": "/var/lib/vllm-proxy"}, True),
        ({}, {"state_dir": "/srv/mine"}, False),
        ({"VLLM_PROXY_STATE_DIR": "/srv/mine"}, {}, False),
    ],
)
def test_who_names_a_daemon_never_gets_the_systems(env: dict[str, str], flags: dict[str, Any], *, asked: bool) -> None:
    """A state directory whose daemon does not run must not make `stop --all` stop another one."""
    loaded = load(env, **flags)
    assert (SYSTEM in loaded.sockets) is asked
    assert loaded.sockets[0] == loaded.control_socket


def test_the_runtime_directorys_socket_is_asked_before_that_of_the_state() -> None:
    """As the daemon chooses it."""
    loaded = load({"RUNTIME_DIRECTORY": "/run/x:/run/y"}, state_dir="/srv/mine")
    assert loaded.sockets == (Path("/run/x/control.sock"), Path("/srv/mine/control.sock"))


def test_a_dotenv_that_is_no_regular_file_is_an_error_and_a_folder_is_none(tmp_path: Path) -> None:
    """A FIFO would hold up every command; a virtual environment that is called so is nothing to read."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError) as raised:
        load(dotenv=tmp_path / "fifo")
    assert "cannot read it: it is a pipe or FIFO" in raised.value.lines()[0]
    assert load({"A": "real"}, dotenv=tmp_path).engine_environment == {"A": "real"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("VLLM_PROXY_PROT", "VLLM_PROXY_PROT is unknown and ignored; did you mean VLLM_PROXY_PORT?"),
        ("VLLM_PROXY_STATEDIR", "VLLM_PROXY_STATEDIR is unknown and ignored; did you mean VLLM_PROXY_STATE_DIR?"),
        ("VLLM_PROXY_COLOUR_OF_THE_SKY", "VLLM_PROXY_COLOUR_OF_THE_SKY is unknown and ignored"),
        ("VLLM_PROXY_SERVICE_HOST", None),
        ("VLLM_PROXY_SERVICE_PORT_HTTP", None),
        ("VLLM_PROXY_PORT_8000_TCP_PROTO", None),
        ("VLLM_PROXY_CONFIG", None),
        ("VLLM_PROXY_API_KEY", None),
        ("OTHER_VLLM_PROXY_PROT", None),
    ],
)
def test_an_unknown_variable_is_a_warning_with_the_nearest_name(tmp_path: Path, name: str, said: str | None) -> None:
    """Without its value; from `.env` as well. What Kubernetes sets for a service with our name is nobody's mistake."""
    expected = () if said is None else (said,)
    value = "a value of more than thirty-two characters"
    assert load({name: value}).warnings == expected
    assert load({}, dotenv(tmp_path, f"{name}={value}")).warnings == expected


def test_a_nul_in_the_dotenv_is_a_problem_of_it(tmp_path: Path) -> None:
    """No environment of an engine can hold it."""
    with pytest.raises(ConfigError) as error:
        load(dotenv=dotenv(tmp_path, "A=x\0y"))
    assert error.value.lines() == [
        f"{tmp_path / '.env'}: cannot use 'A': it has a NUL in it, which no environment can hold"
    ]
