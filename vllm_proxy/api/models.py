"""`/models`, `/`, `/health`, `/ready`: what is asked for and what is, as JSON."""

import asyncio
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from vllm_proxy import __version__
from vllm_proxy.api.envelope import Handler, json_response
from vllm_proxy.api.metrics import Metrics
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.engine.reconciler import ModelStatus, Reconciler
from vllm_proxy.engine.registry import Registry
from vllm_proxy.engine.supervisor import LastExit, Supervisor
from vllm_proxy.errors import RequestError


def rfc3339(time: datetime | None) -> str | None:
    """A time in UTC, to the millisecond."""
    if time is None:
        return None
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def root(endpoints: list[str]) -> Handler:
    """`GET /`: name, version, endpoints."""

    async def handle(_request: web.Request) -> web.Response:
        return json_response({"name": "vllm-proxy", "version": __version__, "endpoints": endpoints})

    return handle


def health(reconciler: Reconciler) -> Handler:
    """`GET /health`: 200 while the daemon lives."""

    async def handle(_request: web.Request) -> web.Response:
        states = Counter(status.state for status in reconciler.models())
        return json_response({
            "status": "ok",
            "version": __version__,
            "models": {state: states[state] for state in State},
            "config": {"revision": reconciler.config.revision, "error": None, "pending_restart": []},
        })  # fmt: skip

    return handle


def ready(reconciler: Reconciler) -> Handler:
    """`GET /ready`: 200 when every enabled model with `start = "always"` is ready, else 503 naming the others."""

    async def handle(_request: web.Request) -> web.Response:
        missing = {
            status.spec.id: status.state
            for status in reconciler.models()
            if status.spec.policy.enabled and status.spec.policy.start == "always" and status.state is not State.READY
        }
        answer = {"status": "waiting" if missing else "ready", "not_ready": missing}
        return json_response(answer, status=503 if missing else 200)

    return handle


def exposition(metrics: Metrics) -> Handler:
    """`GET /metrics`: Prometheus text."""

    async def handle(_request: web.Request) -> web.Response:
        kind, text = metrics.text(len(asyncio.all_tasks()))
        return web.Response(body=text, headers={"Content-Type": kind})

    return handle


def list_models(reconciler: Reconciler, registry: Registry) -> Handler:
    """`GET /models`."""

    async def handle(_request: web.Request) -> web.Response:
        models = [resource(status, registry) for status in reconciler.models()]
        revision = reconciler.config.revision
        return json_response({"revision": revision, "models": models}, headers={"ETag": f'"{revision}"'})

    return handle


def get_model(reconciler: Reconciler, registry: Registry) -> Handler:
    """`GET /models/{model_id}`."""

    async def handle(request: web.Request) -> web.Response:
        model_id = request.match_info["model_id"]
        try:
            status = reconciler.model(model_id)
        except KeyError:
            msg = f"cannot find model {model_id!r}: GET /models lists them"
            raise RequestError("model_not_found", msg) from None
        return json_response(resource(status, registry), headers={"ETag": f'"{reconciler.config.revision}"'})

    return handle


def resource(status: ModelStatus, registry: Registry) -> dict[str, Any]:
    """A model as REST shows it: contract section 3."""
    in_flight, queued = registry.counts(status.spec.id)
    return {
        "id": status.spec.id,
        "spec": status.spec.written,
        "effective": status.spec.effective(),
        "status": {
            "state": status.state,
            "reason": status.diagnosis.reason if status.diagnosis else None,
            "message": status.diagnosis.message if status.diagnosis else None,
            "created_at": rfc3339(status.created_at),
            "updated_at": rfc3339(status.updated_at),
            "in_flight": in_flight,
            "queued": queued,
            "instances": [_instance(instance) for instance in status.instances],
        },
    }


def _instance(instance: Supervisor) -> dict[str, Any]:
    engine = instance.engine
    return {
        "index": instance.index,
        "state": instance.state,
        "pid": engine.pid if engine else None,
        "port": engine.place.port if engine else None,
        "phase": instance.phase,
        "progress": 1.0 if instance.state is State.READY else None,
        "started_at": rfc3339(instance.started_at),
        "ready_at": rfc3339(instance.ready_at),
        "restarts": instance.restarts,
        "in_flight": instance.endpoint.in_flight if instance.endpoint else 0,
        "last_exit": _last_exit(instance.last_exit),
    }


def _last_exit(last: LastExit | None) -> dict[str, Any] | None:
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
