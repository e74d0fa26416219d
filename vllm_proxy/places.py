"""Where things are: the configuration file, the state directory, the control socket, and a `.env` that may say so.

For the daemon and for every command; a command that only asks the daemon needs no more settings than these.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from vllm_proxy.errors import ConfigError, Problem
from vllm_proxy.runtime.regular_file import is_folder, is_missing, read_regular_file

PREFIX = "VLLM_PROXY_"
NAMES_FILE = PREFIX + "CONFIG"
_OWN_FILE, _SYSTEM_FILE = Path("models.toml"), Path("/etc/vllm-proxy/models.toml")
_SYSTEM_STATE = Path("/var/lib/vllm-proxy")
_SYSTEM_SOCKET = Path("/run/vllm-proxy/control.sock")  # of the unit, for a shell that has not its environment

_HINTS: dict[type[OSError], str] = {
    FileNotFoundError: "; `vllm-proxy init` writes a first one",
    PermissionError: "; run it with sudo, or let this user read it",
}

type Flags = Mapping[str, str | int | None]  # by name; None: not given


@dataclass(frozen=True, slots=True)
class Places:
    """Where the file, the state and the socket are."""

    config_file: Path
    state_dir: Path
    scratch: Path  # for the engines' temporary folders: short, since sockets lie there
    control_socket: Path  # where the daemon listens for commands
    sockets: tuple[Path, ...]  # where commands look for one, in this order
    state_dirs: tuple[Path, ...]  # of daemons whose engines a command may end where none of them runs
    environment: Mapping[str, str]  # `.env` merged in
    from_dotenv: Mapping[str, str]


def find(environ: Mapping[str, str], flags: Flags, dotenv_file: Path = Path(".env")) -> Places:
    """By the process environment and the flags `config` and `state_dir`.

    Raises:
        ConfigError: when there is a `.env` that cannot be read.

    """
    from_dotenv = _dotenv(dotenv_file)
    env = {**from_dotenv, **environ}
    runtime = env.get("RUNTIME_DIRECTORY", "").split(":")[0]
    state_dir = _state_dir(flags.get("state_dir"), env)
    control_socket = Path(runtime or state_dir, "control.sock")
    chosen = flags.get("state_dir") or env.get(PREFIX + "STATE_DIR")
    of_system = [_SYSTEM_SOCKET] if not chosen or state_dir == _SYSTEM_STATE else []  # not by mistake
    of_demo = [] if chosen else [demo_state_dir(env)]
    return Places(
        config_file=_config_file(flags.get("config"), env),
        state_dir=state_dir,
        control_socket=control_socket,
        sockets=tuple(
            dict.fromkeys(
                [control_socket, state_dir / "control.sock", *of_system, *(demo / "control.sock" for demo in of_demo)]
            )
        ),
        state_dirs=tuple(dict.fromkeys([state_dir, *of_demo])),
        scratch=Path(runtime or "/tmp"),  # noqa: S108 - TMPDIR may be too long for a socket's path
        environment=env,
        from_dotenv=from_dotenv,
    )


def read_config_file(file: Path) -> bytes:
    """The bytes of the configuration file.

    Raises:
        ConfigError: when it is missing or cannot be read.

    """
    try:
        return read_regular_file(file)
    except OSError as error:
        hint = f"; {dangling}" if (dangling := dangling_link(file)) else _HINTS.get(type(error), "")
        raise ConfigError(str(file), [Problem(0, "", f"cannot read it: {error.strerror}{hint}")]) from None


def dangling_link(file: Path) -> str | None:
    """What to say of a link to nowhere; None: it is none."""
    if os.path.islink(file) and not os.path.lexists(os.path.realpath(file)):  # noqa: PTH114 - these never raise
        return f"it is a link to {os.readlink(file)}, which is not there"  # noqa: PTH115
    return None


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
        text = read_regular_file(file).decode()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        if not os.access(file.parent, os.X_OK):  # in a folder of another user, which cannot be meant
            return {}
        if is_folder(file):  # a virtual environment, as some people name it
            return {}
        why = "expected UTF-8, got other bytes" if isinstance(error, UnicodeDecodeError) else error.strerror
        msg = f"cannot read it: {why}; mend it, or run this in another folder"
        raise ConfigError(str(file), [Problem(0, "", msg)]) from None
    import dotenv  # noqa: PLC0415 - few have such a file, and most commands are quicker than this

    values = dotenv.dotenv_values(stream=StringIO(text, newline=None))
    for name, value in values.items():
        if "\0" in f"{name}{value}":
            msg = f"cannot use {name!a}: it has a NUL in it, which no environment can hold"
            raise ConfigError(str(file), [Problem(0, "", msg)])
    return {name: value for name, value in values.items() if value is not None}


def _config_file(flag: str | int | None, env: Mapping[str, str]) -> Path:
    if chosen := flag or env.get(NAMES_FILE):
        return Path(str(chosen)).absolute()
    if os.path.exists(_OWN_FILE) or is_missing(_SYSTEM_FILE):  # noqa: PTH110 - a folder of others has none of ours
        return _OWN_FILE.absolute()
    return _SYSTEM_FILE


def demo_state_dir(env: Mapping[str, str]) -> Path:
    """Where `vllm-proxy demo` keeps its state, unless it is told otherwise."""
    return _state_home(env) / "vllm-proxy-demo"


def _state_home(env: Mapping[str, str]) -> Path:
    return Path(env.get("XDG_STATE_HOME") or Path(env.get("HOME", "/"), ".local/state")).absolute()


def _state_dir(flag: str | int | None, env: Mapping[str, str]) -> Path:
    if chosen := flag or env.get(PREFIX + "STATE_DIR") or env.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(str(chosen)).absolute()
    return _state_home(env) / "vllm-proxy"
