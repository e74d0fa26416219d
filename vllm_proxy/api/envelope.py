"""Errors as HTTP answers: OpenAI's envelope, made in one place."""

from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus

import msgspec
import structlog
from aiohttp import web

from vllm_proxy.api.head import request_id
from vllm_proxy.errors import InvalidError, Problem, RequestError

log = structlog.get_logger()

type Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Source: Anthropic's API reference, "Errors".
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    415: "invalid_request_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def error_response(error: RequestError, *, anthropic: bool = False) -> web.Response:
    """`{"error": {"message", "type", "param", "code"}}` with the status of its code, or Anthropic's envelope."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if anthropic:
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        body = {"type": "error", "error": {"type": kind, "message": error.message, "code": error.code}}
        return json_response(body, status=error.status, headers=headers)
    return _response(
        error.status,
        error.message,
        error.code,
        error.param,
        headers,
        problems=error.problems if isinstance(error, InvalidError) else (),
    )


def _response(
    status: int,
    message: str,
    code: str,
    param: str | None,
    headers: dict[str, str],
    *,
    problems: Sequence[Problem] = (),
) -> web.Response:
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    error: dict[str, object] = {"message": message, "type": kind, "param": param, "code": code}
    if problems:
        error["problems"] = [{"path": item.path, "line": item.line, "message": item.message} for item in problems]
    return json_response({"error": error}, status=status, headers=headers)


def json_response(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A value as JSON."""
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


@web.middleware
async def envelope(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into an answer, and give every answer its X-Request-Id."""
    response = await _answer(request, handler)
    if isinstance(response, web.Response) and "X-Request-Id" not in response.headers:
        given = request.headers.get("X-Request-Id", "").encode("utf-8", "surrogateescape")
        response.headers["X-Request-Id"] = request_id(given).decode()
    return response


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return error_response(error)
    except web.HTTPException as error:
        code = _CODES.get(error.status)
        if code is None:
            raise
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return _response(error.status, _message(request, error), code, None, headers)
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("a request failed by a fault of the daemon", path=request.path)
        return error_response(RequestError("internal_error", "cannot answer: a fault of the daemon, see its log"))


def _message(request: web.Request, error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return "cannot take this request: its body is larger than server.max_body_size"
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"cannot {request.method} {request.path}: it takes {', '.join(sorted(error.allowed_methods))}"
    return f"cannot find {request.path}: see GET / for what there is"
