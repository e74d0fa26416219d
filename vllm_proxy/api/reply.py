"""Answers of handlers: JSON as a typed value, as the OpenAPI document describes it, or a stream of server-sent events.

Handlers return a `Reply` with one of `domain/resources.py`; none of them makes JSON itself.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from http import HTTPStatus

from aiohttp import web

from vllm_proxy.traffic.envelope import Handler, json_response

STREAM = web.RequestKey("stream", web.StreamResponse)  # the answer to a request, once it has begun
ALIVE = b":\n\n"  # a comment as keep-alive, so that no proxy in between times a silent stream out


@dataclass(frozen=True, slots=True)
class Reply[T]:
    """What is answered: one of `domain.resources`, with a status and headers."""

    value: T
    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


type Answers[T] = Callable[[web.Request], Awaitable[Reply[T]]]  # a handler


def answered[T](handler: Callable[[web.Request], Awaitable[Reply[T] | web.StreamResponse]]) -> Handler:
    """A handler for the router. What it wraps says what it answers."""

    @wraps(handler)
    async def handle(request: web.Request) -> web.StreamResponse:
        answer = await handler(request)
        if not isinstance(answer, Reply):
            return answer
        return json_response(answer.value, status=answer.status, headers=answer.headers)

    return handle


async def begin_events(request: web.Request) -> web.StreamResponse:
    """The head of a stream of server-sent events is sent; they may follow."""
    headers = {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",
    }
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    request[STREAM] = response
    return response


def etag(revision: str) -> dict[str, str]:
    """The header that says of which revision of the file an answer speaks."""
    return {"ETag": f'"{revision}"'}
