"""The OpenAI routes: which model a request means, and the list of models."""

from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from vllm_proxy.api.envelope import Handler, json_response
from vllm_proxy.api.relay import relay
from vllm_proxy.engine.reconciler import Reconciler
from vllm_proxy.engine.registry import Registry, Route
from vllm_proxy.errors import RequestError


class _Named(msgspec.Struct):
    """The one field of a body that decides anything here; the others are skipped, not decoded."""

    model: Any = None


_named = msgspec.json.Decoder(_Named)
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def model_name(body: bytes) -> str:
    """The `model` of a JSON body.

    Raises:
        RequestError: `invalid_json` or `missing_model`.

    """
    try:
        name = _named.decode(body).model
    except msgspec.ValidationError:
        name = None  # JSON, but no object
    except msgspec.DecodeError as error:
        raise RequestError("invalid_json", f"cannot read the body: it is no JSON: {error}") from None
    if not isinstance(name, str) or not name:
        msg = "cannot route this request: its body names no model; GET /v1/models lists them"
        raise RequestError("missing_model", msg, param="model")
    return name


def with_model(body: bytes, model_id: str) -> bytes:
    """The body with another `model`; every other value keeps its bytes."""
    fields = _raw_fields.decode(body)
    return msgspec.json.encode(fields | {"model": msgspec.Raw(msgspec.json.encode(model_id))})


def by_json_model(registry: Registry, session: aiohttp.ClientSession) -> Handler:
    """A handler for the routes whose JSON body names the model."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        name = model_name(body)
        with await registry.acquire(name) as lease:
            if name != lease.model_id:
                body = with_model(body, lease.model_id)
            return await relay(session, request, body, lease)

    return handle


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
