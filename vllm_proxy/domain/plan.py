"""Computes what adopting a file would change: actions in order, each with its reason.

Only changes of meaning count: specs that mean the same cost nothing, however they are written, and an engine is
replaced only where its command line or environment changes (tests/domain/test_plan.py). `fleet/reconciler.py` follows
the plan. Also generates the table in docs/changes.md.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, get_args

from pydantic import BeforeValidator

from vllm_proxy.domain import adapters, secrets
from vllm_proxy.domain.config import Config, Devices, EngineKeys, ModelSpec, Policy, Restart, Server, Table
from vllm_proxy.domain.moderation import Moderation
from vllm_proxy.domain.secrets import show
from vllm_proxy.domain.toml import KeyPath, same
from vllm_proxy.domain.units import parse_duration, parse_size, show_duration, show_size

_LONGEST = 60  # characters of a value that is shown
_UNITS: Mapping[object, Callable[[Any], str]] = {parse_duration: show_duration, parse_size: show_size}
RESTART_KEYS = ("host", "port", "listen")  # of [server]: the sockets are open already
TLS_KEYS = ("tls_cert", "tls_key")  # of [server]: another file is live, TLS itself goes on or off with a restart
_OF_THEIR_OWN = {  # of the policy keys
    "enabled": "stops the model, or starts it",
    "replicas": "adds or removes instances at the end; the others stay",
    "start": "live; one that waits for a request is started by `always`, one that runs stays until its `idle_timeout`",
}
_OF_A_KIND = {"classes", "categories"}  # of [moderation]: what another kind makes others without a word in the file


class Kind(StrEnum):
    """What is done. The values are those of the REST API."""

    START = "start"
    REPLACE = "replace"
    UPDATE = "update"  # live: no engine notices
    SCALE = "scale"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Action:
    """One step. `to` is the model behind it, None where it is gone; `reason` is for people and holds no secret."""

    kind: Kind
    model: str
    reason: str
    to: ModelSpec | None

    @property
    def starts(self) -> bool:
        """Whether an engine is to come that was not there."""
        return self.kind in {Kind.START, Kind.REPLACE}


@dataclass(frozen=True, slots=True)
class Prospect:
    """What would become of a step on this machine."""

    place: tuple[str, ...] | None = None  # the devices of its engine; None: none needed, or it would have to wait
    misfit: str | None = None  # why its model can never run here


def plan(desired: Mapping[str, ModelSpec], running: Mapping[str, ModelSpec]) -> tuple[Action, ...]:
    """The actions that lead from `running`, the specs that were adopted, to `desired`.

    In order: what costs nothing, what gives room, what needs room. `written` is never compared. Engines that were
    started with enough room for adapters keep what they have.
    """
    steps = [step for spec in desired.values() for step in _of_one(running.get(spec.id), spec)]
    gone = [Action(Kind.STOP, name, "no longer in the file", None) for name in running if name not in desired]
    return tuple(sorted([*steps, *gone], key=lambda action: _rank(action, running)))


def restart_needed(before: Server, after: Server, *, address_is_given: bool = False) -> list[str]:
    """The keys of `[server]` that changed and take effect with the next start of the daemon.

    `address_is_given`: not by the file, which therefore changes nothing of it.
    """
    changed = [key for key in RESTART_KEYS if getattr(before, key) != getattr(after, key) and not address_is_given]
    switched = [key for key in TLS_KEYS if (getattr(before, key) is None) != (getattr(after, key) is None)]
    return [f"server.{key}" for key in (*changed, *switched)]


def settings(before: Config, after: Config, waiting: Collection[str] = ()) -> list[str]:
    """Each key outside models and `[keys]` whose change is followed at once, as "server.usage false -> true".

    `waiting`: keys whose change waits for a restart, as `restart_needed` has them.
    """
    later = {*RESTART_KEYS, *(key.removeprefix("server.") for key in waiting)}
    return [
        *_changes(before.server, after.server, ("server",), later),
        *_changes(before.engine, after.engine, ("engine",)),
        *_changes(before.devices, after.devices, ("devices",)),
        *_of_moderation(before.moderation, after.moderation),
    ]


def _of_moderation(before: Moderation | None, after: Moderation | None) -> Iterator[str]:
    is_another = before is None or after is None or before.kind != after.kind
    for key in (field.name for field in fields(Moderation)):
        if is_another and key in _OF_A_KIND:
            continue
        old, new = getattr(before, key, None), getattr(after, key, None)
        yield from _of_a_value(("moderation", key), old, new)


def _of_one(old: ModelSpec | None, new: ModelSpec) -> Iterator[Action]:
    if old is None:
        yield _first(new)
        return
    new = new.with_lora(old.lora if old.policy.enabled else None)
    if old.policy.enabled != new.policy.enabled:
        kind, reason = (Kind.START, "enabled") if new.policy.enabled else (Kind.STOP, "disabled")
        yield Action(kind, new.id, reason, new)
        return
    if not new.policy.enabled:
        if changes := [*_changes(old.engine, new.engine), *_changes(old.policy, new.policy), *_of_adapters(old, new)]:
            yield Action(Kind.UPDATE, new.id, ", ".join(changes), new)
        return
    now = replace(new, engine=old.engine, policy=_with_replicas(new.policy, old.policy.replicas))
    of_adapters, lacks = list(_of_adapters(old, new)), new.shortfall(old.lora)
    if changes := [*_changes(old.policy, now.policy), *(of_adapters if lacks is None else ())]:
        yield Action(Kind.UPDATE, new.id, ", ".join(changes), now)
    grows = new.policy.replicas > old.policy.replicas
    scaled = f"replicas {old.policy.replicas} -> {new.policy.replicas}"
    if new.policy.replicas < old.policy.replicas:
        now = replace(now, policy=new.policy)
        yield Action(Kind.SCALE, new.id, scaled, now)
    if changes := [*(() if lacks is None else (*of_adapters, lacks)), *_changes(old.engine, new.engine)]:
        now = replace(now, engine=new.engine)
        yield Action(Kind.REPLACE, new.id, ", ".join(changes), now)
    if grows:
        yield Action(Kind.SCALE, new.id, scaled, new)


def _of_adapters(old: ModelSpec, new: ModelSpec) -> Iterator[str]:
    """Of adapters: live, where engines have room for them."""
    yield from adapters.changes(old.adapters, new.adapters)
    if old.adapters_max != new.adapters_max and (old.lora == new.lora or not new.policy.enabled):
        yield "adapters_max changed"  # else it is the reason for a replacement, or for none


def _first(new: ModelSpec) -> Action:
    if not new.policy.enabled:
        return Action(Kind.UPDATE, new.id, "new, disabled", new)
    later = {"always": "", "warm": "; it runs while nobody else wants the room"}
    return Action(Kind.START, new.id, f"new{later.get(new.policy.start, '; its first request starts it')}", new)


def _with_replicas(policy: Policy, replicas: int) -> Policy:
    return policy.model_copy(update={"replicas": replicas})


def _rank(action: Action, running: Mapping[str, ModelSpec]) -> int:
    if action.kind is Kind.SCALE and action.to is not None:
        shrinks = action.to.policy.replicas < running[action.model].policy.replicas
        return 2 if shrinks else 4
    return {Kind.UPDATE: 0, Kind.STOP: 1, Kind.SCALE: 2, Kind.REPLACE: 3, Kind.START: 5}[action.kind]


def _changes(old: Table, new: Table, at: KeyPath = (), but: Collection[str] = ("lora",)) -> Iterator[str]:
    """Each key that differs, as "max_model_len 4096 -> 8192".

    `at`: where the table stands; `but`: keys that are told otherwise (`lora` follows from others).
    """
    for key, field in type(new).model_fields.items():
        before, after = getattr(old, key), getattr(new, key)
        if key in but:
            continue
        if isinstance(before, Restart) and isinstance(after, Restart):
            yield from _changes(before, after, (*at, key))
        else:
            inner = getattr(get_args(field.annotation)[-1], "__metadata__", ()) if isinstance(after, Mapping) else ()
            yield from _of_a_value((*at, key), before, after, _shown_as([*field.metadata, *inner]))


def _of_a_value(path: KeyPath, before: object, after: object, shown: Callable[[Any], str] = show) -> Iterator[str]:
    """Of one key, or of each in it, where it is a table."""
    if same(before, after):
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            if not same(before.get(name), after.get(name)):
                yield _change((*path, name), before.get(name), after.get(name), shown)
    else:
        yield _change(path, before, after, shown)


def _change(path: KeyPath, before: object, after: object, shown: Callable[[Any], str] = show) -> str:
    """A value that is a secret is not shown, nor is that one became another; what names a file is."""
    old, new = (secrets.form(value, path) for value in (before, after))
    key = ".".join(path)
    if secrets.HIDDEN in (old, new) or same(old, new):
        return f"{key} changed"
    return f"{key} {_short(old, shown)} -> {_short(new, shown)}"


def _shown_as(marks: Iterable[object]) -> Callable[[Any], str]:
    """How people write the values of a key with these marks at its type."""
    read = (mark.func for mark in marks if isinstance(mark, BeforeValidator))
    return next((_UNITS[function] for function in read if function in _UNITS), show)


def _short(value: Any, shown: Callable[[Any], str]) -> str:  # noqa: ANN401 - a TOML value
    if value is None:
        return "not given"
    text = shown(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def table() -> str:
    """What a change of each key costs, for docs/changes.md. The keys come from the types: a new one is in its row."""
    live = [key for key in Policy.model_fields if key not in _OF_THEIR_OWN]
    server = [key for key in Server.model_fields if key not in (*RESTART_KEYS, *TLS_KEYS, "fair")]
    rows = [
        (EngineKeys.model_fields, "replaces the engines of this model, as `replace` says"),
        (
            ("adapters",),
            "live where engines have room; a model's first, a larger rank and more than fit replace its engines",
        ),
        (("adapters_max",), "replaces the engines that were started with something else"),
        (live, "live: no engine notices"),
        *(((key,), effect) for key, effect in _OF_THEIR_OWN.items()),
        (("[models.ID]",), "a new id is a start, one that is gone a stop, another id a stop and a start"),
        (("[keys.NAME]",), "live: the next request obeys, and streams end that their key may not have any more"),
        (
            ("[keys.NAME]", "server.fair"),
            "with limits, or true: the first and the last replace all [engines](limits.md#how-keys-share-an-engine)",
        ),
        (
            ("[moderation]",),
            "live, as is another `config.json` that its classes come from: the next request is checked so",
        ),
        (("[defaults]",), "as the same key in each model that does not say otherwise"),
        (("engine.command", "engine.env"), "replaces the engines of each model that takes its own from there"),
        (("engine.port_start", "engine.port_end"), "live, for engines that are started from now on"),
        ([f"devices.{key}" for key in Devices.model_fields], "live: what runs stays where it is"),
        ([f"server.{key}" for key in server], "live"),
        ([f"server.{key}" for key in RESTART_KEYS], "the next start of the daemon: `/health` lists `pending_restart`"),
        (
            [f"server.{key}" for key in TLS_KEYS],
            "live, as is another content of the files; TLS goes on or off with the next start of the daemon",
        ),
        ((), "comments, order, layout, a default written out, `a_b` for `a-b` in `args`: nothing"),
    ]
    lines = [f"| {' '.join(f'`{key}`' for key in keys)} | {effect} |" for keys, effect in rows]
    return "\n".join(["| key | a change |", "|---|---|", *lines])
