"""All routes in one table: method, path, handler and access check.

A path that is not in the table never reaches an engine. A route of ours is added here, and described in
`openapi_routes`; a test compares both (tests/api/test_openapi.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps

import aiohttp
from aiohttp import web

from vllm_proxy.api import config, docs, logs, models, openai
from vllm_proxy.api.events import Events
from vllm_proxy.api.metrics import Metrics
from vllm_proxy.api.reply import answered
from vllm_proxy.domain.config import Server
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.runtime.turns import LoopLag
from vllm_proxy.traffic.access import Access
from vllm_proxy.traffic.access_log import AccessLog
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.call import Call, Work, observed
from vllm_proxy.traffic.cors import Cors
from vllm_proxy.traffic.envelope import Handler, envelope, identify
from vllm_proxy.traffic.front import Direct, FrontRunner, client_of
from vllm_proxy.traffic.realtime import Sessions, realtime
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.routes import INFERENCE, UNSUPPORTED, NamesModel

_ENDLESS = {"/v1/realtime", "/events"}  # a HEAD has no length to answer
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
        parts.budget.release(call)
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
    table.append(("GET", "/", _guarded(parts, answered(models.root(offered)), public=True)))
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
    runner = FrontRunner(app, direct, parts.server, keepalive_timeout=75, shutdown_timeout=shutdown_seconds)
    return runner


def _inference(
    parts: Parts, observe: Callable[[Call], None], cors: Cors
) -> tuple[dict[tuple[str, str], Direct], list[tuple[str, str, Handler]]]:
    """The inference routes: those with a fixed path, past the router; and all of them, for the router."""
    registry, server, budget = parts.registry, parts.server, parts.budget
    work: dict[NamesModel, Work] = {
        "json": openai.by_json_model(registry, server, budget),
        "form": openai.by_form_model(registry, server, budget),
        "nowhere": openai.by_asking(registry, server, budget),
        "session": realtime(Sessions(registry, parts.engines, server, budget)),
    }
    direct: dict[tuple[str, str], Direct] = {}
    table: list[tuple[str, str, Handler]] = []
    for route in INFERENCE:
        handler = observed(route.method, route.path, work[route.names_model], observe, cors)
        table.append((route.method, route.path, handler))
        if route.names_model in {"json", "form"}:
            direct[route.method, route.path] = handler
    table += [
        ("GET", "/v1/models", answered(openai.list_models(registry, parts.reconciler))),
        ("GET", f"/v1/models/{_MODEL_ID}", answered(openai.retrieve_model(registry, parts.reconciler))),
    ]
    return direct, table


def _administration(parts: Parts, metrics: Metrics) -> list[tuple[str, str, Handler]]:
    reconciler, registry = parts.reconciler, parts.registry
    writes = config.Writes(parts.desired, reconciler, parts.server, parts.budget)
    events = Events(reconciler, parts.desired)
    actions = {"start": Model.start, "stop": Model.stop, "restart": Model.restart}
    return [
        ("GET", "/models", _guarded(parts, answered(models.list_models(reconciler, registry)))),
        *(
            ("POST", f"/models/{_MODEL_ID}/{name}", _guarded(parts, answered(models.act(reconciler, registry, do))))
            for name, do in actions.items()
        ),
        ("GET", f"/models/{_MODEL_ID}/logs", _guarded(parts, logs.engine_output(reconciler))),
        ("GET", f"/models/{_MODEL_ID}", _guarded(parts, answered(models.get_model(reconciler, registry)))),
        *((method, path, _guarded(parts, handler)) for method, path, handler in config.routes(writes, _ONE_MODEL)),
        ("GET", "/events", _guarded(parts, events.stream)),
        ("GET", "/health", _guarded(parts, answered(models.health(reconciler, parts.desired)), public=True)),
        ("GET", "/ready", _guarded(parts, answered(models.ready(reconciler)), public=True)),
        ("GET", "/metrics", _guarded(parts, models.exposition(metrics), public=True)),
    ]


def _guarded(parts: Parts, handler: Handler, *, public: bool = False) -> Handler:
    @wraps(handler)
    async def handle(request: web.Request) -> web.StreamResponse:
        parts.access.check(request, public=public)
        try:
            return await handler(request)
        finally:
            parts.budget.release(client_of(request))

    return handle
