"""Settings from outside the configuration file: flags, environment variables, a `.env` file.

Precedence, highest first: flag, environment, `.env` in the working directory, `[server]` in the file, the default. A
value replaces a weaker one as a whole; lists are not merged. Also finds the file, the state directory and the control
socket. Values are validated by `domain/config.py`, not here.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_proxy import places
from vllm_proxy.domain import keys, secrets
from vllm_proxy.domain.config import Config, Server
from vllm_proxy.domain.file.parse import Override, parse_config
from vllm_proxy.domain.references import Files
from vllm_proxy.places import PREFIX
from vllm_proxy.runtime.referenced import ReferencedFiles

_LISTS = frozenset({"cors_origins", "allowed_hosts", "listen"})
_TEXTS = frozenset({"host", "on_exit", "keys_file", "tls_cert", "tls_key"})
_WEAKER_NAMES = {"port": "APP_PORT"}
_OTHER_NAMES = (f"{PREFIX}CONFIG", f"{PREFIX}STATE_DIR")
_NEAR = 0.8  # of names that begin alike
_OF_KUBERNETES = re.compile(PREFIX + r"(SERVICE_(HOST|PORT)|PORT_\d+_)")  # of a service with our name
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?")


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
    found = places.find(environ, flags, dotenv_file)
    warnings: list[str] = []
    overrides = _overrides([_given(flags), _variables(environ, warnings), _variables(found.from_dotenv, warnings)])
    warnings += _unknown(found.environment)
    return Settings(
        config_file=found.config_file,
        state_dir=found.state_dir,
        control_socket=found.control_socket,
        sockets=found.sockets,
        scratch=found.scratch,
        overrides=overrides,
        engine_environment=found.environment,
        keys=tuple(_keys(found.environment, warnings)),
        files=ReferencedFiles(found.config_file.parent, found.environment.get("CREDENTIALS_DIRECTORY")),
        warnings=tuple(warnings),
    )


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
