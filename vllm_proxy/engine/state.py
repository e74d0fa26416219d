"""The state directory: locked by one daemon, with its record of engines (engines.toml) for the next one.

An engine is on record before it runs and until its last process is gone, so that a killed daemon leaves no unknown
orphan. A record that cannot be written is logged and the engine runs all the same: a full disk must not cost a model.
Records are validated before anything is done about them (tests/engine/test_state.py).
"""

import fcntl
import hashlib
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, Self, TypedDict
from urllib.parse import quote

import msgspec
import structlog

from vllm_proxy.domain.adapters import Lora
from vllm_proxy.domain.address import TcpAddress, UnixAddress, parse_address
from vllm_proxy.domain.canary import parse_canary
from vllm_proxy.domain.command import Place, mark
from vllm_proxy.domain.devices import ANY_DEVICE, Allocation
from vllm_proxy.engine import cgroup, vitals
from vllm_proxy.engine import scratch as scratch_folders
from vllm_proxy.engine.learned import Learned
from vllm_proxy.engine.ownership import Identity
from vllm_proxy.engine.ports import HOST
from vllm_proxy.engine.proc import PID_LIMIT, boot_id, pid_namespace
from vllm_proxy.engine.state_files import StateFiles
from vllm_proxy.errors import StartupError
from vllm_proxy.runtime import files

log = structlog.get_logger()

SCRATCH = Path("/tmp")  # noqa: S108 - where there is no RUNTIME_DIRECTORY; engines' folders in it are private
SOCKET = "http.sock"  # in the folder of an engine that may sleep
_NAME_LIMIT = 200
_STARTS_KEPT = 5  # of one spec
_FOREIGN_KEPT = 100  # records of other pid namespaces
_NAMESPACE = "pid_namespace"
_PORT = "port"  # of an older daemon's records, which have no address; still written, so that one may go back to it
_INSTANCE = re.compile(r"[A-Za-z0-9._:@/-]{1,200}/[0-9]{1,6}")
_WORD = re.compile(r"[!-~]{1,200}")
_SEGMENT = re.compile(rf"{vitals.SHARED_MEMORY}.+")


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What adopts or ends an engine without having started it. `started` as in `proc.Process`.

    What has a default came later: a record of an older daemon is still read.
    """

    instance: str
    own_name: str
    pid: int  # of the first process, and of the session
    started: int
    address: str  # as `parse_address` reads it
    credential: str
    folder: str  # of its own, for temporary files; "": not known to be one, so that nothing is removed
    log: str
    spec: str = ""  # `command.fingerprint` of what it was started for
    log_start: int = 0  # where its output begins in the log, bytes
    started_at: str = ""  # UTC
    ready: bool = False  # it has served
    segments: tuple[str, ...] = ()  # its files in /dev/shm
    cgroup: str = ""  # the folder of its own, where it has one
    devices: tuple[str, ...] = (ANY_DEVICE,)  # the GPUs that it has
    takes: Mapping[str, int] = field(default_factory=dict)  # bytes of each of them, where devices are managed
    share: float = 0.0  # its `gpu_memory_utilization`, where the daemon chose that
    visible: tuple[str, ...] | None = None  # what CUDA_VISIBLE_DEVICES said; None: as the daemon had it
    gpus: bool = True  # whether its devices are GPUs; else they are the machine's memory
    unified: bool = False  # whether one of them has its memory in common with the machine
    asleep: int = 0  # the level that it was to sleep at last; 0: it was to serve
    before_sleep: int | None = None  # bytes of its processes before it first slept at level 1; None: it never has
    weights: int = 0  # bytes of each device that its weights have, as it said; 0: not known
    canary: str = ""  # what it answered before it slept, as `parse_canary` reads it; "": it has no route to be asked on
    lora: Lora | None = None  # what it can hold of adapters; None: it takes none
    launched: Literal["process"] = "process"  # how it was; what another daemon launched in another way is not touched

    @property
    def place(self) -> Place:
        """Where it runs."""
        address = parse_address(self.address)
        may_sleep = isinstance(address, UnixAddress)
        return Place(self.instance, self.own_name, address, self.credential, self.folder, self.allocation, may_sleep)

    @property
    def allocation(self) -> Allocation:
        """What it was given, all of it: it may be measured, fall asleep and be started anew under another daemon."""
        takes = {name: self.takes.get(name, 0) for name in self.devices}
        return Allocation(takes, self.visible, self.share or None, self.gpus, self.unified)

    @property
    def identity(self) -> Identity:
        """What its processes are known by."""
        return Identity(self.pid, self.started, mark(self.instance, self.credential), self.cgroup)

    @property
    def since(self) -> float:
        """When it was started, in seconds of the epoch; never, where that is not known."""
        return datetime.fromisoformat(self.started_at).timestamp() if self.started_at else math.inf


class Given(TypedDict):
    """The part of a record that says what an engine was given of the devices."""

    devices: tuple[str, ...]
    takes: Mapping[str, int]
    share: float
    visible: tuple[str, ...] | None
    gpus: bool
    unified: bool


def given(allocation: Allocation) -> Given:
    """As `EngineRecord.allocation` reads it back."""
    return {
        "devices": tuple(sorted(allocation.devices)),
        "takes": dict(allocation.takes),
        "share": allocation.share or 0.0,
        "visible": allocation.visible,
        "gpus": allocation.gpus,
        "unified": allocation.unified,
    }


def file_name(instance: str) -> str:
    """The name of an instance without slashes, short enough for a file's name with something behind it."""
    name = quote(instance, safe="")
    if len(name) > _NAME_LIMIT:  # of 255 bytes
        return f"{name[:100]}~{hashlib.sha256(instance.encode()).hexdigest()[:16]}"
    return name


class StateDirectory:
    """One daemon's place for what outlives it. Use as a context manager: it is locked inside."""

    def __init__(self, path: Path, scratch: Path = SCRATCH) -> None:
        """`scratch`: where engines' temporary folders are made by this daemon."""
        self.path = path
        self._scratch = scratch
        self.unusable = 0  # records of an earlier daemon that `orphans` could not use
        self.file = path / "engines.toml"  # the records
        self._records: dict[str, EngineRecord] = {}
        self._kept: list[object] = []  # entries that are not acted on, as they were read
        self._files = StateFiles(lambda: files.refuse_replaced(self._lock, path / "lock"))
        self._starts = Learned(path / "starts.toml", "seconds", _STARTS_KEPT, self._files.replace)
        self._memory = Learned(path / "memory.toml", "bytes", 1, self._files.replace)
        self._residues = Learned(path / "residues.toml", "bytes", 1, self._files.replace)
        self._lock: int | None = None

    def __enter__(self) -> Self:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            files.refuse_foreign(self.path)
            (self.path / "logs").mkdir(exist_ok=True, mode=0o700)
            self._lock = os.open(self.path / "lock", flags, 0o600)
        except OSError as error:
            why = f"{error.filename or self.path}: {error.strerror}"
            raise StartupError(f"cannot use the state directory {why}; choose another with --state-dir") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            msg = f"cannot use the state directory {self.path}: another daemon does; choose another with --state-dir"
            raise StartupError(msg) from None
        for file in (self.file, self._starts.file, self._memory.file, self._residues.file):
            files.remove_temporaries(file)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._lock is not None
        self._files.close()
        os.close(self._lock)

    @property
    def problem(self) -> str | None:
        """Why some of it is not on disk: it is held in memory meanwhile, and a later daemon would not know of it."""
        return self._files.problem

    def log_file(self, instance: str) -> Path:
        """Where the output of an instance goes."""
        return self.path / "logs" / f"{file_name(instance)}.log"

    def orphans(self) -> list[EngineRecord]:
        """The engines that an earlier daemon had on record in this boot.

        What cannot be one, and what was counted in another pid namespace (a container that is no more, or one beside
        this), is reported, stays in the file and is not acted on.
        """
        try:
            entries = self._entries()
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.unusable += 1
            aside = None if isinstance(error, OSError) else self._set_aside()
            log.error("the record of engines cannot be read; engines of an earlier daemon may be left",
                      file=str(self.file), error=str(error) or repr(error), kept_as=aside)  # fmt: skip
            return []
        here = pid_namespace()
        elsewhere = [entry for entry in entries if _text_of(entry, _NAMESPACE) not in {"", here}]
        if elsewhere:
            log.warning("engines on record are of another pid namespace (a container) and are left alone: "
                        "where they run, `vllm-proxy stop --all` ends them", file=str(self.file),
                        instances=[_text_of(entry, "instance") for entry in elsewhere])  # fmt: skip
        records: dict[str, EngineRecord] = {}
        faulty = []
        for entry in (entry for entry in entries if entry not in elsewhere):
            try:
                record = self._usable(entry, records)
            except ValueError as error:  # msgspec's are, too
                self.unusable += 1
                log.error("a record of an engine cannot be used and is left alone; the engine may be left",
                          file=str(self.file), entry=_shown(entry), error=str(error))  # fmt: skip
                faulty.append(entry)
            else:
                records[record.own_name] = record
        self._kept = [*elsewhere[-_FOREIGN_KEPT:], *faulty]
        self._records |= records  # until somebody forgets them
        return list(records.values())

    def _entries(self) -> list[object]:
        document = tomllib.loads(files.read_file(self.file).decode())
        if document["boot_id"] != boot_id():
            return []
        return msgspec.convert(document["engines"], list[object])

    def _usable(self, entry: object, others: Mapping[str, EngineRecord]) -> EngineRecord:
        """A record that a daemon may have written beside the `others`, by own name.

        Raises:
            ValueError: it is none; says why.

        """
        record = msgspec.convert(_with_address(entry), EngineRecord)
        fault = next((name for name, holds in _invariants(record) if not holds), None)
        if fault is not None:
            shown = "this" if fault == "credential" else repr(getattr(record, fault))
            raise ValueError(f"{fault}: no daemon writes {shown}")
        if record.own_name in others:
            raise ValueError("own_name: it is that of another record")
        if record.folder and not _is_engines_folder(Path(record.folder), self._scratch):
            log.warning("the folder of an engine on record is none that a daemon makes here, and is left alone",
                        instance=record.instance, folder=record.folder)  # fmt: skip
            record = replace(record, folder="")
        # Where an engine writes to is known, whatever is on record: that file is read, and cut when it is long.
        in_memory = f"/proc/{record.pid}/fd/1"
        return record if record.log == in_memory else replace(record, log=str(self.log_file(record.instance)))

    def _set_aside(self) -> str | None:
        """Keep a file that is none of ours for who wants to know what it was; its new name."""
        aside = self.file.with_name(f"{self.file.name}.unreadable")
        try:
            self.file.rename(aside)
        except OSError:
            return None
        return aside.name

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
        return self._starts.of(spec)

    def add_start(self, spec: str, seconds: float) -> None:
        """One more start of a spec."""
        self._starts.add(spec, round(seconds, 1))

    def memory(self, spec: str) -> int | None:
        """Bytes that the last engine of a spec had of each device; None: not known."""
        return _newest(self._memory, spec)

    def note_memory(self, spec: str, size: int) -> None:
        """An engine of a spec has so many bytes of each device."""
        if size != self.memory(spec):
            self._memory.add(spec, size)

    def residue(self, spec: str) -> int | None:
        """Bytes that the last engine of a spec had of each device while it slept; None: not known."""
        return _newest(self._residues, spec)

    def note_residue(self, spec: str, size: int) -> None:
        """An engine of a spec has so many bytes of each device while it sleeps."""
        if size != self.residue(spec):
            self._residues.add(spec, size)

    def _write(self) -> None:
        here = pid_namespace()
        engines = [_written(record) | {_NAMESPACE: here} for record in self._records.values()]
        self._files.replace(self.file, {"boot_id": boot_id(), "engines": [*engines, *self._kept]})


def _newest(learned: Learned, spec: str) -> int | None:
    """In bytes."""
    found = learned.of(spec)
    return int(found[-1]) if found else None


def _written(record: EngineRecord) -> dict[str, object]:
    port = record.place.address.port
    found = {name: value for name, value in asdict(record).items() if value is not None}  # which TOML cannot say
    return found | ({} if port is None else {_PORT: port})


def _with_address(entry: object) -> object:
    """An entry; of an older daemon's, whose engines all listened on a port of this machine, the address is made up."""
    if isinstance(entry, dict) and "address" not in entry and isinstance(port := entry.get(_PORT), int):
        return entry | {"address": str(TcpAddress(HOST, port))}
    return entry


def _is_address_of(record: EngineRecord) -> bool:
    """A port, or the socket in its own folder."""
    try:
        address = parse_address(record.address)
    except ValueError:
        return False
    is_its_own = isinstance(address, TcpAddress) or address.path == f"{record.folder}/{SOCKET}"
    return is_its_own and str(address) == record.address


def _text_of(entry: object, key: str) -> str:
    """Of an entry; empty where it is not said, as in a record of an older daemon."""
    found = entry.get(key) if isinstance(entry, dict) else None
    return found if isinstance(found, str) else ""


def _shown(entry: object) -> str:
    """An entry without its secret."""
    return repr({key: one for key, one in entry.items() if key != "credential"} if isinstance(entry, dict) else entry)


def _invariants(record: EngineRecord) -> list[tuple[str, bool]]:
    """What holds of every record that a daemon writes, by field."""
    return [
        ("instance", _INSTANCE.fullmatch(record.instance) is not None),
        ("own_name", _WORD.fullmatch(record.own_name) is not None),
        ("credential", _WORD.fullmatch(record.credential) is not None),
        ("pid", 1 < record.pid <= PID_LIMIT),
        ("started", 0 < record.started < 2**63),
        ("address", _is_address_of(record)),
        ("log_start", record.log_start >= 0),
        ("started_at", _is_moment(record.started_at) or not (record.started_at or record.spec)),
        ("segments", all(_SEGMENT.fullmatch(path) and "/../" not in path for path in record.segments)),
        ("cgroup", not record.cgroup or _is_cgroup_of(record)),
        ("takes", all(0 <= size < 2**63 for size in record.takes.values())),
        ("share", 0 <= record.share <= 1),
        ("visible", record.visible is None or not any("\0" in name for name in record.visible)),
        ("asleep", 0 <= record.asleep <= 2),
        ("weights", 0 <= record.weights < 2**63),
        ("before_sleep", 0 <= (record.before_sleep or 0) < 2**63),
        ("lora", record.lora is None or min(astuple(record.lora)) > 0),
        ("canary", not record.canary or _is_canary(record.canary)),
    ]


def _is_canary(text: str) -> bool:
    try:
        parse_canary(text)
    except ValueError:
        return False
    return True


def _is_moment(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _is_engines_folder(folder: Path, scratch: Path) -> bool:
    """Whether it lies where some daemon makes engines' folders: in RUNTIME_DIRECTORY, which is below /run, or /tmp."""
    place = folder.parent
    is_there = place in {scratch, SCRATCH} or place.parts[:2] == ("/", "run")
    return is_there and ".." not in place.parts and scratch_folders.NAME.fullmatch(folder.name) is not None


def _is_cgroup_of(record: EngineRecord) -> bool:
    """By its name, which holds a part of the engine's: a later daemon, or a command, has another group of its own."""
    wanted = cgroup.name_of(file_name(record.instance), record.own_name)
    return cgroup.is_engines(record.cgroup) and Path(record.cgroup).name == wanted
