"""A trace through the daemon and real vLLM: the client's span, the daemon's below it, and vLLM's own below that."""

import os
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from tests.collector import Collector, attributes
from tests.harness import daemon
from tests.real.cpu import engines_on_cpu
from vllm_proxy.demo.prepare import chat_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

LOAD_SECONDS = 600.0
TRACE, CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def configuration(endpoint: str) -> str:
    """One model, whose engine sends its spans as the daemon does."""
    return f"""
{engines_on_cpu(1, OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf")}
[models.chat]
model = "{chat_model(os.environ)}"
max_model_len = 512
gpu_memory_utilization = 0.1
args = {{ enforce_eager = true, otlp_traces_endpoint = "{endpoint}" }}
"""


async def test_the_spans_of_client_daemon_and_engine_are_one_trace(new_place: Callable[[str], Path]) -> None:
    """vLLM's says how many tokens it made, which the daemon's leaves to it; both by one id of the request."""
    collector = Collector()
    async with collector.server:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": str(collector.server.make_url("/"))}
        text = configuration(str(collector.server.make_url("/v1/traces")))
        async with daemon(text, new_place("traces"), env=env) as running:
            await running.until("1 of 1 models ready", LOAD_SECONDS)
            async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x") as client:
                answer = await client.chat.completions.create(
                    model="chat", messages=[{"role": "user", "content": "Hi"}], max_tokens=4,
                    extra_headers={"traceparent": f"00-{TRACE}-{CLIENT}-01", "X-Request-Id": "traced"},
                )  # fmt: skip
            ours = await collector.of("traced")
            theirs = await collector.find(lambda span: span.parent_span_id == ours.span_id)
    assert (ours.trace_id.hex(), ours.parent_span_id.hex(), theirs.trace_id.hex()) == (TRACE, CLIENT, TRACE)
    assert answer.usage is not None
    found = attributes(theirs)
    assert found["gen_ai.usage.completion_tokens"] == answer.usage.completion_tokens
    assert "traced" in found["gen_ai.request.id"]
    assert not [name for name in attributes(ours) if name.startswith("gen_ai.")]
