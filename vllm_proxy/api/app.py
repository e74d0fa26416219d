"""All routes in one table. Its one rule: a path that is not in the table does not reach an engine."""

import aiohttp
from aiohttp import web

from vllm_proxy.api import models, openai
from vllm_proxy.api.access import Access
from vllm_proxy.api.envelope import Handler, envelope
from vllm_proxy.engine.reconciler import Reconciler
from vllm_proxy.engine.registry import Registry

_BY_JSON_MODEL = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def build(
    reconciler: Reconciler, registry: Registry, session: aiohttp.ClientSession, access: Access
) -> web.Application:
    """The application; `session` holds the connections to engines and is closed by its owner."""

    def guarded(handler: Handler, *, public: bool = False) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            access.check(request, public=public)
            return await handler(request)

        return handle

    inference = openai.by_json_model(registry, session)
    model_id = "{model_id:.+}"
    table: list[tuple[str, str, Handler]] = [
        *(("POST", path, inference) for path in _BY_JSON_MODEL),
        ("GET", "/v1/models", openai.list_models(registry, reconciler)),
        ("GET", f"/v1/models/{model_id}", openai.retrieve_model(registry, reconciler)),
        ("GET", "/models", guarded(models.list_models(reconciler, registry))),
        ("GET", f"/models/{model_id}", guarded(models.get_model(reconciler, registry))),
        ("GET", "/health", guarded(models.health(reconciler), public=True)),
        ("GET", "/ready", guarded(models.ready(reconciler), public=True)),
    ]
    endpoints = ["GET /", *(f"{method} {path.replace(':.+', '')}" for method, path, _ in table)]
    table.append(("GET", "/", guarded(models.root(endpoints), public=True)))
    app = web.Application(middlewares=[envelope], client_max_size=reconciler.config.server.max_body_size)
    for method, path, handler in table:
        app.router.add_route(method, path, handler)
        if method == "GET":
            app.router.add_route("HEAD", path, handler)
    return app
