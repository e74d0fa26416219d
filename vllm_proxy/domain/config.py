"""The schema of models.toml: frozen values, with every key, its type and its default.

The class of a key says what a change costs: in `EngineKeys` it replaces the engine, in a `Policy` it is live, but
for those that `plan` names (tests/domain/test_plan.py). The types of values are in
`value_types`; reading TOML and reporting problems are in `file/parse.py`.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_proxy.domain import listener, secrets
from vllm_proxy.domain.adapters import Adapter, Lora, Most, needed, shortfall
from vllm_proxy.domain.address import Address, TcpAddress
from vllm_proxy.domain.keys import Key, warnings
from vllm_proxy.domain.moderation import Moderation
from vllm_proxy.domain.toml import same
from vllm_proxy.domain.units import bytes_of
from vllm_proxy.domain.value_types import (
    AdapterPath,
    Aliases,
    Bytes,
    Command,
    Count,
    CountOrZero,
    DeviceNames,
    Dtype,
    Environment,
    Host,
    Hosts,
    Listen,
    LoraRank,
    MaxModelLen,
    Memory,
    MemoryOrPart,
    ModelName,
    NonEmptyText,
    Origins,
    Port,
    Reference,
    Seconds,
    Sleep,
    Text,
)

_NOTHING = object()

type TomlTable = Mapping[str, Any]  # a table as tomllib reads it: str, int, float, bool, dates, lists, tables


class Table(BaseModel):
    """A TOML table: no key but the known ones, no value of another type turned into the right one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    def __eq__(self, other: object) -> bool:
        """Whether both mean the same."""
        if type(self) is not type(other):
            return False
        theirs = other.__dict__  # not by pydantic's iterator: a change of the defaults compares hundreds at once
        return all(
            value is theirs.get(name, _NOTHING) or same(value, getattr(other, name))
            for name, value in self.__dict__.items()
        )

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


class EngineKeys(Table):
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


class EngineSpec(EngineKeys):
    """What an engine is started for: the engine keys, and what follows from others. Another one is another engine."""

    lora: Lora | None = None  # what it can hold of adapters; None: it takes none

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
    balance: Literal["prefix", "least-loaded"] = "prefix"  # where there is more than one instance
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


class AdapterTable(Table):
    """`[models.ID.adapters.NAME]`: a LoRA adapter. All of it live, where the engines have room for it."""

    path: AdapterPath
    description: Text = ""
    enabled: bool = True


class AdaptersMax(Table):
    """`[models.ID.adapters_max]`: the room that engines have for adapters, in the place of what is derived."""

    rank: LoraRank | None = None
    loras: Annotated[Count, Field(le=1024)] | None = None
    cpu_loras: Annotated[Count, Field(le=65536)] | None = None

    @property
    def most(self) -> Most:
        """What it means."""
        return Most(self.rank, self.loras, self.cpu_loras)


class ModelTable(Policy, EngineKeys):
    """`[models.ID]` with `[defaults]` merged in, as one flat table."""

    adapters: dict[str, AdapterTable] = {}
    adapters_max: AdaptersMax = AdaptersMax()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the file asks for one model."""

    id: str
    engine: EngineSpec
    policy: Policy
    written: TomlTable  # the keys as they stand in the file, defaults not merged in
    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # by id, in the file's order, disabled ones included
    adapters_max: Most = field(default_factory=Most)

    @property
    def lora(self) -> Lora | None:
        """What its engines are started with; None: they take no adapters."""
        return self.engine.lora

    def shortfall(self, running: Lora | None) -> str | None:
        """Why engines that were started with `running` cannot hold its adapters; None: they can."""
        return shortfall(running, self.adapters.values(), self.adapters_max)

    def with_ranks(self, before: "ModelSpec") -> "ModelSpec":
        """The same, with the ranks of adapters that were known before."""
        known = {name: one.rank for name, one in before.adapters.items()}
        paths = {name: one.path for name, one in before.adapters.items()}
        adapters = {
            name: replace(one, rank=known[name]) if one.rank is None and paths.get(name) == one.path else one
            for name, one in self.adapters.items()
        }
        return replace(self, adapters=adapters)

    def with_lora(self, running: Lora | None) -> "ModelSpec":
        """The same, for engines that run and were started with `running`: where that is enough, it stays."""
        lora = running if self.shortfall(running) is None else needed(self.adapters.values(), self.adapters_max)
        return self if lora == self.lora else replace(self, engine=self.engine.model_copy(update={"lora": lora}))

    @property
    def other_names(self) -> tuple[str, ...]:
        """What leads to it beside its id: its aliases, and the ids of its adapters."""
        return (*self.policy.aliases, *self.adapters)

    def effective(self) -> dict[str, Any]:
        """All keys flat, defaults merged in, durations in seconds; engine keys not given are None.

        Of adapters with what the engines can hold in the place of what the file says of that.
        """
        most = self.adapters_max if self.lora is None else self.lora
        return {
            **self.engine.model_dump(mode="json", exclude={"lora"}),
            **self.policy.model_dump(mode="json"),
            "adapters": {
                one.id: {"path": one.path, "description": one.description, "enabled": one.enabled}
                for one in self.adapters.values()
            },
            "adapters_max": asdict(most),
        }


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
    def ids(self) -> dict[str, tuple[str, ...]]:
        """What requests are counted for: the ids of models and of adapters, with the aliases of each."""
        adapters = (name for spec in self.models.values() for name in spec.adapters)
        return {name: spec.policy.aliases for name, spec in self.models.items()} | dict.fromkeys(adapters, ())

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

    def with_ranks(self, before: Mapping[str, ModelSpec]) -> "Config":
        """The same, with the ranks of adapters that were known before: where files are gone that engines hold still."""
        models = {
            name: spec.with_ranks(before[name]) if spec.adapters and name in before else spec
            for name, spec in self.models.items()
        }
        return replace(self, models=models)

    def with_loras(self, running: Mapping[str, Lora | None]) -> "Config":
        """The same, for models whose engines run: what they were started with stays where it is enough."""
        models = {name: spec.with_lora(running.get(name)) for name, spec in self.models.items()}
        return replace(self, models=models)

    def warnings(self, since: "Config | None" = None) -> list[str]:
        """What is valid, and dangerous or useless.

        `since`: but for what was so in this one already, and with what the way from there costs.
        """
        found = warnings(self.keys, self.ids, all_open=self.server.allow_remote_admin)
        if since is None:
            return found
        before = since.warnings()
        return [*(one for one in found if one not in before), *self._other_order(since), *self._open_again(since)]

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

    def _open_again(self, since: "Config") -> list[str]:
        """What it means that there were keys and are none."""
        if self.keys or not since.keys or self.server.allow_remote_admin:
            return []
        open_now = "on loopback whoever can connect may use the models and look (inference, read) without one"
        return [f"no key is left: {open_now}; every other address answers nobody"]

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
