"""The schema of models.toml: frozen values, with every key, its type and its default.

The class of a key says what a change costs: in an `EngineSpec` it replaces the engine, in a `Policy` it is live, but
for those that `plan` names (tests/domain/test_plan.py). Reading TOML and reporting problems are in `file/parse.py`.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from vllm_proxy.domain import hosts, listener, references, secrets
from vllm_proxy.domain.adapters import Adapter, Lora
from vllm_proxy.domain.address import Address, TcpAddress
from vllm_proxy.domain.keys import Key, warnings
from vllm_proxy.domain.moderation import Moderation
from vllm_proxy.domain.secrets import show
from vllm_proxy.domain.toml import same
from vllm_proxy.domain.units import Bytes, BytesOrPercent, Seconds, bytes_of

type TomlTable = Mapping[str, Any]  # a table as tomllib reads it: str, int, float, bool, dates, lists, tables

_MAX_MODEL_LEN = re.compile(r"auto|\d+(\.\d+)?[kKmMgG]?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # shells drop others from the environment
_ID = re.compile(r"[A-Za-z0-9._:@/-]{1,200}")
_USER = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#]*@", re.IGNORECASE)
_LEAST_MEMORY = 2**20  # bytes; less is meant as another unit
_ACTIONS = frozenset({"start", "stop", "restart", "sleep", "wake", "logs"})


def id_problem(model_id: str) -> str | None:
    """Why no model can be called so."""
    segments = model_id.split("/")
    if not _ID.fullmatch(model_id):
        return "expected an id of 1 to 200 letters, digits and . _ : @ / -"
    if model_id.startswith("-"):
        return "expected an id that does not begin with -, which vLLM would take for an option"
    if {"", ".", ".."} & set(segments):
        return 'expected an id with no empty, "." or ".." part between its slashes'
    if segments[-1] in _ACTIONS:
        return f"an id may not end in {show(segments[-1])}, which is an action of the REST API"
    return None


def _alias(text: str) -> str:
    if problem := id_problem(text):
        msg = f"{show(text)}: {problem}"
        raise ValueError(msg)
    return text


def _model_name(text: str) -> str:
    if text.startswith("-"):
        msg = f"expected a model, got {show(text)}, which vLLM would take for an option"
        raise ValueError(msg)
    if _USER.match(text):
        raise ValueError("expected a URL without a user or a password in it, which `ps` would show")
    return text


def _no_nul(text: str) -> str:
    if "\0" in text:
        msg = "expected text without NUL characters, which no command line or environment can hold"
        raise ValueError(msg)
    return text


def _max_model_len(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, str) and _MAX_MODEL_LEN.fullmatch(value):
        return value
    msg = f'expected a number of tokens such as 8192, "8k" or "auto", got {show(value)}'
    raise ValueError(msg)


def _sleep(value: object) -> object:
    """pydantic's literals would take `true` and 1.0 for 1."""
    if type(value) is int and value in {0, 1, 2}:
        return value
    msg = f"expected one of 0, 1, 2, got {show(value)}"
    raise ValueError(msg)


def _memory_or_part(size: int | str) -> int | str:
    if isinstance(size, int) and 0 < size < _LEAST_MEMORY:
        msg = f'expected a size such as "64GiB", or a percentage such as "50%", got {show(size)} bytes'
        raise ValueError(msg)
    return size


def _level(sleep: Literal[0, 1, 2]) -> Literal[0, 1, 2] | None:
    """0 is how a model takes back what the defaults say."""
    return sleep or None


def _device(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and value and not set(value) & set(", \0"):
        return value
    msg = f"expected a GPU index or UUID, got {show(value)}"
    raise ValueError(msg)


def _each_once(devices: tuple[int | str, ...]) -> tuple[int | str, ...]:
    if len({str(device) for device in devices}) < len(devices):
        msg = "expected each device once"
        raise ValueError(msg)
    return devices


def _env_name(name: str) -> str:
    if not _ENV_NAME.fullmatch(name):
        msg = f"cannot name an environment variable {show(secrets.shown_name(name))}"
        raise ValueError(msg)
    return name


def _env_value(value: object) -> object:
    """Numbers are accepted, since people write `OMP_NUM_THREADS = 1`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return _no_nul(value)
    if secrets.is_reference(value):
        references.reference(secrets.reference_of(value))
        return value
    got = "another table" if isinstance(value, Mapping) else show(value, ("env",))
    expected = 'a string, { file = "..." } or { credential = "..." }' if isinstance(value, Mapping) else "a string"
    msg = f"expected {expected}, got {got}"
    raise ValueError(msg)


def _memory(size: int) -> int:
    if 0 < size < _LEAST_MEMORY:
        msg = f'expected a size such as "20GiB", or 0 for none, got {show(size)} bytes'
        raise ValueError(msg)
    return size


Text = Annotated[str, AfterValidator(_no_nul)]
NonEmptyText = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
MaxModelLen = Annotated[int | str, BeforeValidator(_max_model_len)]
Sleep = Annotated[Literal[0, 1, 2], BeforeValidator(_sleep), AfterValidator(_level)]
Device = Annotated[int | str, BeforeValidator(_device)]
DeviceNames = Annotated[tuple[Device, ...], Strict(strict=False), AfterValidator(_each_once)]
ModelName = Annotated[NonEmptyText, AfterValidator(_model_name)]
Aliases = Annotated[tuple[Annotated[str, AfterValidator(_alias)], ...], Strict(strict=False)]
Host = Annotated[NonEmptyText, AfterValidator(hosts.host)]
Hosts = Annotated[tuple[Host, ...], Strict(strict=False)]
Origins = Annotated[tuple[Annotated[NonEmptyText, AfterValidator(hosts.origin)], ...], Strict(strict=False)]
Reference = Annotated[str, AfterValidator(references.reference)]
Listen = Annotated[
    tuple[Annotated[NonEmptyText, AfterValidator(listener.listen_address)], ...],
    Strict(strict=False),
    Field(min_length=1),
    AfterValidator(listener.each_once),
]
Memory = Annotated[Bytes, AfterValidator(_memory)]
MemoryOrPart = Annotated[BytesOrPercent, AfterValidator(_memory_or_part)]
Command = Annotated[tuple[NonEmptyText, ...], Strict(strict=False), Field(min_length=1)]
EnvValue = Annotated[str | dict[str, str], BeforeValidator(_env_value)]  # a table names where the value stands
Environment = dict[Annotated[str, AfterValidator(_env_name)], EnvValue]
Dtype = Literal["auto", "half", "float16", "bfloat16", "float", "float32"]


class Table(BaseModel):
    """A TOML table: no key but the known ones, no value of another type turned into the right one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    def __eq__(self, other: object) -> bool:
        """Whether both mean the same."""
        return type(self) is type(other) and all(same(value, getattr(other, name)) for name, value in self)

    __hash__ = None  # type: ignore[assignment]  # tables hold dicts


class Server(Table):
    """`[server]`: how the daemon itself listens and behaves. All of it live, `host` and `port` aside."""

    host: Host = "127.0.0.1"
    port: Port = 8000
    listen: Listen = ()  # not given: host and port
    tls_cert: Reference | None = None
    tls_key: Reference | None = None
    keys_file: Reference | None = None
    cors_origins: Origins = ()
    allowed_hosts: Hosts = ()
    allow_remote_admin: bool = False
    max_body_size: Bytes = 64 * 2**20
    max_buffered: Annotated[Bytes, Field(ge=1)] = 2**30
    max_connections: CountOrZero = 0
    head_timeout: Seconds = 30.0
    body_timeout: Seconds = 60.0
    shutdown_timeout: Seconds = 30.0
    usage: bool = False
    fair: bool = False
    on_exit: Literal["stop", "keep"] = "stop"

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where clients come in. The path of a Unix socket may be a relative one, from the folder of the file."""
        return listener.addresses(self.listen, self.host, self.port)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names and addresses that are listened on, as the file spells them."""
        return tuple(address.host for address in self.addresses if isinstance(address, TcpAddress))


class Devices(Table):
    """`[devices]`: what engines may have of the devices, and when one gives way to another. All of it live."""

    source: NonEmptyText = "auto"  # auto, none, cpu, or a file with {name = {total = ..., free = ...}}
    reserve: Memory = 512 * 2**20  # of each device
    max_wait: Seconds = 30.0
    min_residency: Seconds = 10.0
    limit: dict[NonEmptyText, Memory] = {}  # by index or UUID
    host_memory: MemoryOrPart = "50%"  # of the machine's, for engines that sleep and those that have slept

    def host_bytes(self, total: int) -> int:
        """What `host_memory` is on a machine with `total` bytes."""
        return bytes_of(self.host_memory, total)


class EngineDefaults(Table):
    """`[engine]`: how vLLM is started. `command` and `env` count as engine keys of every model."""

    command: Command | None = None
    port_start: Port = 8001
    port_end: Port = 8899
    env: Environment = {}


class Restart(Table):
    """`[models.ID.restart]`: what happens after an engine died by itself."""

    max_failures: Count = 5
    backoff: Seconds = 1.0
    max_backoff: Seconds = 60.0


class EngineSpec(Table):
    """The engine keys: on vLLM's command line or in its environment, so a change replaces the engine.

    None is "not given": vLLM decides.
    """

    model: ModelName
    tensor_parallel_size: Count | None = None
    pipeline_parallel_size: Count | None = None
    max_model_len: MaxModelLen | None = None
    dtype: Dtype | None = None
    quantization: NonEmptyText | None = None
    trust_remote_code: bool | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    memory: Memory | None = None  # of each of its devices, in the place of gpu_memory_utilization; 0: it uses none
    max_num_seqs: Count | None = None
    sleep: Sleep | None = None  # vLLM's level, of an engine that may sleep in the place of being stopped
    devices: DeviceNames | None = None
    command: Command | None = None
    env: Environment = {}
    args: dict[str, Any] = {}  # names in kebab-case; checked by args.py

    @property
    def variables(self) -> dict[str, str]:
        """Those of `env` whose values stand in the file."""
        return {name: value for name, value in self.env.items() if isinstance(value, str)}

    @property
    def references(self) -> dict[str, str]:
        """Those of `env` whose values stand elsewhere, and where: as `domain/references.py` has it."""
        return {name: secrets.reference_of(value) for name, value in self.env.items() if isinstance(value, dict)}


class Policy(Table):
    """The policy keys: the daemon's own. A change is live and no engine notices, but for `plan._OF_THEIR_OWN`."""

    description: Text = ""
    metadata: dict[str, Any] = {}
    aliases: Aliases = ()
    enabled: bool = True
    replicas: Count = 1
    start: Literal["always", "warm", "on-demand"] = "always"
    priority: int = 0
    yield_timeout: Seconds = 5 * 60.0
    idle_timeout: Seconds = 15 * 60.0
    startup_timeout: Seconds = 10 * 60.0
    drain_timeout: Seconds = 60.0
    stop_timeout: Seconds = 30.0
    stall_timeout: Seconds = 5 * 60.0
    replace: Literal["auto", "surge", "drain"] = "auto"
    request_timeout: Seconds = 0.0
    max_in_flight: CountOrZero = 0
    queue_size: CountOrZero = 512
    queue_timeout: Seconds = 10 * 60.0
    moderate: bool = False
    restart: Restart = Restart()


class ModelTable(Policy, EngineSpec):
    """`[models.ID]` with `[defaults]` merged in, as one flat table."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the file asks for one model."""

    id: str
    engine: EngineSpec
    policy: Policy
    written: TomlTable  # the keys as they stand in the file, defaults not merged in
    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # by id, in the file's order, disabled ones included
    lora: Lora | None = None  # what its engines are started with; None: they take no adapters

    def effective(self) -> dict[str, Any]:
        """All keys flat, defaults merged in, durations in seconds; engine keys not given are None."""
        return {**self.engine.model_dump(mode="json"), **self.policy.model_dump(mode="json")}


@dataclass(frozen=True, slots=True)
class Config:
    """A whole valid file."""

    revision: str  # hash of the file's bytes
    server: Server
    engine: EngineDefaults
    models: Mapping[str, ModelSpec]  # in the file's order
    keys: Mapping[str, Key] = field(default_factory=dict)  # those of the environment included
    attached: Mapping[str, str] = field(default_factory=dict)  # reference -> revision of the file, in reading order
    devices: Devices = field(default_factory=Devices)
    moderation: Moderation | None = None

    @property
    def fingerprint(self) -> str:
        """Of everything that was read: the file, and the files that it names."""
        return fingerprint([self.revision, *self.attached.values()])

    @property
    def is_fair(self) -> bool:
        """Whether engines take requests in the order of `domain/fair.py`, and not as they come."""
        return self.fair_by is not None

    @property
    def fair_by(self) -> str | None:
        """What they do so for: `server.fair`, or the first key that wants it, a revoked one too; None: nothing."""
        if self.server.fair:
            return "server.fair"
        return next((f"[keys.{key.name}]" for key in self.keys.values() if key.limits.wants_fairness), None)

    def warnings(self, since: "Config | None" = None) -> list[str]:
        """What is valid, and dangerous or useless.

        `since`: but for what was so in this one already, and with what the way from there costs.
        """
        models = {name: spec.policy.aliases for name, spec in self.models.items()}
        found = warnings(self.keys, models, all_open=self.server.allow_remote_admin)
        if since is None:
            return found
        before = since.warnings()
        return [*(one for one in found if one not in before), *self._other_order(since)]

    def _other_order(self, since: "Config") -> list[str]:
        """What it costs that engines take requests in another order than they did."""
        if self.is_fair == since.is_fair:
            return []
        what = (
            f"because of {self.fair_by} engines take requests in the order of their keys from now on"
            if self.is_fair
            else f"engines take requests as they come from now on, as {since.fair_by} asks for no order any more"
        )
        return [f"{what}: all whose args have no scheduling-policy are replaced"]

    @property
    def keys_revision(self) -> str:
        """Of what keys are written in: the file, and `server.keys_file` where there is one."""
        name = self.server.keys_file
        return self.revision if name is None else fingerprint([self.revision, self.attached.get(name, "")])


def revision_of(data: bytes) -> str:
    """The revision of a file: a hash of its bytes, the ETag without its quotes."""
    return hashlib.sha256(data).hexdigest()[:16]


def fingerprint(revisions: Iterable[str]) -> str:
    """Of several files together; of one, its revision."""
    first, *rest = revisions
    return revision_of(":".join([first, *rest]).encode()) if rest else first
