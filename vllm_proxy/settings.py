"""Settings from outside the configuration file: flags, environment variables, a `.env` file.

Precedence, highest first: flag, environment, `.env` in the working directory, `[server]` in the file, the default. A
value replaces a weaker one as a whole; lists are not merged. Also finds the file, the state directory and the control
socket. Values are validated by `domain/config.py`, not here.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import dotenv

from vllm_proxy.domain import keys, secrets
from vllm_proxy.domain.config import Config, Server
from vllm_proxy.domain.file.parse import Override, parse_config
from vllm_proxy.domain.references import Files
from vllm_proxy.errors import ConfigError, Problem
from vllm_proxy.runtime.referenced import ReferencedFiles
from vllm_proxy.runtime.regular_file import read_regular_file

PREFIX = "VLLM_PROXY_"
_LISTS = frozenset({"cors_origins", "allowed_hosts", "listen"})
_TEXTS = frozenset({"host", "on_exit", "keys_file", "tls_cert", "tls_key"})
_WEAKER_NAMES = {"port": "APP_PORT"}
_OTHER_NAMES = (f"{PREFIX}CONFIG", f"{PREFIX}STATE_DIR")
_NEAR = 0.8  # of names that begin alike
_OF_KUBERNETES = re.compile(PREFIX + r"(SERVICE_(HOST|PORT)|PORT_\d+_)")  # of a service with our name
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?")
_OWN_FILE, _SYSTEM_FILE = Path("models.toml"), Path("/etc/vllm-proxy/models.toml")
_SYSTEM_STATE = Path("/var/lib/vllm-proxy")
_SYSTEM_SOCKET = Path("/run/vllm-proxy/control.sock")  # of the unit, for a shell that has not its environment


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the file and the state are, and what is stronger than the file."""

    config_file: Path
    state_dir: Path
    scratch: Path  # for the engines' temporary folders: short, since sockets lie there
    control_socket: Path  # where the daemon listens for commands
    sockets: tuple[Path, ...]  # where commands look for one, in this order
    overrides: Mapping[str, Override]
    engine_environment: Mapping[str, str]  # the daemon's own, `.env` merged in
    keys: tuple[keys.Key, ...]  # from the environment
    files: ReferencedFiles
    warnings: tuple[str, ...]

    @property
    def keys_file(self) -> str | None:
        """What the environment says of `server.keys_file`."""
        override = self.overrides.get("keys_file")
        return None if override is None else str(override.value)

    def parse(self, data: bytes, files: Files | None = None) -> Config:
        """The meaning of the configuration file's bytes, settings from outside applied.

        `files`: reads what it names in place of what is on disk.

        Raises:
            ConfigError: with every problem found.

        """
        return parse_config(data, str(self.config_file), self.overrides, files=files or self.files, given=self.keys)


def load(
    environ: Mapping[str, str], flags: Mapping[str, str | int | None], dotenv_file: Path = Path(".env")
) -> Settings:
    """Settings from the process environment and the flags `config`, `state_dir`, `host`, `port` (None: not given).

    Raises:
        ConfigError: when there is a `.env` that cannot be read.

    """
    from_file = _dotenv(dotenv_file)
    env = {**from_file, **environ}
    warnings: list[str] = []
    overrides = _overrides([_given(flags), _variables(environ, warnings), _variables(from_file, warnings)])
    warnings += _unknown(env)
    runtime = env.get("RUNTIME_DIRECTORY", "").split(":")[0]
    state_dir = _state_dir(flags.get("state_dir"), env)
    control_socket = Path(runtime or state_dir, "control.sock")
    chosen = flags.get("state_dir") or env.get(PREFIX + "STATE_DIR")
    of_system = [_SYSTEM_SOCKET] if not chosen or state_dir == _SYSTEM_STATE else []  # not by mistake
    of_demo = [] if chosen else [demo_state_dir(env) / "control.sock"]
    config_file = _config_file(flags.get("config"), env)
    return Settings(
        config_file=config_file,
        state_dir=state_dir,
        control_socket=control_socket,
        sockets=tuple(dict.fromkeys([control_socket, state_dir / "control.sock", *of_system, *of_demo])),
        scratch=Path(runtime or "/tmp"),  # noqa: S108 - TMPDIR may be too long for a socket's path
        overrides=overrides,
        engine_environment=env,
        keys=tuple(_keys(env, warnings)),
        files=ReferencedFiles(config_file.parent, env.get("CREDENTIALS_DIRECTORY")),
        warnings=tuple(warnings),
    )


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """A name for a Unix socket that is short enough (107 bytes) however long its path is."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _dotenv(file: Path) -> dict[str, str]:
    try:
        values = dotenv.dotenv_values(stream=StringIO(read_regular_file(file).decode(), newline=None))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        if not os.access(file.parent, os.X_OK):  # in a folder of another user, which cannot be meant
            return {}
        if file.is_dir():  # a virtual environment, as some people name it
            return {}
        why = "expected UTF-8, got other bytes" if isinstance(error, UnicodeDecodeError) else error.strerror
        msg = f"cannot read it: {why}; mend it, or run this in another folder"
        raise ConfigError(str(file), [Problem(0, "", msg)]) from None
    return {name: value for name, value in values.items() if value is not None}


_SCOPES = {"env": keys.Scope.INFERENCE, "env-admin": keys.Scope.ADMIN}


def _keys(env: Mapping[str, str], warnings: list[str]) -> Iterator[keys.Key]:
    """Keys for containers. Their hashes stand nowhere, so a short one is not refused."""
    for name, variable in keys.RESERVED.items():
        value = env.get(variable, "").strip()
        if not value:
            continue
        if len(value) < keys.LEAST_CHARACTERS:
            warnings.append(f"{variable} has fewer than {keys.LEAST_CHARACTERS} characters: it may be guessed")
        digests = (keys.digest(value.encode()),)
        yield keys.Key(name, digests, keys.closure([_SCOPES[name]]), source="environment")


type Layer = dict[str, Override]


def _overrides(layers: Sequence[Layer]) -> Layer:
    """Of each key the strongest value, the layers from the strongest to the weakest.

    Host and port replace the TCP addresses of `listen`, where they are not weaker than it.
    """
    merged: Layer = {}
    for layer in layers:
        weaker = {"host", "port"} if "listen" in merged else set()
        merged = {**{key: value for key, value in layer.items() if key not in weaker}, **merged}
    return merged


def _given(flags: Mapping[str, str | int | None]) -> Layer:
    found = {key: flags.get(key) for key in Server.model_fields}
    return {key: Override(flag, f"--{key}") for key, flag in found.items() if flag is not None}


def _variables(layer: Mapping[str, str], warnings: list[str]) -> Layer:
    found: Layer = {}
    for key in Server.model_fields:
        for name in (PREFIX + key.upper(), *([_WEAKER_NAMES[key]] if key in _WEAKER_NAMES else [])):
            value = layer.get(name)
            if value is None or key in found:
                continue
            if key not in _LISTS and _URL.match(value):  # Kubernetes injects NAME_PORT=tcp://... for its services
                warnings.append(f"{name} looks like a URL and is ignored: {secrets.form(value, ())}")
                continue
            found[key] = Override(_typed(key, value), name)
    return found


def _unknown(env: Mapping[str, str]) -> Iterator[str]:
    """Of each variable with our prefix that means nothing here."""
    known = [*(PREFIX + key.upper() for key in Server.model_fields), *_OTHER_NAMES, *keys.RESERVED.values()]
    for name in env:
        if not name.startswith(PREFIX) or name in known or _OF_KUBERNETES.match(name):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
        yield f"{name} is unknown and ignored" + (f"; did you mean {near[0]}?" if near else "")


def _typed(key: str, value: str) -> object:
    """An environment variable as TOML would have it; what is wrong with it, the configuration's types say."""
    if key in _LISTS:
        return [item.strip() for item in value.split(",") if item.strip()]
    if key not in _TEXTS and value.lower() in {"true", "false"}:
        return value.lower() == "true"
    if key in _TEXTS or not (number := _NUMBER.fullmatch(value)):
        return value
    return float(value) if number[1] else int(value)


def _config_file(flag: str | int | None, env: Mapping[str, str]) -> Path:
    if chosen := flag or env.get(PREFIX + "CONFIG"):
        return Path(str(chosen)).absolute()
    if os.path.exists(_OWN_FILE) or not _is_there(_SYSTEM_FILE):  # noqa: PTH110 - a folder of others has none of ours
        return _OWN_FILE.absolute()
    return _SYSTEM_FILE


def _is_there(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # in a folder that is closed to this user: reading it will report that
        return True


def demo_state_dir(env: Mapping[str, str]) -> Path:
    """Where `vllm-proxy demo` keeps its state, unless it is told otherwise."""
    return _state_home(env) / "vllm-proxy-demo"


def _state_home(env: Mapping[str, str]) -> Path:
    return Path(env.get("XDG_STATE_HOME") or Path(env.get("HOME", "/"), ".local/state")).absolute()


def _state_dir(flag: str | int | None, env: Mapping[str, str]) -> Path:
    if chosen := flag or env.get(PREFIX + "STATE_DIR") or env.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(str(chosen)).absolute()
    return _state_home(env) / "vllm-proxy"
