"""A route of our own with the scope that it needs: callers are let in before anything of a request is looked at.

Inference has a guard of its own, `traffic/call.py`, since it is what has to be fast. Who may do what is decided in
`traffic/access.py`.
"""

import asyncio
from dataclasses import dataclass
from functools import wraps
from typing import cast

from aiohttp import web

from vllm_proxy.api.reply import STREAM
from vllm_proxy.domain.keys import Scope
from vllm_proxy.errors import RequestError, model_not_found
from vllm_proxy.fleet.outcome import Author
from vllm_proxy.traffic.access import CONTROL, Access, Admission, check_body_type, who
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.envelope import Handler, error_event
from vllm_proxy.traffic.front import client_of, withdraw_cancellation
from vllm_proxy.traffic.head import read_head


@dataclass(frozen=True, slots=True)
class Route:
    """A route of our own. `scope`: what its callers need; None: everybody may use it.

    `of_itself`: without that scope a key is let in all the same, and may see what is about itself.
    """

    method: str
    path: str  # as the router takes it
    scope: Scope | None
    handler: Handler
    of_itself: bool = False


class Observed(Route):
    """A route for inference, whose handler lets its callers in itself."""


def guarded(route: Route, access: Access, budget: Budget) -> Handler:
    """The handler of a route, for those who may use it. What a request holds of the budget ends with it."""

    @wraps(route.handler)
    async def handle(request: web.Request) -> web.StreamResponse:
        client = client_of(request)
        admission = client.admission = _let_in(request, route, access)
        try:
            return await route.handler(request)
        except asyncio.CancelledError:
            if admission.revoked is None or not withdraw_cancellation():
                raise
            return await _ended(request, admission.revoked)
        finally:
            budget.release(client)

    return handle


def _let_in(request: web.Request, route: Route, access: Access) -> Admission:
    client = client_of(request)
    head, _ = read_head(request.raw_headers)
    if route.scope is None:
        caller = access.whoever(head, client)
    else:
        caller = (access.of_itself if route.of_itself else access.caller)(head, client, route.scope)
    if caller is not CONTROL:
        check_body_type(request)
    model = request.match_info.get("model_id", "")
    if model and route.scope in {Scope.READ, Scope.OPERATE} and not caller.may_use(model):
        raise model_not_found(model)
    return Admission(caller, None if route.of_itself else route.scope, model)


def author_of(request: web.Request) -> Author:
    """Who sends a request that changes something. Until it commits that, the change ends with its key."""
    client = client_of(request)
    admission = cast("Admission", client.in_progress)
    return Author(who(admission.caller, client), f"{request.method} {request.path}", admission.commit)


async def _ended(request: web.Request, error: RequestError) -> web.StreamResponse:
    """The end of a request whose key was revoked."""
    stream: web.StreamResponse | None = request.get(STREAM)
    if stream is None:
        raise error
    await stream.write(error_event(error))
    return stream
