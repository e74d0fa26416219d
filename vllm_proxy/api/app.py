"""All routes in one table. Its one rule: a path that is not in the table does not reach an engine."""

from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from vllm_proxy.api import config, docs, logs, models, openai
from vllm_proxy.api.events import Events
from vllm_proxy.api.metrics import Metrics
from vllm_proxy.domain.config import Server
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.runtime.turns import LoopLag
from vllm_proxy.traffic.access import Access
from vllm_proxy.traffic.access_log import AccessLog
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.call import Call, observed
from vllm_proxy.traffic.cors import Cors
from vllm_proxy.traffic.envelope import Handler, envelope, identify
from vllm_proxy.traffic.front import Direct, FrontRunner, client_of
from vllm_proxy.traffic.realtime import Sessions, realtime
from vllm_proxy.traffic.registry import Registry

BY_JSON_MODEL = (
    "/v1/chat/completions /v1/chat/completions/batch /v1/completions /v1/embeddings /v1/responses /v1/messages "
    "/v1/messages/count_tokens /v1/rerank /rerank /v2/rerank /v1/score /score /generative_scoring /classify /pooling "
    "/tokenize /detokenize /v2/embed"
).split()
BY_FORM_MODEL = ("/v1/audio/transcriptions", "/v1/audio/translations")
UNSUPPORTED = (
    "/v1/moderations /v1/images /v1/audio/speech /v1/assistants /v1/threads /v1/fine_tuning /v1/files /v1/batches "
    "/v1/uploads /v1/vector_stores"
).split()
_ENDLESS = {"/v1/realtime", "/events"}  # no length to tell to a HEAD
_MODEL_ID = "{model_id:.+}"
_ONE_MODEL = f"/models/{_MODEL_ID}"


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes are made of. `engines` holds WebSocket sessions with engines and is closed by its owner."""

    reconciler: Reconciler
    desired: Desired
    registry: Registry
    engines: aiohttp.ClientSession
    access: Access
    access_log: AccessLog | None
    lag: LoopLag
    log: LogWriter
    commands: str = ""  # the address of the control socket
    budget: Budget = field(default_factory=Budget)

    def server(self) -> Server:
        """The `[server]` table now."""
        return self.reconciler.config.server


def build(parts: Parts, shutdown_seconds: float) -> FrontRunner:
    """The server, ready to be given sockets."""
    metrics = Metrics(
        parts.reconciler,
        parts.registry,
        parts.desired.reloads,
        parts.lag,
        parts.log,
        front=lambda: (runner.connections, parts.budget.held),
    )

    def observe(call: Call) -> None:
        parts.budget.give_back(call)
        metrics.count(call)
        if parts.access_log is not None:
            parts.access_log.write(call)

    cors = Cors(parts.server)
    direct, inference = _inference(parts, observe, cors)
    table = [*inference, *_administration(parts, metrics)]
    known = [("GET", "/"), *((method, path) for method, path, _ in table)]
    pages = docs.routes(known, docs.find_assets())
    table += [(method, path, _guarded(parts, page, public=True)) for method, path, page in pages]
    offered = ["GET /", *(f"{method} {path.replace(':.+', '')}" for method, path, _ in table)]
    table.append(("GET", "/", _guarded(parts, models.root(offered), public=True)))
    app = web.Application(middlewares=[envelope, cors.preflight])
    app.on_response_prepare.append(cors.on_prepare)
    app.on_response_prepare.append(identify)
    for method, path, handler in table:
        app.router.add_route(method, path, handler)
        if method == "GET" and path not in _ENDLESS:
            app.router.add_route("HEAD", path, handler)
    for path in UNSUPPORTED:
        app.router.add_route("*", path, openai.unsupported)
        app.router.add_route("*", path + "/{rest:.*}", openai.unsupported)
    runner = FrontRunner(
        app, direct, parts.server, parts.commands, keepalive_timeout=75, shutdown_timeout=shutdown_seconds
    )
    return runner


def _inference(
    parts: Parts, observe: Callable[[Call], None], cors: Cors
) -> tuple[dict[tuple[str, str], Direct], list[tuple[str, str, Handler]]]:
    """The inference routes: those with a fixed path, past the router; and all of them, for the router."""
    by_json = openai.by_json_model(parts.registry, parts.server, parts.budget)
    by_form = openai.by_form_model(parts.registry, parts.server, parts.budget)
    by_asking = openai.by_asking(parts.registry, parts.server, parts.budget)
    direct = {("POST", path): observed("POST", path, by_json, observe, cors) for path in BY_JSON_MODEL}
    direct |= {("POST", path): observed("POST", path, by_form, observe, cors) for path in BY_FORM_MODEL}
    sessions = realtime(Sessions(parts.registry, parts.engines, parts.server, parts.budget))
    table: list[tuple[str, str, Handler]] = [(method, path, handler) for (method, path), handler in direct.items()]
    table += [
        ("GET", "/v1/responses/{id}", observed("GET", "/v1/responses/{id}", by_asking, observe, cors)),
        ("POST", "/v1/responses/{id}/cancel", observed("POST", "/v1/responses/{id}/cancel", by_asking, observe, cors)),
        ("GET", "/v1/realtime", observed("GET", "/v1/realtime", sessions, observe, cors)),
        ("GET", "/v1/models", openai.list_models(parts.registry, parts.reconciler)),
        ("GET", f"/v1/models/{_MODEL_ID}", openai.retrieve_model(parts.registry, parts.reconciler)),
    ]
    return direct, table


def _administration(parts: Parts, metrics: Metrics) -> list[tuple[str, str, Handler]]:
    reconciler, registry = parts.reconciler, parts.registry
    writes = config.Writes(parts.desired, reconciler, parts.server, parts.budget)
    events = Events(reconciler, parts.desired)
    actions = {"start": Model.start, "stop": Model.stop, "restart": Model.restart}
    return [
        ("GET", "/models", _guarded(parts, models.list_models(reconciler, registry))),
        *(
            ("POST", f"/models/{_MODEL_ID}/{name}", _guarded(parts, models.act(reconciler, registry, do)))
            for name, do in actions.items()
        ),
        ("GET", f"/models/{_MODEL_ID}/logs", _guarded(parts, logs.engine_output(reconciler))),
        ("GET", f"/models/{_MODEL_ID}", _guarded(parts, models.get_model(reconciler, registry))),
        *((method, path, _guarded(parts, handler)) for method, path, handler in config.routes(writes, _ONE_MODEL)),
        ("GET", "/events", _guarded(parts, events.stream)),
        ("GET", "/health", _guarded(parts, models.health(reconciler, parts.desired), public=True)),
        ("GET", "/ready", _guarded(parts, models.ready(reconciler), public=True)),
        ("GET", "/metrics", _guarded(parts, models.exposition(metrics), public=True)),
    ]


def _guarded(parts: Parts, handler: Handler, *, public: bool = False) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        parts.access.check(request, public=public)
        try:
            return await handler(request)
        finally:
            parts.budget.give_back(client_of(request))

    return handle
