"""The inference routes: find the model that a request names, and forward it; and `/v1/models`, the list of models.

How a request is forwarded is in `traffic/relay.py`. Bodies are passed on byte for byte, but for an alias, which becomes
the model's id.
"""

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from aiohttp import web

from vllm_proxy.api.reply import Answers, Reply
from vllm_proxy.domain import resources
from vllm_proxy.domain.config import Server
from vllm_proxy.errors import RequestError, model_not_found
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.runtime.turns import in_turns
from vllm_proxy.traffic import asked as asks
from vllm_proxy.traffic import prompt as prompts
from vllm_proxy.traffic.body import (
    LARGE,
    body_at_hand,
    members_of_large,
    model_name,
    named_at,
    read_body,
    usable,
    with_model,
    with_salt,
)
from vllm_proxy.traffic.body import members as members_of
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.call import Call, Work
from vllm_proxy.traffic.fan_out import fan_out
from vllm_proxy.traffic.front import caller_of
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.moderation import Moderator, refuse_unchecked
from vllm_proxy.traffic.multipart import Upload
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.relay import forward
from vllm_proxy.traffic.routing import Route

_NAME = frozenset({b"model"})
_WHOLE = _NAME | prompts.NAMES


class Asking(Protocol):
    """As much of a call as its prompt is made of."""

    route: str
    salt: bytes
    forwarded: bytes
    prompt: prompts.Prompt | None


type Settings = Callable[[], Server]  # the `[server]` table now


def by_json_model(
    registry: Registry, settings: Settings, budget: Budget, metering: Metering, moderator: Moderator
) -> Work:
    """The routes whose JSON body names the model."""

    def send(call: Call, registry: Registry, route: Route, body: bytes) -> Coroutine[Any, Any, web.StreamResponse]:
        return (moderator.forward if route.spec.policy.moderate else forward)(call, registry, route, body)

    async def work(call: Call) -> web.StreamResponse:
        server = settings()
        body = body_at_hand(call, server, budget) or await read_body(call, server, budget)
        asked: asks.Asked | None = None
        members: prompts.Members | None = None
        place: slice | None = None
        if len(body) >= LARGE:
            asked, name, place, members = await _read_large(call, body, metering, whole=registry.balances)
        elif metering.is_on:
            asked = asks.read(body, call.route, whole=registry.balances)
            name, members = asked.model, asked.members
        elif registry.balances:
            members = members_of(body)
            name = usable(members.model)
        else:
            name = model_name(body)
        route = found(call, name, registry)
        if members is not None:
            follow_prompt(call, route, members)
        if name != route.spec.id:
            body = await with_model(body, route.spec.id, place)
        if asked is not None:
            body = metering.admit(call, route.spec, asked, body)
        if call.salt:
            body = with_salt(body, call.salt)
        return await send(call, registry, route, body)

    return work


def follow_prompt(call: Asking, route: Route, members: prompts.Members) -> None:
    """Have its prompt decide which instance gets the request, where it can."""
    if route.base.balances and prompts.runs_one(call.route):
        call.prompt = prompts.Prompt(members, call.salt, call.forwarded)


async def _read_large(
    call: Call, body: bytes, metering: Metering, *, whole: bool
) -> tuple[asks.Asked | None, str, slice | None, prompts.Members | None]:
    """(what it asks for, where it is metered; its model; where that stands; its prompt's members, where `whole`)."""
    if metering.is_on:
        asked = await asks.read_large(body, call.route, whole=whole)
        return asked, asked.model, asked.place, asked.members
    spans = await members_of_large(body, _WHOLE if whole else _NAME)
    name = named_at(body, spans)
    return None, name, slice(*spans[b"model"]), prompts.members_at(body, spans) if whole else None


def by_form_model(registry: Registry, settings: Settings, budget: Budget, metering: Metering) -> Work:
    """The routes whose multipart form names the model."""

    async def work(call: Call) -> web.StreamResponse:
        with await Upload.receive(call, settings(), budget) as upload:
            route = found(call, upload.model, registry)
            refuse_unchecked(route)
            form = upload if upload.model == route.spec.id else upload.renamed(route.spec.id)
            if metering.is_on:
                metering.admit(call, route.spec)
            return await forward(call, registry, route, form)

    return work


def by_query_model(registry: Registry, metering: Metering) -> Work:
    """The routes whose query names the model, and that have no body."""

    async def work(call: Call) -> web.StreamResponse:
        route = found(call, usable(call.request.query.get("model"), "its query (?model=)"), registry)
        if metering.is_on:
            metering.admit(call, route.spec)
        return await forward(call, registry, route, b"")

    return work


def by_asking(registry: Registry, settings: Settings, budget: Budget, metering: Metering) -> Work:
    """The routes of a stored response, which lives in the memory of one instance."""

    async def work(call: Call) -> web.StreamResponse:
        body = await read_body(call, settings(), budget)
        if metering.is_on:
            metering.admit(call)
        return await fan_out(call, registry, body)

    return work


def found(call: Call, name: str, registry: Registry) -> Route:
    """The route of a model that the caller may use.

    Raises:
        RequestError: `model_not_found`.

    """
    return registry.find(name, call.caller.models)


def list_models(registry: Registry, reconciler: Reconciler) -> Answers[resources.Cards]:
    """`GET /v1/models`: every enabled model, adapter and alias, whatever its state."""

    async def handle(request: web.Request) -> Reply[resources.Cards]:
        caller = caller_of(request)
        cards = [
            _card(name, route, reconciler)
            async for name, route in in_turns(registry.names().items())
            if reconciler.knows(route.base.spec.id) and caller.may_use(name)  # still
        ]
        return Reply({"object": "list", "data": cards})

    return handle


def retrieve_model(registry: Registry, reconciler: Reconciler) -> Answers[resources.Card]:
    """`GET /v1/models/{id}`."""

    async def handle(request: web.Request) -> Reply[resources.Card]:
        name = request.match_info["model_id"]
        route = registry.names().get(name)
        if route is None or not caller_of(request).may_use(name):
            raise model_not_found(name)
        return Reply(_card(name, route, reconciler))

    return handle


async def unsupported(request: web.Request) -> web.StreamResponse:
    """The OpenAI routes that no vLLM and no daemon serves."""
    why = "it is not offered here"
    if request.path.startswith("/v1/fine_tuning"):
        why += "; what was trained elsewhere is served as an adapter: [models.ID.adapters.NAME] with its path"
    raise RequestError("unsupported_endpoint", f"cannot {request.method} {request.path}: {why}")


def _card(name: str, route: Route, reconciler: Reconciler) -> resources.Card:
    spec, adapter = route.base.spec, route.base.spec.adapters.get(route.adapter)
    length = next((endpoint.max_model_len for endpoint in route.base.endpoints), spec.engine.max_model_len)
    tasks = next((endpoint.tasks for endpoint in route.base.endpoints), ())
    card: resources.Card = {
        "id": name,
        "object": "model",
        "created": int(reconciler.model(spec.id).created_at.timestamp()),
        "owned_by": "vllm-proxy",
        "root": adapter.path if adapter else spec.engine.model,
        "parent": None if name == spec.id else spec.id,
        "max_model_len": length if isinstance(length, int) else None,
    }
    if tasks:
        card["tasks"] = list(tasks)
    return card
