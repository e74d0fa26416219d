"""The routes for Prometheus, `/metrics` and `/metrics/engines`: what a scraper asks for beside the text itself.

Its deadline counts for the engines that are asked, and what it accepts decides on the format and on compression, which
is done in a thread.
"""

import asyncio
import gzip
import math

from aiohttp import web

from vllm_proxy.api.engine_metrics import EngineMetrics
from vllm_proxy.api.guard import Route
from vllm_proxy.api.metrics import Metrics
from vllm_proxy.domain import exposition, openmetrics
from vllm_proxy.domain.keys import Scope

_TIMEOUT = "X-Prometheus-Scrape-Timeout-Seconds"
_PART_OF_TIMEOUT = 0.8  # the rest is for making and sending the text
_SECONDS = 5.0  # for engines, where a scraper does not say how long it waits
_MOST_SECONDS = 60.0
_WORTH_BYTES = 1024
_LEVEL = 1  # a text of these shrinks to a twentieth; more effort takes ten times longer for little


def routes(metrics: Metrics, engines: EngineMetrics, *, traced: bool) -> list[Route]:
    """All of them. `traced`: requests are, so OpenMetrics with exemplars is there for who asks for it."""

    async def own(request: web.Request) -> web.Response:
        """`GET /metrics`."""
        if not traced:
            return await _answer(request, await metrics.text())
        chosen = openmetrics.is_preferred(",".join(request.headers.getall("Accept", ())))
        kind = openmetrics.CONTENT_TYPE if chosen else exposition.CONTENT_TYPE
        return await _answer(request, await metrics.text(openmetrics=chosen), kind, "Accept, Accept-Encoding")

    async def of_engines(request: web.Request) -> web.Response:
        """`GET /metrics/engines`."""
        everything = request.query.get("all") in {"1", "true"}
        return await _answer(request, await engines.text(_seconds(request), everything=everything))

    return [
        Route("GET", "/metrics", Scope.METRICS, own),
        Route("GET", "/metrics/engines", Scope.METRICS, of_engines),
    ]


async def _answer(
    request: web.Request, text: bytes, kind: str = exposition.CONTENT_TYPE, vary: str = "Accept-Encoding"
) -> web.Response:
    headers = {"Content-Type": kind, "Vary": vary}
    if len(text) >= _WORTH_BYTES and accepts_gzip(request.headers.get("Accept-Encoding", "")):
        text = await asyncio.to_thread(gzip.compress, text, _LEVEL)
        headers["Content-Encoding"] = "gzip"
    return web.Response(body=text, headers=headers)


def accepts_gzip(header: str) -> bool:
    """Whether an `Accept-Encoding` names gzip, and does not refuse it with `q=0`."""
    for item in header.lower().split(","):
        coding, _, parameter = item.partition(";")
        if coding.strip() in {"gzip", "*"}:
            quality = parameter.strip().removeprefix("q=")
            return not quality or quality.strip("0.") != ""
    return False


def _seconds(request: web.Request) -> float:
    """How long engines may take to answer."""
    try:
        told = float(request.headers.get(_TIMEOUT, ""))
    except ValueError:
        return _SECONDS
    return min(told * _PART_OF_TIMEOUT, _MOST_SECONDS) if told > 0 and math.isfinite(told) else _SECONDS
