"""The inference routes: which model a request means, and the list of models."""

import contextlib
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from aiohttp import web

from vllm_proxy.api.body import LARGE, body_at_hand, model_name, model_name_of_large, read_body, with_model
from vllm_proxy.api.call import Call, Work
from vllm_proxy.api.envelope import Handler, json_response
from vllm_proxy.api.multipart import Upload
from vllm_proxy.api.relay import carry
from vllm_proxy.domain.config import Server
from vllm_proxy.engine.reconciler import Reconciler
from vllm_proxy.engine.registry import Lease, Registry, Route
from vllm_proxy.errors import EngineFailedError, RequestError

type Settings = Callable[[], Server]  # the `[server]` table now


def _lease_now(call: Call, registry: Registry, route: Route) -> Lease | None:
    call.model = route.spec.id
    return registry.lease(route)


async def _wait(call: Call, registry: Registry, route: Route) -> Lease:
    began = time.monotonic()
    try:
        return await registry.wait(route)
    finally:
        call.queue_seconds = time.monotonic() - began


def _passed_on(answer: web.StreamResponse | None) -> web.StreamResponse:
    assert answer is not None, "nothing declines"
    return answer


def by_json_model(registry: Registry, settings: Settings) -> Work:
    """The routes whose JSON body names the model."""

    async def work(call: Call) -> web.StreamResponse:
        limit = settings().max_body_size
        body = body_at_hand(call, limit) or await read_body(call, limit)
        if len(body) < LARGE:
            name, place = model_name(body), None
        else:
            name, place = await model_name_of_large(body)
        route = registry.find(name)
        with _lease_now(call, registry, route) or await _wait(call, registry, route) as lease:
            if name != lease.model_id:
                body = await with_model(body, lease.model_id, place)
            return _passed_on(await carry(call, lease, body))

    return work


def by_form_model(registry: Registry, settings: Settings) -> Work:
    """The routes whose multipart form names the model."""

    async def work(call: Call) -> web.StreamResponse:
        with await Upload.receive(call, settings().max_body_size) as upload:
            name = upload.model
            route = registry.find(name)
            with _lease_now(call, registry, route) or await _wait(call, registry, route) as lease:
                form = upload if name == lease.model_id else upload.renamed(lease.model_id)
                return _passed_on(await carry(call, lease, form))

    return work


def by_asking(registry: Registry, settings: Settings) -> Work:
    """The routes of a stored response, which lives in the memory of one instance: the first that knows it answers."""

    async def work(call: Call) -> web.StreamResponse:
        body = await read_body(call, settings().max_body_size)
        for lease in registry.every_instance():
            with lease, contextlib.suppress(EngineFailedError):
                answer = await carry(call, lease, body, on_head=_knows)
                if answer is not None:
                    return answer
        call.model = call.instance = ""
        raise RequestError("not_found", "cannot find this response: no ready instance knows it")

    return work


def _knows(status: int) -> bool:
    return status != HTTPStatus.NOT_FOUND


def list_models(registry: Registry, reconciler: Reconciler) -> Handler:
    """`GET /v1/models`: every enabled model and alias, whatever its state."""

    async def handle(_request: web.Request) -> web.Response:
        cards = [_card(name, route, reconciler) for name, route in registry.names().items()]
        return json_response({"object": "list", "data": cards})

    return handle


def retrieve_model(registry: Registry, reconciler: Reconciler) -> Handler:
    """`GET /v1/models/{id}`."""

    async def handle(request: web.Request) -> web.Response:
        name = request.match_info["model_id"]
        route = registry.names().get(name)
        if route is None:
            raise RequestError("model_not_found", f"cannot find model {name!r}: GET /v1/models lists them")
        return json_response(_card(name, route, reconciler))

    return handle


async def unsupported(request: web.Request) -> web.StreamResponse:
    """The OpenAI routes that no vLLM and no daemon serves."""
    raise RequestError("unsupported_endpoint", f"cannot {request.method} {request.path}: it is not offered here")


def _card(name: str, route: Route, reconciler: Reconciler) -> dict[str, Any]:
    spec = route.spec
    length = next((endpoint.max_model_len for endpoint in route.endpoints), spec.engine.max_model_len)
    return {
        "id": name,
        "object": "model",
        "created": int(reconciler.model(spec.id).created_at.timestamp()),
        "owned_by": "vllm-proxy",
        "root": spec.engine.model,
        "parent": None if name == spec.id else spec.id,
        "max_model_len": length if isinstance(length, int) else None,
    }
