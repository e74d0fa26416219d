"""One inference request: its id, its times, what it became. Written down once, when it ends, whatever ends it."""

import asyncio
import itertools
import os
import re
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import structlog
from aiohttp import web

from vllm_proxy.api.envelope import error_response
from vllm_proxy.errors import RequestError

log = structlog.get_logger()

CLIENT_GONE = 499  # nginx's status for a client that left before its answer was complete; only ever logged
_USABLE_ID = re.compile(r"[!-~]{1,200}")
_boot = os.urandom(8).hex()
_numbers = itertools.count()


class Call:
    """A request for inference. `route` is the path of the route table, never what the client sent."""

    __slots__ = (
        "bytes_out", "first_byte_at", "instance", "model", "queue_seconds", "request", "request_id", "retries", "route",
        "sent_at", "started_at", "status",
    )  # fmt: skip

    def __init__(self, request: web.BaseRequest, route: str) -> None:
        self.request = request
        self.route = route
        given = request.headers.get("X-Request-Id", "")
        self.request_id = given if _USABLE_ID.fullmatch(given) else f"{_boot}{next(_numbers):x}"
        self.started_at = time.monotonic()
        self.sent_at = 0.0  # when the engine was sent the request
        self.first_byte_at = 0.0
        self.queue_seconds = 0.0
        self.model = ""  # the configured id, once it is known
        self.instance = ""
        self.status = 0
        self.bytes_out = 0
        self.retries = 0

    @property
    def is_anthropic(self) -> bool:
        """Whether the client speaks Anthropic's API, which has an envelope of its own."""
        return self.route.startswith("/v1/messages")


type Observer = Callable[[Call], None]
type Work = Callable[[Call], Awaitable[web.StreamResponse]]


def observed(route: str, work: Work, observe: Observer) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """A handler that does `work`, answers its errors in the envelope of the route, and tells `observe` the end."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        call = Call(request, route)
        try:
            return await work(call)
        except RequestError as error:
            return _refuse(call, error)
        except (asyncio.CancelledError, ConnectionError):
            call.status = call.status or CLIENT_GONE
            raise
        except Exception:
            log.exception("a request failed by a fault of the daemon", path=route, request_id=call.request_id)
            return _refuse(call, RequestError("internal_error", "cannot answer: a fault of the daemon, see its log"))
        finally:
            observe(call)

    return handle


def _refuse(call: Call, error: RequestError) -> web.StreamResponse:
    call.status = error.status
    response = error_response(error, anthropic=call.is_anthropic)
    response.headers["X-Request-Id"] = call.request_id
    if call.model:
        response.headers["X-Vllm-Proxy-Model"] = call.model
    if error.status in {HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNSUPPORTED_MEDIA_TYPE}:
        response.force_close()  # the rest of the body is not worth reading
    return response
