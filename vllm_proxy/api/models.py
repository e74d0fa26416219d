"""`/models`, `/`, `/health`, `/ready`: models and the daemon as JSON, and what is done to models by hand.

Reads the state of the fleet and posts events to it; writes of the configuration are in `config`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import overload

from aiohttp import web

from vllm_proxy import __version__
from vllm_proxy.api.guard import author_of
from vllm_proxy.api.reply import Answers, Reply, etag
from vllm_proxy.domain import resources, secrets
from vllm_proxy.domain.command import fingerprint
from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.devices import ANY_DEVICE
from vllm_proxy.domain.keys import Scope
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.domain.placement import Machine
from vllm_proxy.errors import ConfigError, RequestError
from vllm_proxy.fleet.claims import Waits
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.failure import LastExit
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.supervisor import Supervisor
from vllm_proxy.fleet.usage_ledger import UsageLedger
from vllm_proxy.runtime.turns import in_turns
from vllm_proxy.tls import Certificate
from vllm_proxy.traffic.front import caller_of
from vllm_proxy.traffic.registry import Registry

_SHOWN = 20  # places of problems


@overload
def rfc3339(time: datetime) -> str: ...
@overload
def rfc3339(time: None) -> None: ...
def rfc3339(time: datetime | None) -> str | None:
    """A time in UTC, to the millisecond."""
    if time is None:
        return None
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def root(endpoints: list[str]) -> Answers[resources.Root]:
    """`GET /`: name, version, endpoints."""

    async def handle(_request: web.Request) -> Reply[resources.Root]:
        return Reply({"name": "vllm-proxy", "version": __version__, "endpoints": endpoints})

    return handle


def health(
    reconciler: Reconciler, desired: Desired, certificate: Certificate, ledger: UsageLedger, control_socket: str
) -> Answers[resources.Health]:
    """`GET /health`: 200 while the daemon lives; in full for who may read."""

    async def handle(request: web.Request) -> Reply[resources.Health]:
        states, machines = Counter(model.state for model in reconciler.models()), reconciler.room.machines
        short: resources.Health = {
            "status": "ok",
            "version": __version__,
            "models": {state: states[state] for state in State},
            "error": any(
                [
                    desired.rejected,
                    certificate.error,
                    reconciler.not_ended(),
                    machines.problem,
                    ledger.problem,
                    reconciler.state_problem,
                ]
            ),
        }
        if Scope.READ not in caller_of(request).scopes:
            return Reply(short)
        return Reply({
            **short,
            "not_ended": list(reconciler.not_ended()),
            "devices": {"managed": _managed(machines.machine()), "problem": machines.problem},
            "usage": {"error": ledger.problem},
            "state": {"error": reconciler.state_problem},
            "config": {
                "file": str(desired.file),
                "sockets_are_given": desired.address_is_given,
                "revision": reconciler.config.revision,
                "error": _without_values(desired.rejected) if desired.rejected else None,
                "certificate_error": certificate.error,
                "pending_restart": desired.pending_restart(),
            },
            "control_socket": control_socket,
        })  # fmt: skip

    return handle


def _managed(machine: Machine | None) -> int:
    return 0 if machine is None else len(machine.seen)


def _without_values(rejected: ConfigError) -> str:
    """Everybody may read it: so it names the places of problems, and no value of the file.

    Why the file as a whole cannot be read is none of its values, and nobody but the daemon may find out otherwise.
    """
    name = Path(rejected.file).name
    places = [item.place(name) if item.path or item.line else item.render(name) for item in rejected.problems]
    more = f"; and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    count = f"{len(places)} problem{'' if len(places) == 1 else 's'}"
    return f"the configuration is rejected, {count}: {'; '.join(places[:_SHOWN])}{more}"


def ready(reconciler: Reconciler) -> Answers[resources.Ready]:
    """`GET /ready`: 200 when every enabled model with `start = "always"` is ready, else 503 naming the others."""

    async def handle(_request: web.Request) -> Reply[resources.Ready]:
        missing: dict[str, State] = {
            model.spec.id: model.state
            for model in reconciler.models()
            if model.is_wanted and model.state is not State.READY
        }
        answer: resources.Ready = {"status": "waiting" if missing else "ready", "not_ready": missing}
        return Reply(answer, 503 if missing else 200)

    return handle


def version(desired: Desired) -> Answers[resources.Version]:
    """`GET /version`, as vLLM has it."""

    async def handle(_request: web.Request) -> Reply[resources.Version]:
        return Reply({"version": desired.vllm, "vllm_proxy": __version__})

    return handle


def list_models(reconciler: Reconciler, registry: Registry) -> Answers[resources.Models]:
    """`GET /models`."""

    async def handle(request: web.Request) -> Reply[resources.Models]:
        caller, held = caller_of(request), reconciler.room.held()
        revision = reconciler.config.revision
        models = [
            resource(model, registry, held)
            async for model in in_turns(reconciler.models())
            if reconciler.knows(model.spec.id) and caller.may_use(model.spec.id)  # still
        ]
        return Reply({"revision": revision, "models": models}, headers=etag(revision))

    return handle


def get_model(reconciler: Reconciler, registry: Registry) -> Answers[resources.Model]:
    """`GET /models/{model_id}`."""

    async def handle(request: web.Request) -> Reply[resources.Model]:
        model = reconciler.model(request.match_info["model_id"])
        return Reply(resource(model, registry, reconciler.room.held()), headers=etag(reconciler.config.revision))

    return handle


def act(
    reconciler: Reconciler, registry: Registry, desired: Desired, do: Callable[[Model], asyncio.Future[None]]
) -> Answers[resources.Model]:
    """`POST /models/{model_id}/start`, `/stop` and others: a manual override, until the model is changed."""

    async def handle(request: web.Request) -> Reply[resources.Model]:
        model = reconciler.model(request.match_info["model_id"])
        if model.ends:
            msg = f"cannot start or stop {model.spec.id}: it is no longer in the configuration"
            raise RequestError("model_not_found", msg)
        if not model.spec.policy.enabled:
            msg = f"cannot start or stop {model.spec.id}: it is disabled in the configuration"
            raise RequestError("model_disabled", msg)
        done, author = do(model), author_of(request)
        author.commit()
        desired.record(author)
        await asyncio.wait({done})  # a client that leaves takes nothing back
        if not done.cancelled():  # the daemon stops
            done.result()
        return Reply(resource(model, registry, reconciler.room.held()), 202)

    return handle


def sleep(model: Model) -> asyncio.Future[None]:
    """Put a model to sleep. Done when that has begun; what of it loads, or may not sleep, is ended.

    Raises:
        RequestError: `sleep_not_enabled`: its engines may not sleep.

    """
    why: str | None = "its keys have no `sleep`, which may be 1 or 2 (`vllm-proxy help sleep_not_enabled`)"
    if model.spec.engine.sleep is not None:
        reasons = [one.why_awake for one in model.instances]
        why = None if None in reasons else next(iter(reasons), None)
    if why is not None:
        raise RequestError("sleep_not_enabled", f"cannot put {model.spec.id} to sleep: {why}")
    return model.sleep()


def resource(model: Model, registry: Registry, held: Mapping[str, Mapping[str, int]]) -> resources.Model:
    """A model as REST shows it. `held`: what each instance has of devices."""
    in_flight, queued = registry.counts(model.spec.id)
    return {
        "id": model.spec.id,
        "spec": secrets.shown(model.spec.written),
        "effective": secrets.shown(model.spec.effective()),
        "status": {
            "state": model.state,
            "revision": _revision(model.spec),
            "reason": model.diagnosis.reason if model.diagnosis else None,
            "message": model.message,
            "change": change_of(model),
            "created_at": rfc3339(model.created_at),
            "updated_at": rfc3339(model.updated_at),
            "in_flight": in_flight,
            "queued": queued,
            "room": _room(model.waits),
            "adapters": adapters(model),
            "instances": [_instance(instance, held.get(instance.name, {})) for instance in model.instances],
        },
    }


def adapters(model: Model) -> list[resources.AdapterStatus]:
    """Those of a model that are enabled."""
    return [
        {"id": one.id, "state": one.state, "message": one.message, "instances": list(one.instances)}
        for one in model.adapters_now()
    ]


def change_of(model: Model) -> resources.KeyChange | None:
    """What would mend one, where that is known."""
    change = model.change
    return None if change is None else {"key": change.key, "value": change.value}


def _room(waits: Waits | None) -> resources.Room | None:
    if waits is None:
        return None
    return {"needs": waits.needs, "waits_for": list(waits.waits_for), "behind": list(waits.behind)}


def _message(instance: Supervisor, known: str | None) -> str | None:
    """Why it waits for room comes first, then how its last engine failed."""
    waits = instance.waiting_because
    if waits is None or known is None or waits in known:
        return known
    return f"{waits}; before: {known}"


def _instance(instance: Supervisor, takes: Mapping[str, int]) -> resources.Instance:
    engine, left, diagnosis = instance.engine, instance.seconds_left(), instance.diagnosis
    problem = instance.gives_way_because or instance.waiting_because or (engine.log.problem if engine else None)
    return {
        "index": instance.index,
        "state": instance.state,
        "reason": diagnosis.reason if diagnosis else None,
        "message": _message(instance, diagnosis.message if diagnosis else problem),
        "pid": engine.pid if engine else None,
        "port": engine.place.address.port if engine else None,
        "revision": _revision(instance.spec) if engine else None,
        "phase": instance.phase,
        "progress": 1.0 if instance.state is State.READY else instance.fraction,
        "ready_in_seconds": None if left is None else round(left, 1),
        "started_at": rfc3339(instance.started_at),
        "ready_at": rfc3339(instance.ready_at),
        "restarts": instance.restarts,
        "in_flight": instance.endpoint.in_flight if instance.endpoint else 0,
        "devices": [name for name in takes if name != ANY_DEVICE],
        "memory_bytes": max(takes.values(), default=0) or None,
        "sleep": _sleep(instance),
        "last_exit": _last_exit(instance.last_exit),
    }


def _revision(spec: ModelSpec) -> str:
    return fingerprint(spec.engine, "")


def _sleep(instance: Supervisor) -> str | None:
    level, off = instance.spec.engine.sleep, instance.why_awake
    if level is None:
        return None
    return f"level {level}" if off is None else f"off: {off}"


def _last_exit(last: LastExit | None) -> resources.LastExit | None:
    if last is None:
        return None
    return {
        "reason": last.diagnosis.reason,
        "message": last.diagnosis.message,
        "code": last.ended.code,
        "signal": last.ended.signal,
        "at": rfc3339(last.at),
        "log_tail": list(last.log_tail),
    }
