"""Moves the bytes of one request to an engine and of its answer back.

Its one rule: an answer that broke off never looks whole. What the client sent is forwarded as it came.
"""

from collections.abc import Iterable

import aiohttp
import structlog
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from vllm_proxy.domain.command import ENGINE_KEEPALIVE_SECONDS
from vllm_proxy.engine.registry import Lease
from vllm_proxy.errors import RequestError

log = structlog.get_logger()

_HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade"
    .split()
)  # fmt: skip
_OURS = frozenset({"host", "content-length", "authorization", "expect"})


def open_session() -> aiohttp.ClientSession:
    """The connections to engines: no limit, no deadline, nothing decoded, nothing added."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=ENGINE_KEEPALIVE_SECONDS / 2)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers={"User-Agent", "Accept", "Accept-Encoding", "Content-Type"},
        trust_env=False,
    )


async def relay(session: aiohttp.ClientSession, request: web.Request, body: bytes, lease: Lease) -> web.StreamResponse:
    """Send the request to the leased engine and its answer to the client, as it comes.

    Raises:
        RequestError: `engine_failed`, when the engine gave no answer.

    """
    engine = lease.endpoint
    headers = _kept(request.headers.items(), _named_by_connection(request.headers.getall("Connection", ())))
    headers["Authorization"] = f"Bearer {engine.credential}"
    url = URL(f"http://127.0.0.1:{engine.port}{request.raw_path}", encoded=True)
    try:
        answer = await session.request(request.method, url, data=body, headers=headers, allow_redirects=False)
    except (aiohttp.ClientError, TimeoutError) as error:
        log.warning("the engine gave no answer", instance=engine.instance, error=repr(error))
        raise RequestError("engine_failed", f"cannot get an answer from {engine.instance}: {error}") from error
    async with answer:
        return await _pass_on(request, answer, lease)


async def _pass_on(request: web.Request, answer: aiohttp.ClientResponse, lease: Lease) -> web.StreamResponse:
    headers = _kept(answer.headers.items(), _named_by_connection(answer.headers.getall("Connection", ())))
    if (length := answer.headers.get("Content-Length")) is not None:
        headers["Content-Length"] = length
    headers["X-Vllm-Proxy-Model"] = lease.model_id
    headers["X-Vllm-Proxy-Instance"] = lease.endpoint.instance
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
    except aiohttp.ClientError as error:
        log.warning("the engine broke off its answer", instance=lease.endpoint.instance, error=repr(error))
        if request.transport is not None:
            request.transport.abort()  # no last chunk: the client sees that it is incomplete
        raise ConnectionResetError from error
    await response.write_eof()
    return response


def _named_by_connection(values: Iterable[str]) -> frozenset[str]:
    return frozenset(name.strip().lower() for value in values for name in value.split(","))


def _kept(headers: Iterable[tuple[str, str]], named: frozenset[str]) -> CIMultiDict[str]:
    dropped = _HOP_BY_HOP | _OURS | named
    return CIMultiDict((name, value) for name, value in headers if name.lower() not in dropped)
