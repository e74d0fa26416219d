"""The state directory: locked by one daemon, and what the next daemon must know of this one's engines.

Its one rule: an engine is on record before it runs and until its last process is gone. A record that cannot be
written is logged and the engine runs all the same: a full disk must not take models away.
"""

import fcntl
import hashlib
import os
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

import msgspec
import structlog
import tomli_w

from vllm_proxy.engine.process import boot_id
from vllm_proxy.errors import StartupError

log = structlog.get_logger()

_NAME_LIMIT = 200


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What ends (or, later, adopts) an engine without having started it. `started` as in `process.Process`."""

    instance: str
    own_name: str
    pid: int  # of the first process, and of the session
    started: int
    port: int
    credential: str
    folder: str
    log: str


class StateDirectory:
    """One daemon's place for what outlives it. Use as a context manager: it is locked inside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path / "engines.toml"
        self._records: dict[str, EngineRecord] = {}
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.path / "logs").mkdir(exist_ok=True, mode=0o700)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            msg = f"cannot use the state directory {self.path}: {error.strerror}; choose another with --state-dir"
            raise StartupError(msg) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            msg = f"cannot use the state directory {self.path}: another daemon does; choose another with --state-dir"
            raise StartupError(msg) from None
        return self

    def __exit__(self, *_: object) -> None:
        assert self._lock is not None
        os.close(self._lock)

    def log_file(self, instance: str) -> Path:
        """Where the output of an instance goes."""
        name = quote(instance, safe="")
        if len(name) > _NAME_LIMIT:  # a file's name has at most 255 bytes
            name = f"{name[:100]}~{hashlib.sha256(instance.encode()).hexdigest()[:16]}"
        return self.path / "logs" / f"{name}.log"

    def left_behind(self) -> list[EngineRecord]:
        """The engines that an earlier daemon had on record in this boot."""
        try:
            document = tomllib.loads(self._file.read_text(encoding="utf-8"))
            if document["boot_id"] != boot_id():
                return []
            return msgspec.convert(document["engines"], list[EngineRecord])
        except FileNotFoundError:
            return []
        except (
            OSError,
            UnicodeDecodeError,
            tomllib.TOMLDecodeError,
            KeyError,
            TypeError,
            msgspec.ValidationError,
        ) as error:
            log.error("the record of engines cannot be read; engines of an earlier daemon may be left",
                      file=str(self._file), error=str(error))  # fmt: skip
            return []

    def record(self, engine: EngineRecord) -> None:
        """Put an engine on record."""
        self._records[engine.own_name] = engine
        self._write()

    def forget(self, own_name: str) -> None:
        """Nothing of the engine is left."""
        self._records.pop(own_name, None)
        self._write()

    def _write(self) -> None:
        document = {"boot_id": boot_id(), "engines": [asdict(record) for record in self._records.values()]}
        try:
            replace_file(self._file, tomli_w.dumps(document).encode())
        except OSError as error:
            log.error("the record of engines cannot be written", file=str(self._file), error=str(error))


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put `data` in the place of a file, whole or not at all, also when the machine stops in the middle."""
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
