"""OpenTelemetry traces: one span for each inference request, above the one of its engine.

Tracing is on where `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is set and the packages of the
extra `otel` are there; OpenTelemetry's standard variables say all the rest. Spans carry no `gen_ai.*` attributes:
vLLM's own have them, and whoever counts generations by them would count each twice.
"""

import asyncio
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import structlog

from vllm_proxy.traffic.call import CLIENT_GONE, Call

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = structlog.get_logger()

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SPOKEN = "http/protobuf"
_PARENT = re.compile(rb"(?im)^traceparent: *([^\r\n]*)\r\n")
_STATE = re.compile(rb"(?im)^tracestate: *([^\r\n]*)\r\n")
_NOT_SAMPLED = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f][02468ace]")
_NANOSECONDS = 10**9
_LAST_SECONDS = 3.0  # that the end of the daemon waits for a collector


class Traced:
    """The span of one request, from its head to its end."""

    def __init__(self, span: "Span", began: int) -> None:
        self._span = span
        self._began = began

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def end(self, call: Call) -> None:
        """Say what came of it."""
        from opentelemetry.trace import StatusCode  # noqa: PLC0415 - of the extra

        def at(moment: float) -> int:
            return self._began + int((moment - call.started_at) * _NANOSECONDS)

        span = self._span
        if call.sent_at:
            span.add_event("leased", timestamp=at(call.sent_at))
        if call.first_byte_at:
            span.add_event("first_byte", timestamp=at(call.first_byte_at))
        span.set_attributes(_attributes(call))
        if call.status >= 500 or (call.code is not None and call.status < 400):
            span.set_status(StatusCode.ERROR, call.code)
        span.end(at(call.ended_at))


class Traces:
    """Makes the spans of requests, which are sent in batches by a thread of OpenTelemetry's own."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.context import Context  # noqa: PLC0415 - of the extra
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 - as above
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - as above
            TraceContextTextMapPropagator,
        )

        self._provider = provider
        self._tracer = provider.get_tracer("vllm_proxy")
        self._parent = TraceContextTextMapPropagator()
        self._root = Context()
        self._kind = SpanKind.SERVER
        sampled = provider.sampler.get_description()
        self._follows_parents = (
            sampled.startswith("ParentBased{") and "remoteParentNotSampled:AlwaysOffSampler" in sampled
        )

    def begin(self, call: Call) -> None:
        """Begin the span of a request, below that of its client; its engine gets it for a parent, if it is sampled."""
        began = time.time_ns()
        found = _PARENT.search(call.forwarded)
        if found is not None and self._follows_parents and _NOT_SAMPLED.fullmatch(found[1]):
            return  # as the sampler would decide, in a tenth of the time
        context = self._root
        if found is not None:
            carrier = {"traceparent": found[1].decode("latin-1")}
            if (state := _STATE.search(call.forwarded)) is not None:
                carrier["tracestate"] = state[1].decode("latin-1")
            context = self._parent.extract(carrier, self._root)
        method = call.request.method
        span = self._tracer.start_span(
            f"{method} {call.route}",
            context,
            self._kind,
            {"http.request.method": method, "http.route": call.route, **_server(call)},
            start_time=began,
        )
        if not span.is_recording():
            return
        ids = span.get_span_context()
        rest = call.forwarded if found is None else _PARENT.sub(b"", call.forwarded)
        call.forwarded = b"%straceparent: 00-%032x-%016x-01\r\n" % (rest, ids.trace_id, ids.span_id)
        call.trace = Traced(span, began)

    async def close(self) -> None:
        """Send what is left, as far as the collector takes it soon."""
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                await asyncio.to_thread(self._provider.shutdown)
        except TimeoutError:
            log.warning("the last traces are lost: their collector does not answer", seconds=_LAST_SECONDS)


def from_environment(environ: Mapping[str, str]) -> Traces | None:
    """As OpenTelemetry's variables have it; None where traces go nowhere."""
    where = next((name for name in _ENDPOINTS if environ.get(name)), None)
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    if where is None or off:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - of the extra
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - as above
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - as above
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - as above
    except ImportError as error:
        log.warning("there are no traces: install vllm-proxy[otel]", variable=where, why=str(error))
        return None
    asked = next((environ[name] for name in _PROTOCOLS if environ.get(name)), _SPOKEN)
    if asked != _SPOKEN:
        log.warning("traces are sent in another protocol than was asked for", asked=asked, sent=_SPOKEN)
    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {"service.name": "vllm-proxy"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    log.info("requests are traced", variable=where)
    return Traces(provider)


def _server(call: Call) -> dict[str, str | int]:
    """Where the client believes the server to be."""
    host = call.head.get(b"host", b"").decode("latin-1")
    name, _, port = host.rpartition(":")
    if port.isascii() and port.isdigit() and len(port) <= 5:
        return {"server.address": name, "server.port": int(port)}
    return {"server.address": host}


def _attributes(call: Call) -> dict[str, str | int | float]:
    found: dict[str, str | int | float] = {
        "vllm_proxy.request_id": call.request_id.decode(),
        "vllm_proxy.queue_seconds": call.queue_seconds,
        "vllm_proxy.retries": call.retries,
    }
    if call.model:
        found["vllm_proxy.model"] = call.model
    if call.instance:
        found["vllm_proxy.replica"] = int(call.instance.rpartition("/")[2])
    if call.status != CLIENT_GONE:
        found["http.response.status_code"] = call.status
    if call.code is not None:
        found["error.type"] = call.code
    elif call.status == CLIENT_GONE:
        found["error.type"] = "client_gone"
    elif call.status >= 500:
        found["error.type"] = str(call.status)
    return found
