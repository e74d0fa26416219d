"""The JSON of what operators follow: requests, rates, happenings and the fleet as `GET /events?fleet=1` tells it.

As in `resources`: descriptions are written here and nowhere else, and OpenAPI is generated from them.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NotRequired, TypedDict

from pydantic import Field

from vllm_proxy.domain import keys
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.domain.resources import Change, KeyChange, Problem, Time

type RequestState = Literal["queued", "waiting", "streaming", "ended"]


class Request(TypedDict):
    """A request for inference, in progress or one of the last that have ended. No bodies, no keys."""

    id: Annotated[str, Field(description="Its `X-Request-Id`. Clients choose it, so several may have the same.")]
    engine_id: Annotated[str, Field(description="As its engine knows it; no other request has it.")]
    model: Annotated[str | None, Field(description="Null while that is not known.", examples=["chat"])]
    replica: int | None
    route: Annotated[str, Field(examples=["/v1/chat/completions"])]
    state: Annotated[
        RequestState,
        Field(
            description="`queued`: it has no instance yet, or its body is still to come; `waiting`: for the first byte "
            "of its answer; `streaming`: its answer comes."
        ),
    ]
    since: Annotated[Time, Field(description="When its head came.")]
    bytes: Annotated[int, Field(description="Of its answer's body, so far or in all.")]
    client: Annotated[str | None, Field(description="Its address; null at a Unix socket.", examples=["10.0.0.7"])]
    key: Annotated[str | None, Field(description="The name of its key.", examples=["ci"])]
    status: Annotated[int | None, Field(description="499: the client left before an answer began.")]
    code: Annotated[
        str | None, Field(description="Of the error of the daemon's own that it ended in.", examples=["engine_failed"])
    ]
    seconds: Annotated[float, Field(description="So far, or in all.")]
    queue_seconds: Annotated[float, Field(description="Of them, waiting for an instance.")]
    first_byte: Annotated[float | None, Field(description="Seconds until the first byte of its answer.")]
    retries: int
    prompt_tokens: Annotated[int | None, Field(description="As its answer says; null where it does not.")]
    completion_tokens: Annotated[int | None, Field(description="As its answer says; null where it does not.")]


class Requests(TypedDict):
    """What is in flight, and what was."""

    active: Annotated[list[Request], Field(description="In progress, the oldest first.")]
    recent: Annotated[list[Request], Field(description="That have ended, the last one first; 1,000 are kept.")]


class ModelRates(TypedDict):
    """The past of one model: a point for each step, the oldest first."""

    id: str
    rps: Annotated[list[float], Field(description="Requests that ended, a second.")]
    tps: Annotated[list[float], Field(description="Tokens generated, a second; 0 where its engines do not count them.")]


class Stats(TypedDict):
    """Rates of the models that had requests in that time."""

    step: Annotated[int, Field(description="Seconds from a point to the next.", examples=[10])]
    until: Annotated[Time, Field(description="When the last point was taken.")]
    models: list[ModelRates]


class Replica(TypedDict):
    """One replica in a `Brief`."""

    index: int
    state: State
    phase: Phase | None
    reason: Reason | None
    message: str | None
    progress: Annotated[float | None, Field(description="0 to 1, within the phase.")]
    left: Annotated[float | None, Field(description="Seconds until it is ready, as earlier starts went.")]
    pid: int | None
    port: int | None
    since: Annotated[Time | None, Field(description="When it was ready; null where it is not.")]
    restarts: int
    in_flight: int
    memory: Annotated[
        int | None,
        Field(description="Bytes of each of its devices where these are managed, else of its processes."),
    ]
    kv: Annotated[float | None, Field(description="How much of its KV cache is used, 0 to 1, as last seen.")]


class Brief(TypedDict):
    """A model in the event `fleet`: what a table of all models shows."""

    id: str
    state: State
    reason: Reason | None
    message: str | None
    change: Annotated[KeyChange | None, Field(description="As in `Status`.")]
    description: str
    aliases: Sequence[str]
    source: Annotated[str, Field(description="The key `model`.", examples=["Qwen/Qwen3-0.6B"])]
    start: str
    enabled: bool
    in_flight: int
    queued: int
    rps: Annotated[float, Field(description="Requests that ended, a second, over the last 10 s.")]
    tps: Annotated[float | None, Field(description="Tokens generated, a second; null where its engines tell none.")]
    replicas: list[Replica]


class FleetEvent(TypedDict):
    """Event `fleet`: all models first, then those that have changed, whole, at most twice a second."""

    models: list[Brief]
    gone: Annotated[list[str], Field(description="Models that there are no more.")]
    order: Annotated[list[str] | None, Field(description="All ids; null where the order has not changed.")]


class ConfigState(TypedDict):
    """Event `config` of `?fleet=1`: the file, at first and whenever one of these has changed."""

    revision: Annotated[str, Field(description="Of the file that is in force.")]
    problems: Annotated[
        list[Problem], Field(description="Why the file on disk is refused; empty where it is in force.")
    ]
    pending_restart: list[str]


class Happening(TypedDict):
    """Event `happened`: what became of an instance, of the file, or by hand. Up to 1,000 are kept."""

    id: Annotated[str, Field(description="Of this daemon's run, and a number.", examples=["3f2a9c1b-17"])]
    at: Time
    kind: Annotated[
        Literal["instance", "model", "accepted", "rejected", "write"],
        Field(
            description="`instance`: its state or its reason is another; `model`: that of the model alone; `accepted`, "
            "`rejected`: a file; `write`: somebody changed the file, or did something by hand."
        ),
    ]
    model: NotRequired[str]
    instance: NotRequired[Annotated[str | None, Field(examples=["chat/0"])]]
    state: NotRequired[State]
    phase: NotRequired[Phase | None]
    reason: NotRequired[Reason | None]
    message: NotRequired[str | None]
    revision: NotRequired[str]
    changes: NotRequired[list[Change]]
    keys: NotRequired[keys.KeyChanges]
    problems: NotRequired[list[Problem]]
    who: NotRequired[str]
    what: NotRequired[str]
    before: NotRequired[str]
    after: NotRequired[str]


class ResetEvent(TypedDict):
    """Event `reset`: what was asked for is not kept any more. All that is kept follows."""

    boot: Annotated[str, Field(description="Of this run of the daemon.", examples=["3f2a9c1b"])]
