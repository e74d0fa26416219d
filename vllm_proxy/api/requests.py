"""`/requests`: what is in flight and the last 1,000 that were, without bodies and keys; and to cancel one.

Who may read sees the requests of the models that its key may use. JSON is made here, of the calls themselves, when
somebody asks.
"""

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import islice

from aiohttp import web

from vllm_proxy.api.guard import author_of
from vllm_proxy.api.models import rfc3339
from vllm_proxy.api.reply import Answers, Reply
from vllm_proxy.domain import feed_resources, tokens
from vllm_proxy.errors import RequestError, model_not_found
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.runtime.turns import in_turns
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.front import caller_of, client_of
from vllm_proxy.traffic.keyring import Caller
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.requests import KEPT, Requests, cancel

_LIMIT = 100


def list_requests(requests: Requests, registry: Registry) -> Answers[feed_resources.Requests]:
    """`GET /requests`: of one model or of all, at most `limit` in each list."""

    async def handle(request: web.Request) -> Reply[feed_resources.Requests]:
        caller, wanted, limit = caller_of(request), request.query.get("model"), _limit(request.query.get("limit", ""))
        if wanted and not caller.may_use(wanted):
            raise model_not_found(wanted)
        model = registry.find(wanted).spec.id if wanted else None

        async def shown(calls: Iterable[Call]) -> list[feed_resources.Request]:
            found = (call for call in calls if _may_see(caller, call) and (model is None or call.model == model))
            return [_request(call) async for call in in_turns(islice(found, limit))]

        active = await shown(list(requests.active))
        recent = await shown(list(reversed(requests.recent)))
        return Reply({"active": active, "recent": recent}, headers=_NOT_KEPT)

    return handle


def get_request(requests: Requests) -> Answers[feed_resources.Request]:
    """`GET /requests/{request_id}`: by the client's id or the engine's; of several with one id the newest."""

    async def handle(request: web.Request) -> Reply[feed_resources.Request]:
        caller, request_id = caller_of(request), request.match_info["request_id"]
        for call in (*reversed(requests.in_progress(request_id)), *requests.ended(request_id)):
            if _may_see(caller, call):
                return Reply(_request(call), headers=_NOT_KEPT)
        raise RequestError(
            "not_found", f"cannot find request {request_id!r}: it is not in flight, nor among the last {KEPT}"
        )

    return handle


def cancel_request(requests: Requests, desired: Desired) -> Answers[feed_resources.Request]:
    """`DELETE /requests/{request_id}`: 202; its engine stops working on it, and its client's answer ends."""

    async def handle(request: web.Request) -> Reply[feed_resources.Request]:
        caller, request_id = caller_of(request), request.match_info["request_id"]
        found = [call for call in requests.in_progress(request_id) if _may_see(caller, call)]
        if not found:
            raise RequestError("not_found", f"cannot cancel request {request_id!r}: it is not in flight")
        author = author_of(request)
        author.commit()
        shown = _request(found[-1])
        for call in found:
            cancel(call)
        desired.record(author)
        return Reply(shown, 202)

    return handle


_NOT_KEPT = {"Cache-Control": "no-store"}


def _may_see(caller: Caller, call: Call) -> bool:
    return caller.models is None or call.model in caller.models


def _limit(text: str) -> int:
    if not text:
        return _LIMIT
    if text.isascii() and text.isdecimal() and len(text) < 9:
        return min(int(text), KEPT)
    raise RequestError("bad_request", f"cannot read limit={text}: expected a number of requests")


def _request(call: Call) -> feed_resources.Request:
    ended = call.ended_at > 0
    now = call.ended_at or time.monotonic()
    exchange = None if ended else client_of(call.request).exchange
    status = call.status or (exchange.passed_status if exchange else 0)
    first_byte_at = call.first_byte_at or (exchange.first_byte_at if exchange else 0.0)
    began = datetime.now(UTC).timestamp() - (time.monotonic() - call.started_at)
    used = call.tokens or (tokens.of_event(call.usage) if call.usage else None)
    return {
        "id": call.request_id.decode(),
        "engine_id": call.engine_id.decode(),
        "model": call.model or None,
        "replica": int(call.instance.rpartition("/")[2]) if call.instance else None,
        "route": call.route,
        "state": "ended" if ended else "streaming" if status else "waiting" if call.instance else "queued",
        "since": rfc3339(datetime.fromtimestamp(began, UTC)),
        "bytes": call.bytes_out or (exchange.body_bytes if exchange else 0),
        "client": _address(call.peer if ended else client_of(call.request).peername),
        "key": None if call.caller.is_anonymous else call.caller.name,
        "status": status or None,
        "code": call.code,
        "seconds": round(now - call.started_at, 4),
        "queue_seconds": round(call.queue_seconds, 4),
        "first_byte": round(first_byte_at - call.started_at, 4) if first_byte_at else None,
        "retries": call.retries,
        "prompt_tokens": used.prompt if used else None,
        "completion_tokens": used.completion if used else None,
    }


def _address(peer: object) -> str | None:
    """What a socket says of its other end, without the port; of a Unix socket nothing."""
    return str(peer[0]) if isinstance(peer, tuple | list) and peer else None
