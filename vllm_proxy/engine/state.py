"""The state directory: locked by one daemon, and what the next daemon must know of this one's engines.

Its one rule: an engine is on record before it runs and until its last process is gone. A record that cannot be
written is logged and the engine runs all the same: a full disk must not take models away.
"""

import fcntl
import hashlib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

import msgspec
import structlog
import tomli_w

from vllm_proxy.engine.gate import ANY_DEVICE
from vllm_proxy.engine.process import boot_id
from vllm_proxy.errors import StartupError

log = structlog.get_logger()

_NAME_LIMIT = 200
_STARTS_KEPT = 5  # of one spec
_SPECS_KEPT = 200


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What adopts or ends an engine without having started it. `started` as in `process.Process`.

    What has a default came later: a record of an older daemon is still read.
    """

    instance: str
    own_name: str
    pid: int  # of the first process, and of the session
    started: int
    port: int
    credential: str
    folder: str
    log: str
    spec: str = ""  # `command.fingerprint` of what it was started for
    log_start: int = 0  # where its output begins in the log, bytes
    started_at: str = ""  # UTC
    ready: bool = False  # it has served
    segments: tuple[str, ...] = ()  # its files in /dev/shm
    cgroup: str = ""  # the folder of its own, where it has one
    devices: tuple[str, ...] = (ANY_DEVICE,)  # the GPUs that it has


def file_name(instance: str) -> str:
    """The name of an instance without slashes, short enough for a file's name with something behind it."""
    name = quote(instance, safe="")
    if len(name) > _NAME_LIMIT:  # of 255 bytes
        return f"{name[:100]}~{hashlib.sha256(instance.encode()).hexdigest()[:16]}"
    return name


class StateDirectory:
    """One daemon's place for what outlives it. Use as a context manager: it is locked inside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path / "engines.toml"
        self._starts_file = path / "starts.toml"
        self._records: dict[str, EngineRecord] = {}
        self._starts: dict[str, list[float]] | None = None  # read when first asked for
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
        return self.path / "logs" / f"{file_name(instance)}.log"

    def left_behind(self) -> list[EngineRecord]:
        """The engines that an earlier daemon had on record in this boot."""
        try:
            document = tomllib.loads(self._file.read_text(encoding="utf-8"))
            if document["boot_id"] != boot_id():
                return []
            records = msgspec.convert(document["engines"], list[EngineRecord])
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
        self._records |= {record.own_name: record for record in records}  # until somebody forgets them
        return records

    def record(self, engine: EngineRecord) -> None:
        """Put an engine on record."""
        self._records[engine.own_name] = engine
        self._write()

    def forget(self, own_name: str) -> None:
        """Nothing of the engine is left."""
        self._records.pop(own_name, None)
        self._write()

    def starts(self, spec: str) -> Sequence[float]:
        """How many seconds the last starts of a spec took, by its fingerprint."""
        return self._all_starts().get(spec, [])

    def add_start(self, spec: str, seconds: float) -> None:
        """One more start of a spec."""
        every = self._all_starts()
        mine = [*every.pop(spec, []), round(seconds, 1)][-_STARTS_KEPT:]
        self._starts = dict(list(every.items())[1 - _SPECS_KEPT :]) | {spec: mine}
        self._replace(self._starts_file, {"seconds": self._starts})

    def _all_starts(self) -> dict[str, list[float]]:
        if self._starts is None:
            try:
                document = tomllib.loads(self._starts_file.read_text(encoding="utf-8"))
                self._starts = msgspec.convert(document["seconds"], dict[str, list[float]])
            except (OSError, ValueError, KeyError, msgspec.ValidationError):
                self._starts = {}  # an estimate is worth no complaint
        return self._starts

    def _write(self) -> None:
        engines = [asdict(record) for record in self._records.values()]
        self._replace(self._file, {"boot_id": boot_id(), "engines": engines})

    def _replace(self, file: Path, document: Mapping[str, object]) -> None:
        try:
            # Not worth an fsync each: what a crash of the machine destroys, no later boot could use.
            replace_file(file, tomli_w.dumps(document).encode(), durable=False)
        except OSError as error:
            log.error("the state cannot be written", file=str(file), error=str(error))


def replace_file(path: Path, data: bytes, mode: int = 0o600, *, durable: bool = True) -> None:
    """Put `data` in the place of a file, whole or not at all; `durable`: also when the machine stops in the middle."""
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
