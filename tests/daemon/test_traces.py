"""Traces: spans of requests, as a collector gets them by OTLP over HTTP."""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.collector import Collector, attributes
from tests.domain.test_openmetrics import PROMETHEUS, families
from tests.harness import WAIT_SECONDS, Daemon, connected, daemon, fake_engines, port_block, request
from vllm_proxy.traffic.traces import from_environment

PATH = "/v1/chat/completions"
ECHO = b'{"model": "chat", "fake": {"echo": true}}'
MODELS = """
[models.chat]
model = "org/chat"
[models.guard]
model = "org/guard"
start = "on-demand"
"""
SAMPLED = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture(scope="module")
async def collector() -> AsyncIterator[Collector]:
    """One for all."""
    found = Collector()
    async with found.server:
        yield found


@pytest.fixture(scope="module")
async def traced(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon that sends its spans there, every twentieth of a second."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": str(collector.server.make_url("/")), "OTEL_BSP_SCHEDULE_DELAY": "50"}
    async with daemon(fake_engines(port_block()) + MODELS, tmp_path_factory.mktemp("traces"), env=env) as running:
        await running.once("chat", lambda it: it["state"] == "ready")
        yield running


async def ask(running: Daemon, data: bytes, *lines: str, path: str = PATH) -> tuple[str, int]:
    """The id of a request, and its status."""
    request_id = uuid.uuid4().hex
    async with connected(running.port) as client:
        await client.send(request(path, data, f"X-Request-Id: {request_id}", *lines))
        return request_id, (await client.answer()).status


async def traces_at_engine(running: Daemon, request_id: str) -> list[str]:
    """The headers about traces that an engine got."""
    (seen,) = await running.seen(request_id)
    return [f"{name}: {value}" for name, value in seen["headers"] if name.lower().startswith("trace")]


async def test_a_request_is_one_span_between_its_client_s_and_its_engine_s(
    traced: Daemon, collector: Collector
) -> None:
    """Of the client's trace, below its span; the engine is told ours for a parent, and the client's state."""
    request_id, status = await ask(traced, ECHO, SAMPLED, "tracestate: a=b")
    span = await collector.of(request_id)
    assert status == 200
    assert collector.service == "vllm-proxy"
    assert (span.name, span.kind) == ("POST /v1/chat/completions", Span.SPAN_KIND_SERVER)
    assert f"00-{span.trace_id.hex()}-{span.parent_span_id.hex()}-01" == SAMPLED.partition(": ")[2]
    engine = await traces_at_engine(traced, request_id)
    assert sorted(engine) == sorted(
        [f"traceparent: 00-{span.trace_id.hex()}-{span.span_id.hex()}-01", "tracestate: a=b"]
    )
    found = attributes(span)
    assert found.pop("vllm_proxy.queue_seconds") == 0
    assert found == {
        "http.request.method": "POST", "http.route": PATH, "http.response.status_code": 200,
        "server.address": "localhost",
        "vllm_proxy.request_id": request_id, "vllm_proxy.model": "chat", "vllm_proxy.replica": 0,
        "vllm_proxy.retries": 0,
    }  # fmt: skip
    assert span.status.code == Status.STATUS_CODE_UNSET


@pytest.mark.parametrize(
    ("host", "address", "port"),
    [("a.example:8443", "a.example", 8443), ("[::1]:80", "[::1]", 80), ("a.example", "a.example", None),
     ("x:123456", "x:123456", None)],
)  # fmt: skip
async def test_the_server_is_where_the_client_believes_it(
    traced: Daemon, collector: Collector, host: str, address: str, port: int | None
) -> None:
    """As its Host says."""
    request_id = uuid.uuid4().hex
    async with connected(traced.port) as client:
        head = request(PATH, ECHO, f"X-Request-Id: {request_id}").replace(b"Host: localhost", b"Host: " + host.encode())
        await client.send(head)
        await client.answer()
    found = attributes(await collector.of(request_id))
    assert (found["server.address"], found.get("server.port")) == (address, port)


async def test_metrics_name_the_trace_of_a_request(traced: Daemon, collector: Collector) -> None:
    """At the bucket that it was in, for who asks as Prometheus does; who asks for text gets no exemplar."""
    trace_id = uuid.uuid4().hex
    request_id, _ = await ask(traced, ECHO, f"traceparent: 00-{trace_id}-00f067aa0ba902b7-01")
    await collector.of(request_id)  # ended, and counted
    found = {}
    for accept in (PROMETHEUS, "text/plain"):
        async with traced.admin.get("/metrics", headers={"Accept": accept}) as answer:
            assert answer.headers["Vary"] == "Accept, Accept-Encoding"
            found[answer.headers["Content-Type"]] = await answer.read()
    text = found.pop("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert b"trace_id" not in found["text/plain; version=0.0.4; charset=utf-8"]
    at = [(family.name, one) for family in families(text) for one in family.samples
          if one.exemplar and one.exemplar.labels == {"trace_id": trace_id}]  # fmt: skip
    assert [name for name, _ in at] == [
        "vllm_proxy_request_duration_seconds",
        "vllm_proxy_time_to_first_byte_seconds",
    ]
    for _, one in at:
        assert (one.labels["model"], one.labels["route"]) == ("chat", PATH)
        assert one.exemplar is not None
        assert one.exemplar.value <= float(one.labels["le"])


async def test_its_times_are_those_of_the_request(traced: Daemon, collector: Collector) -> None:
    """Sent to its engine, first byte, end: in this order."""
    body = b'{"model": "chat", "stream": true, "messages": [], "fake": {"chunks": 3, "interval": 0.02}}'
    request_id, _ = await ask(traced, body)
    span = await collector.of(request_id)
    assert not span.parent_span_id, "who sends no trace begins one"
    assert [event.name for event in span.events] == ["leased", "first_byte"]
    leased, first = (event.time_unix_nano for event in span.events)
    assert span.start_time_unix_nano <= leased < first <= span.end_time_unix_nano - 20_000_000


async def test_what_is_not_sampled_is_not_sent_and_goes_on_as_it_came(traced: Daemon, collector: Collector) -> None:
    """The client decides."""
    line = SAMPLED.removesuffix("1") + "0"
    first, _ = await ask(traced, ECHO, line)
    assert await traces_at_engine(traced, first) == [line]
    second, _ = await ask(traced, ECHO, SAMPLED)
    await collector.of(second)
    assert first not in [attributes(span).get("vllm_proxy.request_id") for span in collector.spans]


async def test_a_sampler_that_asks_no_client_decides_alone(collector: Collector, tmp_path: Path) -> None:
    """What its variable names: here, everything."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": str(collector.server.make_url("/")), "OTEL_BSP_SCHEDULE_DELAY": "50",
           "OTEL_TRACES_SAMPLER": "always_on"}  # fmt: skip
    async with daemon(fake_engines(port_block()) + MODELS, tmp_path, env=env) as running:
        request_id, _ = await ask(running, b'{"model": "nobody"}', SAMPLED.removesuffix("1") + "0")
        assert (await collector.of(request_id)).trace_id.hex() in SAMPLED


async def test_a_span_has_no_more_than_opentelemetry_s_variables_allow(collector: Collector, tmp_path: Path) -> None:
    """Attributes, their length, events; what is dropped is counted."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": str(collector.server.make_url("/")), "OTEL_BSP_SCHEDULE_DELAY": "50",
           "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "32", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "8",
           "OTEL_SPAN_EVENT_COUNT_LIMIT": "1"}  # fmt: skip
    name = "a" * 40
    text = f'[server]\nallowed_hosts = ["{name}"]\n{fake_engines(port_block())}{MODELS}'
    async with daemon(text, tmp_path, env=env) as running:
        await running.once("chat", lambda it: it["state"] == "ready")
        request_id = uuid.uuid4().hex
        async with connected(running.port) as client:
            head = request(PATH, ECHO, f"X-Request-Id: {request_id}").replace(b"localhost", f"{name}:80".encode())
            await client.send(head)
            await client.answer()
        span = await collector.of(request_id)
    found = attributes(span)
    assert (len(found), span.dropped_attributes_count) == (8, 2)
    assert all(len(str(value)) <= 32 for value in found.values())
    assert ([event.name for event in span.events], span.dropped_events_count) == (["first_byte"], 1)


@pytest.mark.parametrize(
    "line",
    [
        "traceparent: x",
        "traceparent: 00-" + "0" * 32 + "-" + "0" * 16 + "-00",
        "traceparent: 00-0-0-01",
        "TraceParent: \xff",
        "traceparent: ",
    ],
)
async def test_what_is_no_trace_begins_one(traced: Daemon, collector: Collector, line: str) -> None:
    """The engine gets what counts, once."""
    request_id, status = await ask(traced, ECHO, line)
    span = await collector.of(request_id)
    assert (status, span.parent_span_id) == (200, b"")
    (told,) = await traces_at_engine(traced, request_id)
    assert re.fullmatch(f"traceparent: 00-{span.trace_id.hex()}-{span.span_id.hex()}-01", told)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"model": "nobody"}', 404, Status.STATUS_CODE_UNSET),
        (b'{"model": "chat", "fake": {"raw": ["HTTP/1.1 500 X\\r\\ncontent-length: 0\\r\\n\\r\\n"], "end": "keep"}}',
         500, Status.STATUS_CODE_ERROR),
        (b'{"model": "chat", "fake": {"raw": [""], "end": "reset"}}', 502, Status.STATUS_CODE_ERROR),
    ],
)  # fmt: skip
async def test_a_failure_is_named(
    traced: Daemon, collector: Collector, body: bytes, status: int, code: Status.StatusCode.ValueType
) -> None:
    """By the daemon's own code, else by the status; a mistake of the client is no error of the server."""
    request_id, answered = await ask(traced, body)
    span = await collector.of(request_id)
    found = attributes(span)
    assert (answered, found["http.response.status_code"]) == (status, status)
    assert span.status.code == code
    assert found["error.type"] == {404: "model_not_found", 500: "500", 502: "engine_failed"}[status]


async def test_what_was_traced_last_is_sent_before_the_end(collector: Collector, tmp_path: Path) -> None:
    """However long its batches take."""
    env = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": str(collector.server.make_url("/v1/traces")),
           "OTEL_BSP_SCHEDULE_DELAY": "600000", "OTEL_SERVICE_NAME": "mine"}  # fmt: skip
    async with daemon(fake_engines(port_block()) + MODELS, tmp_path, env=env) as running:
        request_id, _ = await ask(running, b'{"model": "nobody"}')
        assert await running.stop() == 0
    assert attributes(await collector.of(request_id))["error.type"] == "model_not_found"
    assert collector.service == "mine"


async def test_a_collector_that_is_not_there_costs_no_request_and_no_minute_at_the_end(tmp_path: Path) -> None:
    """Its spans are lost, which the log says."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    async with daemon(fake_engines(port_block()) + MODELS, tmp_path, env=env) as running:
        assert (await ask(running, b'{"model": "nobody"}'))[1] == 404
        async with asyncio.timeout(WAIT_SECONDS):
            while "127.0.0.1" not in running.log().partition("listening")[2].partition("port=9")[2]:
                await asyncio.sleep(0.05)
        assert await running.stop() == 0


@pytest.mark.parametrize("more", [{}, {"OTEL_SDK_DISABLED": " true "}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_without_an_address_or_turned_off_nothing_is_traced(more: dict[str, str]) -> None:
    """OpenTelemetry's packages are not even imported then."""
    where = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"} if more else {}
    assert from_environment(where | more) is None


def test_an_address_without_the_packages_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not silence: somebody waits for traces."""
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    assert from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}) is None
    assert "vllm-proxy[otel]" in capsys.readouterr().out
