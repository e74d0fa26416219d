"""OpenTelemetry traces: one span for each inference request, above the one of its engine.

Tracing is on where `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is set and the packages of the
extra `otel` are there; OpenTelemetry's standard variables say all the rest. Spans carry no `gen_ai.*` attributes:
vLLM's own have them, and whoever counts generations by them would count each twice.

The SDK's sampler decides and its processor sends; a span itself is made whole when its request has ended, of what the
call knows then, for a third of what one costs that is begun, added to and ended under locks.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import structlog

from vllm_proxy.traffic.call import CLIENT_GONE, Call

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import Event, SpanProcessor, TracerProvider
    from opentelemetry.trace import SpanContext

log = structlog.get_logger()

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SPOKEN = "http/protobuf"
_PARENT = re.compile(rb"(?im)^traceparent: *([^\r\n]*)\r\n")
_STATE = re.compile(rb"(?im)^tracestate: *([^\r\n]*)\r\n")
_NOT_SAMPLED = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f][02468ace]")
_NANOSECONDS = 10**9
_LIMITS = frozenset(
    f"OTEL_{what}_LIMIT"
    for what in ("ATTRIBUTE_COUNT", "ATTRIBUTE_VALUE_LENGTH", "SPAN_ATTRIBUTE_COUNT", "SPAN_ATTRIBUTE_VALUE_LENGTH",
                 "SPAN_EVENT_COUNT")
)  # fmt: skip

type _Limited = Callable[[Mapping[str, _Value], Sequence[Event]], tuple[Mapping[str, _Value], Sequence[Event]]]
type _Value = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]

_LAST_SECONDS = 3.0  # that the end of the daemon waits for a collector


class Traced:
    """The span of one request, from its head to its end."""

    def __init__(
        self,
        traces: "Traces",
        name: str,
        context: "SpanContext",
        parent: "SpanContext | None",
        attributes: Mapping[str, _Value],
    ) -> None:
        """`context`: its ids. `attributes`: what is known at its beginning."""
        self._traces = traces
        self._name = name
        self._context = context
        self._parent = parent
        self._attributes = attributes
        self._began = time.time_ns()

    @property
    def trace_id(self) -> str:
        """Of its trace, 32 hexadecimal digits."""
        return f"{self._context.trace_id:032x}"

    def end(self, call: Call) -> None:
        """Say what came of it."""
        traces = self._traces

        def at(moment: float) -> int:
            return self._began + int((moment - call.started_at) * _NANOSECONDS)

        moments = (("leased", call.sent_at), ("first_byte", call.first_byte_at))
        is_error = call.status >= 500 or (call.code is not None and call.status < 400)
        attributes: Mapping[str, _Value] = {**self._attributes, **_attributes(call)}
        events: Sequence[Event] = [traces.sdk.Event(name, timestamp=at(moment)) for name, moment in moments if moment]
        if traces.limited is not None:
            attributes, events = traces.limited(attributes, events)
        span = traces.sdk.ReadableSpan(
            self._name,
            self._context,
            self._parent,
            traces.resource,
            attributes,
            events,
            kind=traces.kind,
            status=traces.status(call.code) if is_error else traces.unset,
            start_time=self._began,
            end_time=at(call.ended_at),
            instrumentation_scope=traces.scope,
        )
        traces.processor.on_end(span)


class Traces:
    """Makes the spans of requests, which are sent in batches by a thread of OpenTelemetry's own."""

    def __init__(
        self, provider: "TracerProvider", processor: "SpanProcessor", limited: "_Limited | None" = None
    ) -> None:
        """`provider`: its sampler decides, and its ids are given; `processor`: of it, gets the spans.

        `limited`: cuts what a span has to what OpenTelemetry's variables allow.
        """
        from opentelemetry import trace  # noqa: PLC0415 - of the extra
        from opentelemetry.context import Context  # noqa: PLC0415 - as above
        from opentelemetry.sdk import trace as sdk  # noqa: PLC0415 - as above
        from opentelemetry.sdk.trace.sampling import Decision  # noqa: PLC0415 - as above
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415 - as above
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - as above
            TraceContextTextMapPropagator,
        )

        self.sdk = sdk
        self.processor = processor
        self.limited = limited
        self.resource = provider.resource
        self.scope = InstrumentationScope("vllm_proxy")
        self.kind = trace.SpanKind.SERVER
        self.unset = trace.Status(trace.StatusCode.UNSET)
        self.status = partial(trace.Status, trace.StatusCode.ERROR)
        self._api = trace
        self._provider = provider
        self._yes = Decision.RECORD_AND_SAMPLE
        self._sampled = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        self._parent = TraceContextTextMapPropagator()
        self._root = Context()
        sampled = provider.sampler.get_description()
        self._follows_parents = (
            sampled.startswith("ParentBased{") and "remoteParentNotSampled:AlwaysOffSampler" in sampled
        )

    def begin(self, call: Call) -> None:
        """Begin the span of a request, below that of its client; its engine gets it for a parent, if it is sampled."""
        found = _PARENT.search(call.forwarded)
        context, parent = self._root, None
        if found is not None:
            if self._follows_parents and _NOT_SAMPLED.fullmatch(found[1]):
                return  # as the sampler would decide, in a tenth of the time
            context = self._context_of(found[1], call)
            parent = self._api.get_current_span(context).get_span_context()
            if not parent.is_valid:
                parent = None
        ids = self._provider.id_generator
        trace_id = ids.generate_trace_id() if parent is None else parent.trace_id
        method = call.request.method
        known = {"http.request.method": method, "http.route": call.route, **_server(call)}
        name = f"{method} {call.route}"
        decided = self._provider.sampler.should_sample(context, trace_id, name, self.kind, known)
        if decided.decision is not self._yes:
            return
        span_id = ids.generate_span_id()
        own = self._api.SpanContext(trace_id, span_id, False, self._sampled, decided.trace_state)  # noqa: FBT003 - its order
        rest = call.forwarded if found is None else _PARENT.sub(b"", call.forwarded)
        call.forwarded = b"%straceparent: 00-%032x-%016x-01\r\n" % (rest, trace_id, span_id)
        call.trace = Traced(self, name, own, parent, known if decided.attributes is None else decided.attributes)

    def _context_of(self, parent: bytes, call: Call) -> "Context":
        carrier = {"traceparent": parent.decode("latin-1")}
        if (state := _STATE.search(call.forwarded)) is not None:
            carrier["tracestate"] = state[1].decode("latin-1")
        return self._parent.extract(carrier, self._root)

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
    off = (
        environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    )
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
    processor = BatchSpanProcessor(OTLPSpanExporter())
    provider.add_span_processor(processor)
    log.info("requests are traced", variable=where)
    return Traces(provider, processor, _limits() if _LIMITS.intersection(environ) else None)


def _limits() -> "_Limited":
    """What the variables allow, dropped attributes and events being counted as the SDK does."""
    from opentelemetry.attributes import BoundedAttributes  # noqa: PLC0415 - of the extra
    from opentelemetry.sdk.trace import SpanLimits  # noqa: PLC0415 - as above
    from opentelemetry.sdk.util import BoundedList  # noqa: PLC0415 - as above

    most = SpanLimits()

    def limited(
        attributes: Mapping[str, _Value], events: "Sequence[Event]"
    ) -> "tuple[Mapping[str, _Value], Sequence[Event]]":
        cut = BoundedAttributes(most.max_span_attributes, attributes, max_value_len=most.max_span_attribute_length)
        return cast("Mapping[str, _Value]", cut), BoundedList.from_seq(most.max_events, events)

    return limited


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
