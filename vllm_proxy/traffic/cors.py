"""CORS: which web pages of other origins may read answers (`server.cors_origins`).

A page may always send a simple request; without these headers its browser withholds the answer. Requests of pages that
have no key are refused in `access`, whatever they are for. A request without `Origin` must cost nothing here. Source:
the Fetch standard, "CORS protocol".
"""

from collections.abc import Callable, Mapping

from aiohttp import web

from vllm_proxy.domain.config import Server
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.envelope import Handler
from vllm_proxy.traffic.routes import is_inference

_LIMITED = ("limit", "remaining", "reset")
_EXPOSED = ", ".join(
    [
        *("X-Request-Id", "request-id", "X-Vllm-Proxy-Model", "X-Vllm-Proxy-Instance", "ETag", "Location"),
        *("Retry-After", "retry-after-ms", "x-should-retry"),
        *(f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in _LIMITED),
        *(f"anthropic-ratelimit-{of}-{what}" for of in ("requests", "tokens") for what in _LIMITED),
    ]
)
_REMEMBERED_SECONDS = 600  # for how long a browser may cache a preflight


class Cors:
    """The rules of the `[server]` table, as it is now."""

    def __init__(self, server: Callable[[], Server]) -> None:
        self._server = server

    def headers(self, origin: str | None, path: str) -> Mapping[str, str]:
        """Headers of an answer to a request of this origin; none where it is not allowed. "*" is for inference."""
        allowed = self._server().cors_origins
        if origin is None or not allowed:
            return {}
        if "*" in allowed and is_inference(path):
            return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": _EXPOSED}
        if origin not in allowed:
            return {"Vary": "Origin"}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": _EXPOSED,
            "Vary": "Origin",
        }

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Before the head of an answer is sent: aiohttp's signal."""
        if "Origin" in request.headers:
            response.headers.update(self.headers(request.headers["Origin"], request.path))

    @web.middleware
    async def preflight(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer the preflight request of a browser, which precedes a request that is not simple."""
        origin, method = request.headers.get("Origin"), request.headers.get("Access-Control-Request-Method")
        error = request.match_info.http_exception
        if request.method != "OPTIONS" or not origin or not method or not isinstance(error, web.HTTPMethodNotAllowed):
            return await handler(request)
        if "Access-Control-Allow-Origin" not in self.headers(origin, request.path):
            msg = f"cannot answer a page of {origin!r}: add it to server.cors_origins"
            raise RequestError("origin_not_allowed", msg)
        headers = {
            "Access-Control-Allow-Methods": ", ".join(sorted(error.allowed_methods)),
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
            "Access-Control-Max-Age": str(_REMEMBERED_SECONDS),
        }
        if "Access-Control-Request-Private-Network" in request.headers:
            headers["Access-Control-Allow-Private-Network"] = "true"
        return web.Response(status=204, headers=headers)
