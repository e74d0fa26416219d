"""A collector of traces, by OTLP over HTTP, for the tests."""

import asyncio
import gzip
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.harness import WAIT_SECONDS


class Collector:
    """A collector of OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.service = ""
        self._more = asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self.server = TestServer(app)

    async def _take(self, asked: web.Request) -> web.Response:
        data = await asked.read()
        found = ExportTraceServiceRequest.FromString(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        for resource in found.resource_spans:
            self.service = next(
                one.value.string_value for one in resource.resource.attributes if one.key == "service.name"
            )
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self._more.set()
        return web.Response(content_type="application/x-protobuf")

    async def of(self, request_id: str) -> Span:
        """The span of a request, once it is there."""
        return await self.find(lambda span: attributes(span).get("vllm_proxy.request_id") == request_id)

    async def find(self, holds: Callable[[Span], bool]) -> Span:
        """The first span of which something holds, once it is there."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                for span in self.spans:
                    if holds(span):
                        return span
                self._more.clear()
                await self._more.wait()


def attributes(span: Span) -> dict[str, Any]:
    """Those of a span, as Python has them."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in span.attributes}
