"""The JSON of the API as types: handlers return them, commands read them, and OpenAPI is generated from them.

Descriptions are written here and nowhere else. A new field comes here first; the type checker then says who must
provide it.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from pydantic import Field

from vllm_proxy import errors
from vllm_proxy.domain import keys
from vllm_proxy.domain.device_resources import DevicesHealth
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.domain.plan import Action, Kind, Prospect
from vllm_proxy.domain.usage_resources import DiskHealth

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class LastExit(TypedDict):
    """How the instance's last engine ended."""

    reason: Reason | None
    message: str | None
    code: Annotated[int | None, Field(description="Exit status; null where it cannot be known.")]
    signal: int | None
    at: Time
    log_tail: Annotated[list[str], Field(description="Its last lines, 20 at most.")]


class Instance(TypedDict):
    """One replica of a model; engines come and go in it."""

    index: int
    state: State
    reason: Reason | None
    message: Annotated[str | None, Field(description="Why; of a ready one also where its output is not kept on disk.")]
    pid: int | None
    port: Annotated[int | None, Field(description="On 127.0.0.1; null where it listens at a Unix socket.")]
    revision: Annotated[
        str | None, Field(description="Of what its engine was started with: compare it with the model's. Null without.")
    ]
    phase: Annotated[Phase | None, Field(description="How far it is within its state.")]
    progress: Annotated[float | None, Field(ge=0, le=1, description="Within the phase.")]
    ready_in_seconds: Annotated[float | None, Field(description="A guess, from earlier starts.")]
    started_at: Time | None
    ready_at: Time | None
    restarts: int
    in_flight: int
    devices: Annotated[
        list[str],
        Field(description="Those that its engine has: the index of a GPU, else the id of a device.", examples=[["0"]]),
    ]
    memory_bytes: Annotated[
        int | None,
        Field(
            description="Of each of its devices that it counts for, its context included; of several the most. Null "
            "where devices are not managed, or it has none."
        ),
    ]
    sleep: Annotated[
        str | None, Field(description="`level 1`, `level 2`; `off: ` and why it does not. Null where it may not.")
    ]
    last_exit: LastExit | None


class Room(TypedDict):
    """For what a model waits, of which nothing serves or loads."""

    needs: Annotated[
        int | None,
        Field(
            description="Bytes of each device, the context of its engine included; of several the most. Null where "
            "devices are not managed."
        ),
    ]
    waits_for: Annotated[
        list[str],
        Field(description="Instances in its way: they load, leave, or are to give way.", examples=[["chat/0"]]),
    ]
    behind: Annotated[list[str], Field(description="Instances that wait too, and whose turn is before its own.")]


class AdapterStatus(TypedDict):
    """One adapter that is enabled."""

    id: Annotated[str, Field(examples=["support"])]
    state: Annotated[
        Literal["loading", "ready", "error"],
        Field(description="`loading`: no instance holds it yet, as where none runs; its requests wait."),
    ]
    message: Annotated[
        str | None,
        Field(description="Why it is in error, as vLLM says it; of a ready one, what failed of it all the same."),
    ]
    instances: Annotated[list[int], Field(description="Those that hold it, and serve its requests.")]


class KeyChange(TypedDict):
    """A key of a model, and a value that vLLM itself names, or that follows from what it said."""

    key: Annotated[str, Field(examples=["max_model_len"])]
    value: Annotated[int | float | str, Field(examples=[4096])]


class Status(TypedDict):
    """What is. A model is as good as its best instance."""

    state: State
    revision: Annotated[
        str, Field(description="Of the keys that engines are started with, as the file has them. Others are live.")
    ]
    reason: Reason | None
    message: str | None
    change: Annotated[
        KeyChange | None,
        Field(description="What would mend it, where that is known: its last start would not have failed so."),
    ]
    created_at: Time
    updated_at: Time
    in_flight: int
    queued: int
    room: Annotated[Room | None, Field(description="Null where it does not wait for room; `message` says why it does.")]
    adapters: Annotated[
        list[AdapterStatus],
        Field(description="What was removed stays in an engine's memory until others take its place."),
    ]
    instances: list[Instance]


class Model(TypedDict):
    """A model: what the file asks for, and what is."""

    id: Annotated[str, Field(examples=["chat"])]
    spec: Annotated[
        Mapping[str, Any],
        Field(description="The keys as written in the file.", examples=[{"model": "Qwen/Qwen3-0.6B"}]),
    ]
    effective: dict[str, Any]
    status: Status


class Models(TypedDict):
    """All models of the file, in its order."""

    revision: Annotated[str, Field(description="Of the file; `ETag` quotes it.")]
    models: list[Model]


class Change(TypedDict):
    """One step from what runs to what the file asks for."""

    model: str
    action: Kind
    reason: Annotated[str, Field(examples=["max_model_len 4096 -> 8192"])]
    place: NotRequired[
        Annotated[
            list[str] | None,
            Field(
                description="In a plan, of a start or a replacement that fits this machine: the devices that one more "
                "engine would get as things are; null where it would wait for room, or nobody manages devices.",
                examples=[["0"]],
            ),
        ]
    ]
    misfit: NotRequired[
        Annotated[str, Field(description="In a plan: why the model can never run on this machine, with the sum.")]
    ]


class _Changes(TypedDict):
    changes: list[Change]
    keys: keys.KeyChanges
    settings: Annotated[list[str], Field(description="Other live keys that change, with their values: no secrets.")]
    warnings: Annotated[list[str], Field(description="What of it is dangerous or useless, and what else it costs.")]


class Plan(_Changes):
    """What applying a file would do."""

    pending_restart: Annotated[list[str], Field(description="Keys that would wait for a restart of the daemon.")]


class Applied(_Changes):
    """What adopting a file does."""

    revision: str


class ConfigHealth(TypedDict):
    """The file, as the daemon sees it."""

    file: Annotated[str, Field(description="Its path.")]
    sockets_are_given: Annotated[
        bool,
        Field(description="Whether systemd holds the sockets: `server.host`, `port` and `listen` then have no effect."),
    ]
    revision: Annotated[str, Field(description="Of the file that is in force.")]
    error: Annotated[str | None, Field(description="Why the file on disk was refused; null where it is in force.")]
    certificate_error: Annotated[
        str | None, Field(description="Why the certificate on disk is not in force; null where it is, or without TLS.")
    ]
    pending_restart: Annotated[list[str], Field(description="Keys whose change waits for a restart of the daemon.")]


class Health(TypedDict):
    """The daemon lives."""

    status: Literal["ok"]
    version: str
    models: Annotated[dict[str, int], Field(description="How many models are in each state.")]
    error: Annotated[
        bool,
        Field(
            description="Whether the file or the certificate is refused, an engine could not be ended, the devices "
            "cannot be measured, or what keys use, or the record of engines, cannot be written to disk."
        ),
    ]
    not_ended: NotRequired[
        Annotated[list[str], Field(description="Instances whose engines live on. For who may read.")]
    ]
    devices: NotRequired[Annotated[DevicesHealth, Field(description="For who may read.")]]
    usage: NotRequired[Annotated[DiskHealth, Field(description="For who may read.")]]
    state: NotRequired[Annotated[DiskHealth, Field(description="For who may read.")]]
    config: NotRequired[Annotated[ConfigHealth, Field(description="The file. For who may read.")]]
    control_socket: NotRequired[Annotated[str, Field(description="Its path. For who may read.")]]


class Ready(TypedDict):
    """Whether every enabled model with `start = "always"` is ready that nobody stopped or put to sleep by hand."""

    status: Literal["ready", "waiting"]
    not_ready: Annotated[dict[str, State], Field(description="The models that are not, with their states.")]


class Version(TypedDict):
    """Of vLLM, under the name that it has there; and of this daemon."""

    version: Annotated[str, Field(description="Of the vLLM that models run, several with commas; empty: not known.")]
    vllm_proxy: str


class Root(TypedDict):
    """What this is."""

    name: Literal["vllm-proxy"]
    version: str
    endpoints: Annotated[list[str], Field(examples=[["GET /models"]])]


_TASKS = "What it can, by vLLM's names, as a ready engine of it says: `generate`, `embed`, `classify`, `score`, \
`transcription`. Missing where none is ready, and where it does not say."


class Card(TypedDict):
    """A model as the OpenAI API lists it; adapters and aliases have cards of their own."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["vllm-proxy"]
    root: str
    parent: Annotated[str | None, Field(description="The id that this is an alias of, or an adapter.")]
    max_model_len: int | None
    tasks: NotRequired[Annotated[list[str], Field(description=_TASKS, examples=[["generate"]])]]


class Cards(TypedDict):
    """Every enabled model, adapter and alias, whatever its state."""

    object: Literal["list"]
    data: list[Card]


class InstanceState(TypedDict):
    """What an event says of one replica."""

    index: int
    state: State
    phase: Phase | None
    reason: Reason | None


class ModelEvent(TypedDict):
    """Event `model`: the state, the reason or the phase of a model, of an adapter or of an instance of it changed."""

    id: str
    state: State
    reason: Reason | None
    message: str | None
    adapters: list[AdapterStatus]
    instances: list[InstanceState]


class ConfigAccepted(TypedDict):
    """Event `config`: a file was adopted."""

    result: Literal["accepted"]
    revision: str
    keys: keys.KeyChanges


class WriteEvent(TypedDict):
    """Event `write`: somebody changed the file, or commanded a model by hand."""

    who: Annotated[str, Field(examples=["key ci", "uid 1000", "anonymous"])]
    what: Annotated[str, Field(examples=["PATCH /models/chat"])]
    before: Annotated[str, Field(description="The revision.")]
    after: Annotated[str, Field(description="The revision; the same where nothing in the file has changed.")]


class ConfigRejected(TypedDict):
    """Event `config`: a file was refused; what ran goes on."""

    result: Literal["rejected"]
    problems: list["Problem"]


class PlanEvent(TypedDict):
    """Event `plan`: what an adopted file changes."""

    revision: str
    changes: list[Change]


class Problem(TypedDict):
    """One thing wrong with a configuration."""

    path: Annotated[str, Field(examples=["models.chat.replicas"])]
    line: Annotated[int, Field(description="From 1; 0 where it cannot be known.")]
    message: str
    file: NotRequired[Annotated[str, Field(description="Where it is in another file: the one of server.keys_file.")]]


type ErrorType = Literal["invalid_request_error", "server_error", "requests", "tokens", "insufficient_quota"]


class ErrorBody(TypedDict):
    """What went wrong."""

    message: Annotated[str, Field(description="For people: cannot X: why.")]
    type: ErrorType
    param: str | None
    code: Annotated[str, Field(description="Stable; the answers of each route list theirs.")]
    problems: NotRequired[
        Annotated[list[Problem], Field(description="With `invalid_model`, `invalid_key`, `invalid_config`: all.")]
    ]


class Error(TypedDict):
    """An error, in the envelope of the OpenAI API."""

    error: ErrorBody


class AnthropicErrorBody(TypedDict):
    """What went wrong, on `/v1/messages`."""

    type: Annotated[str, Field(description="One of Anthropic's API, such as `not_found_error`.")]
    message: Annotated[str, Field(description="For people: cannot X: why.")]
    code: Annotated[str, Field(description="Stable; the answers of each route list theirs.")]


class AnthropicError(TypedDict):
    """An error, in the envelope of Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorBody


def changes_of(actions: Iterable[Action], misfits: Mapping[str, str] = MappingProxyType({})) -> list[Change]:
    """A plan. `misfits`: why models can never run on this machine, where that is known."""
    return [_change(action, misfits.get(action.model)) for action in actions]


def prospective(actions: Sequence[Action], prospects: Sequence[Prospect]) -> list[Change]:
    """A plan, with what would become of each step."""
    changes = []
    for action, prospect in zip(actions, prospects, strict=True):
        change = _change(action, prospect.misfit)
        if action.starts and prospect.misfit is None:
            change["place"] = None if prospect.place is None else list(prospect.place)
        changes.append(change)
    return changes


def _change(action: Action, misfit: str | None) -> Change:
    change: Change = {"model": action.model, "action": action.kind, "reason": action.reason}
    if misfit is not None:
        change["misfit"] = misfit
    return change


def problems_of(problems: Iterable[errors.Problem]) -> list[Problem]:
    """All that is wrong with a configuration."""
    return [cast("Problem", errors.as_json(item)) for item in problems]
