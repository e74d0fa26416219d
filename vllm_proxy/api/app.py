"""All routes in one table: method, path, scope and handler.

A path that is not in the table never reaches an engine, and a route that declares no scope cannot be in it. A route of
ours is added here, and described in
`openapi_routes`; a test compares both (tests/api/test_openapi.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from vllm_proxy.api import (
    config,
    devices,
    docs,
    help_pages,
    keys,
    logs,
    models,
    moderations,
    openai,
    requests,
    schema,
    scrapes,
    ui,
    usage,
)
from vllm_proxy.api.body import Bodies
from vllm_proxy.api.engine_metrics import EngineMetrics
from vllm_proxy.api.events import Events
from vllm_proxy.api.feed import Feed
from vllm_proxy.api.guard import Observed, Route, guarded
from vllm_proxy.api.happenings import Happenings
from vllm_proxy.api.metrics import Metrics
from vllm_proxy.api.rates import Rates
from vllm_proxy.api.reply import Answers, answered
from vllm_proxy.api.usage_metrics import UsageMetrics
from vllm_proxy.domain import resources
from vllm_proxy.domain.config import Server
from vllm_proxy.domain.keys import Scope
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.usage_ledger import UsageLedger
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.runtime.turns import LoopLag
from vllm_proxy.tls import Certificate
from vllm_proxy.traffic.access import Access
from vllm_proxy.traffic.access_log import AccessLog
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.call import Call, Work, observed
from vllm_proxy.traffic.cors import Cors
from vllm_proxy.traffic.direct import Direct
from vllm_proxy.traffic.envelope import envelope, identify
from vllm_proxy.traffic.front import FrontRunner
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.moderation import Moderator
from vllm_proxy.traffic.realtime import Sessions, realtime
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.requests import Requests
from vllm_proxy.traffic.routes import INFERENCE, UNSUPPORTED, NamesModel
from vllm_proxy.traffic.traces import Traces

ROUTES = web.AppKey("routes", tuple[Route, ...])  # of an application: its table
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
    mask: Callable[[str], str]  # hides the secrets in what engines write
    certificate: Certificate
    metering: Metering
    ledger: UsageLedger
    control_socket: str  # its path
    traces: Traces | None = None
    budget: Budget = field(default_factory=Budget)
    requests: Requests = field(default_factory=Requests)

    def server(self) -> Server:
        """The `[server]` table now."""
        return self.reconciler.config.server


def build(parts: Parts, shutdown_seconds: float) -> FrontRunner:
    """The server, ready to be given sockets."""
    metrics = Metrics(
        parts.reconciler,
        parts.registry,
        parts.desired,
        parts.lag,
        parts.log,
        usage=UsageMetrics(
            parts.ledger.usage, parts.access.refused, parts.metering.in_flight, parts.metering.used_ratio
        ),
        front=lambda: (runner.connections, parts.budget.held),
    )

    def observe(call: Call) -> None:
        parts.budget.release(call)
        if call.metered is not None:
            call.metered.end()
        metrics.count(call)
        if parts.access_log is not None:
            parts.access_log.write(call)
        parts.requests.end(call)
        if call.trace is not None:
            call.trace.end(call)

    rates = Rates(parts.reconciler, metrics.ended)
    happenings = Happenings(parts.reconciler.knows)
    feed = Feed(parts.reconciler, parts.desired, happenings, rates)
    events = Events(parts.reconciler, parts.desired, happenings, feed)
    cors = Cors(parts.server)
    direct, inference = _inference(parts, observe, cors)
    table = [*inference, *_administration(parts, metrics), *_observation(parts, events, rates)]
    table += [Route(method, path, None, page) for method, path, page in (*help_pages.routes(), *ui.routes())]
    known = [("GET", "/", None), *((route.method, route.path, route.scope) for route in table)]
    table += [Route(method, path, None, page) for method, path, page in docs.routes(known, docs.find_assets())]
    offered = ["GET /", *(f"{route.method} {route.path.replace(':.+', '')}" for route in table)]
    table.append(Route("GET", "/", None, answered(ui.page_or(models.root(offered)))))
    app = web.Application(middlewares=[envelope, cors.preflight])
    app[ROUTES] = tuple(table)
    app.cleanup_ctx.extend([rates.running, feed.running])
    app.on_response_prepare.append(cors.on_prepare)
    app.on_response_prepare.append(identify)
    for route in table:
        handler = guarded(route, parts.access, parts.budget) if type(route) is Route else route.handler
        for path in _spellings(route.path):
            app.router.add_route(route.method, path, handler)
            if route.method == "GET" and route.path not in _ENDLESS:
                app.router.add_route("HEAD", path, handler)
    for path in UNSUPPORTED:
        app.router.add_route("*", path, openai.unsupported)
        app.router.add_route("*", path + "/{rest:.*}", openai.unsupported)
    runner = FrontRunner(
        app, direct, parts.server, parts.access.refusal_of, keepalive_timeout=75, shutdown_timeout=shutdown_seconds
    )
    parts.access.listen(runner.revoke)
    return runner


def _spellings(path: str) -> list[str]:
    """A path, and with a slash behind it, as some clients write it."""
    return [path] if path.endswith(("/", "}")) else [path, f"{path}/"]


def _inference(
    parts: Parts, observe: Callable[[Call], None], cors: Cors
) -> tuple[dict[tuple[str, str], Direct], list[Route]]:
    """The inference routes: those with a fixed path, past the router; and all of them, for the router."""
    registry, server, budget, access = parts.registry, parts.server, parts.budget, parts.access
    moderator = Moderator(registry, lambda: parts.reconciler.config.moderation, parts.metering)
    work: dict[NamesModel, Work] = {
        "json": openai.by_json_model(registry, server, budget, parts.metering, moderator),
        "form": openai.by_form_model(registry, server, budget, parts.metering),
        "query": openai.by_query_model(registry, parts.metering),
        "nowhere": openai.by_asking(registry, server, budget, parts.metering),
        "guard": moderations.by_guard(moderator, registry, server, budget, parts.metering),
        "session": realtime(Sessions(registry, parts.engines, server, budget, parts.metering)),
    }
    direct: dict[tuple[str, str], Direct] = {}
    table: list[Route] = []
    for route in INFERENCE:
        admit = access.of_session if route.names_model == "session" else access.caller
        active, begin = parts.requests.active, parts.traces.begin if parts.traces else None
        handler = observed(route, work[route.names_model], admit, observe, cors, active=active, begin=begin)
        table.append(Observed(route.method, route.path, route.scope, handler))
        if route.names_model in {"json", "form", "guard"}:
            direct |= dict.fromkeys([(route.method, path) for path in _spellings(route.path)], handler)
    table += [
        Route("GET", "/v1/models", Scope.INFERENCE, answered(openai.list_models(registry, parts.reconciler))),
        Route(
            "GET",
            f"/v1/models/{_MODEL_ID}",
            Scope.INFERENCE,
            answered(openai.retrieve_model(registry, parts.reconciler)),
        ),
    ]
    return direct, table


def _administration(parts: Parts, metrics: Metrics) -> list[Route]:
    reconciler, registry = parts.reconciler, parts.registry
    bodies = Bodies(parts.server, parts.budget)
    writes = config.Writes(parts.desired, reconciler, parts.certificate, bodies)
    actions = {
        "start": Model.start, "stop": Model.stop, "restart": Model.restart, "sleep": models.sleep, "wake": Model.start,
    }  # fmt: skip
    read, operate = Scope.READ, Scope.OPERATE
    return [
        Route("GET", "/models", read, answered(models.list_models(reconciler, registry))),
        *(
            Route(
                "POST",
                f"/models/{_MODEL_ID}/{name}",
                operate,
                answered(models.act(reconciler, registry, parts.desired, do)),
            )
            for name, do in actions.items()
        ),
        Route("GET", f"/models/{_MODEL_ID}/logs", operate, logs.engine_output(reconciler, parts.mask)),
        Route("GET", f"/models/{_MODEL_ID}", read, answered(models.get_model(reconciler, registry))),
        *config.routes(writes, _ONE_MODEL),
        *keys.routes(keys.Keys(parts.desired, bodies)),
        Route("GET", "/devices", read, answered(devices.list_devices(reconciler.room))),
        Route("GET", "/usage", read, answered(usage.report(parts.ledger)), of_itself=True),
        Route("GET", "/health", None, answered(_health(parts))),
        Route("GET", "/ready", None, answered(models.ready(reconciler))),
        Route("GET", "/version", Scope.INFERENCE, answered(models.version(parts.desired))),
        Route("GET", "/schema.json", None, schema.schema(parts.desired.objections.options)),
        *scrapes.routes(metrics, EngineMetrics(reconciler), traced=parts.traces is not None),
    ]


def _health(parts: Parts) -> Answers[resources.Health]:
    return models.health(parts.reconciler, parts.desired, parts.certificate, parts.ledger, parts.control_socket)


def _observation(parts: Parts, events: Events, rates: Rates) -> list[Route]:
    """What happens, now and lately; and to end a request."""
    read, one = Scope.READ, "/requests/{request_id:.+}"
    return [
        Route("GET", "/events", read, events.stream),
        Route("GET", "/stats", read, answered(rates.stats())),
        Route("GET", "/requests", read, answered(requests.list_requests(parts.requests, parts.registry))),
        Route("GET", one, read, answered(requests.get_request(parts.requests))),
        Route("DELETE", one, Scope.OPERATE, answered(requests.cancel_request(parts.requests, parts.desired))),
    ]
