"""Errors as HTTP answers, in the envelope of OpenAI's API or of Anthropic's.

`envelope` turns exceptions of the handlers of our own routes into answers; `call.observed` does so for inference, and
`client.handle_error` for what aiohttp's parser refuses, both with what is here. An exception that is not ours is a bug:
it is logged, and answered as `internal_error` without its text.
"""

import math
import re
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

import msgspec
import structlog
from aiohttp import web

from vllm_proxy.domain import resources
from vllm_proxy.errors import AccessError, InvalidError, LimitError, RequestError
from vllm_proxy.traffic.head import request_id
from vllm_proxy.traffic.routes import is_anthropic, without_version

log = structlog.get_logger()

type Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_OLLAMA = re.compile(r"/api/(tags|version|ps|chat|generate|embed|embeddings|show|pull)/?$")
_WORTH_WAITING_SECONDS = 60  # for longer a client should tell its user
# Source: Anthropic's API reference, "Errors". Other statuses: by their first digit.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_response(error: RequestError, *, anthropic: bool = False) -> web.Response:
    """`{"error": {"message", "type", "param", "code"}}` with the status of its code, or Anthropic's envelope."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if isinstance(error, AccessError):
        headers["WWW-Authenticate"] = error.challenge
    if isinstance(error, LimitError):
        headers |= _when_to_retry(error)
    elif error.status == HTTPStatus.NOT_IMPLEMENTED:  # clients send every 5xx again, and this one stays
        headers["x-should-retry"] = "false"
    body = _anthropic_body(error) if anthropic else _openai_body(error)
    return json_response(body, status=error.status, headers=headers)


def _when_to_retry(error: LimitError) -> dict[str, str]:
    """What clients read before Retry-After. The one of OpenAI gives up where it shall wait long, Anthropic's waits."""
    headers = {} if error.wait == math.inf else {"retry-after-ms": str(math.ceil(error.wait * 1000))}
    if error.wait > _WORTH_WAITING_SECONDS:
        headers["x-should-retry"] = "false"
    return headers


def error_event(error: RequestError, *, anthropic: bool = False) -> bytes:
    """An error as the last event of a stream that has begun."""
    if anthropic:
        return b"event: error\ndata: %s\n\n" % msgspec.json.encode(_anthropic_body(error))
    return b"data: %s\n\n" % msgspec.json.encode(_openai_body(error))


def _anthropic_body(error: RequestError) -> resources.AnthropicError:
    body: resources.AnthropicErrorBody = {
        "type": anthropic_type(error.status),
        "message": _text(error),
        "code": error.code,
    }
    return {"type": "error", "error": body}


def anthropic_type(status: int) -> str:
    """What Anthropic's API calls an error with this status."""
    other = "api_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return _ANTHROPIC_TYPES.get(status, other)


def _openai_body(error: RequestError) -> resources.Error:
    details: resources.ErrorBody = {
        "message": _text(error),
        "type": _openai_type(error),
        "param": error.param,
        "code": error.code,
    }
    if isinstance(error, InvalidError):
        details["problems"] = resources.problems_of(error.problems)
    return {"error": details}


def _openai_type(error: RequestError) -> resources.ErrorType:
    if isinstance(error, LimitError):
        return error.kind
    return "server_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def _text(error: RequestError) -> str:
    return error.message.encode("utf-8", "backslashreplace").decode()  # it may repeat bytes that are no text


def refusal(request: web.BaseRequest, error: RequestError) -> web.Response:
    """An error as the answer to a request outside of a call: in the envelope of its path, with an X-Request-Id."""
    response = error_response(error, anthropic=is_anthropic(request.path))
    response.headers["X-Request-Id"] = _id_of(request)
    if is_anthropic(request.path):
        response.headers["request-id"] = response.headers["X-Request-Id"]  # where Anthropic's clients look
    return response


def _id_of(request: web.BaseRequest) -> str:
    given = request.headers.get("X-Request-Id", "").encode("utf-8", "surrogateescape")
    return request_id(given).decode()


def json_response(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A value as JSON."""
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


async def identify(request: web.Request, response: web.StreamResponse) -> None:
    """Give an answer its X-Request-Id, streams included, before its head is sent: aiohttp's signal."""
    if "X-Request-Id" not in response.headers:
        response.headers["X-Request-Id"] = _id_of(request)


@web.middleware
async def envelope(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into an answer."""
    try:
        return await handler(request)
    except RequestError as error:
        response = refusal(request, error)
        if not request.content.is_eof():
            response.force_close()  # do not read the rest of its body
        return response
    except web.HTTPException as error:
        response = refusal(request, as_request_error(request, error))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("a request failed by a fault of the daemon", path=request.path)
        return refusal(request, RequestError("internal_error", "cannot answer: a fault of the daemon, see its log"))


def as_request_error(request: web.BaseRequest, error: web.HTTPException) -> RequestError:
    """What aiohttp itself answers (no such path, no such method, ...) as one of our errors."""
    if isinstance(error, web.HTTPNotFound):
        meant = without_version(request.path.rstrip("/"))
        see = "see GET / for what there is" if meant is None else f"there is {meant}; clients need a base URL with /v1"
        if _OLLAMA.match(request.path):
            see = "this is not Ollama's API: use an OpenAI connection, whose base URL ends in /v1"
        return RequestError("not_found", f"cannot find {request.path}: {see}")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return RequestError("method_not_allowed", f"cannot {request.method} {request.path}: it takes {allowed}")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        msg = "cannot take this request: its body is larger than server.max_body_size"
        return RequestError("request_too_large", msg)
    return RequestError("bad_request", f"cannot take this request: {(error.text or error.reason).strip()}")
