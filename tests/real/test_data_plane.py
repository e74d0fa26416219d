"""What only real vLLM can show of the data plane: aborts, Anthropic's API, and what stays out of reach."""

import asyncio
import json
import re
import tomllib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from tests.harness import PAUSE_SECONDS, Daemon
from vllm_proxy.traffic import routes

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

LONG = {"model": "chat", "messages": [{"role": "user", "content": "Tell me a very long story."}], "ignore_eos": True}


class Engine:
    """The chat engine itself, reached as nobody else can: with its port and its key."""

    def __init__(self, session: aiohttp.ClientSession, record: dict[str, Any]) -> None:
        self._session = session
        self._url = f"http://{record['address']}"
        self._headers = {"Authorization": f"Bearer {record['credential']}"}

    async def get(self, path: str) -> str:
        """A text answer."""
        async with self._session.get(self._url + path, headers=self._headers) as answer:
            assert answer.status == 200
            return await answer.text()

    async def running(self) -> float:
        """`vllm:num_requests_running`."""
        return await self._metric("num_requests_running")

    async def prefix_hits(self) -> float:
        """`vllm:prefix_cache_hits_total`: tokens that were not computed again."""
        return await self._metric("prefix_cache_hits_total")

    async def _metric(self, name: str) -> float:
        found = re.search(rf"^vllm:{name}\{{[^}}]*\}} ([0-9.e+]+)$", await self.get("/metrics"), re.MULTILINE)
        assert found
        return float(found[1])

    async def until_running(self, count: int, seconds: float) -> None:
        """Wait until so many requests run."""
        async with asyncio.timeout(seconds):
            while await self.running() != count:
                await asyncio.sleep(PAUSE_SECONDS)


@pytest.fixture
async def engine(demo: Daemon) -> AsyncIterator[Engine]:
    """The chat engine."""
    records = tomllib.loads((demo.state_dir / "engines.toml").read_text())["engines"]
    record = next(record for record in records if record["instance"] == "chat/0")
    async with aiohttp.ClientSession() as session:
        yield Engine(session, record)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_aborts_its_request_in_vllm(demo: Daemon, engine: Engine, *, stream: bool) -> None:
    """Whether bytes came already or not: vLLM stops at once, minutes before it would have been done.

    A second is what it takes on a quiet machine; the limit here leaves room for a busy one.
    """
    await engine.until_running(0, 60)
    async with aiohttp.ClientSession(demo.url) as session:
        asked = asyncio.create_task(
            session.post("/v1/chat/completions", json={**LONG, "max_tokens": 900, "stream": stream})
        )
        await engine.until_running(1, 60)
        asked.cancel()
        (answer,) = await asyncio.gather(asked, return_exceptions=True)
        if isinstance(answer, aiohttp.ClientResponse):  # its head was there already
            answer.close()
    await engine.until_running(0, 20)


async def test_nothing_of_vllm_is_reachable_but_the_table(demo: Daemon, engine: Engine) -> None:
    """Each path of the real vLLM's own /openapi.json that is not in the table answers 404 or 501 here."""
    paths = json.loads(await engine.get("/openapi.json"))["paths"]
    ours = {*routes.paths("json"), *routes.paths("form"), "/v1/models", "/health", "/metrics", "/v1/realtime",
            "/version", "/tokenizer_info",
            "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"}  # fmt: skip
    strange = [(method, path) for path, methods in paths.items() for method in methods if path not in ours]
    assert len(strange) > 5
    for method, path in strange:
        url = re.sub(r"\{[^}]*\}", "x", path)
        async with demo.session.request(method, url, json={"model": "chat"}) as answer:
            assert answer.status in {404, 501}, (method, path, answer.status)
            assert "error" in await answer.json()


async def test_the_anthropic_client_gets_messages_and_streams(demo: Daemon) -> None:
    """/v1/messages works with the official anthropic client, counted, whole and streamed."""
    async with anthropic.AsyncAnthropic(base_url=demo.url, api_key="unused", timeout=300) as client:
        greedy = {"temperature": 0}  # of the API, but no parameter of the newest client
        question: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
        counted = await client.messages.count_tokens(model="chat", messages=question)
        assert counted.input_tokens > 5
        whole = await client.messages.create(model="chat", max_tokens=16, messages=question, extra_body=greedy)
        assert isinstance(whole.content[0], anthropic.types.TextBlock)
        async with client.messages.stream(model="chat", max_tokens=16, messages=question, extra_body=greedy) as stream:
            text = "".join([piece async for piece in stream.text_stream])
        assert text == whole.content[0].text
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(model="nobody", max_tokens=1, messages=question)
        assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


async def test_the_openai_client_works_in_its_other_ways(demo: Daemon) -> None:
    """Synchronous, with raw responses, with its timeout, and with the responses API."""

    def synchronous() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="unused", timeout=300) as client:
            raw = client.completions.with_raw_response.create(model="chat", prompt="One, two,", max_tokens=4)
            streamed = client.completions.create(model="chat", prompt="One, two,", max_tokens=4, stream=True)
            return raw.headers["X-Vllm-Proxy-Instance"], "".join(chunk.choices[0].text for chunk in streamed)

    instance, text = await asyncio.to_thread(synchronous)
    assert instance == "chat/0"
    assert text
    async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as client:
        answer = await client.responses.create(model="chat", input="Say hello.", max_output_tokens=16, timeout=300)
        assert answer.output_text
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(model="chat", prompt="x", max_tokens=800, timeout=0.5)


async def test_vllm_tokenizes_and_pools_through_the_daemon(demo: Daemon) -> None:
    """The routes that are vLLM's own: tokenize, detokenize, pooling, score and rerank."""
    tokens = (await demo.post("/tokenize", {"model": "chat", "prompt": "Hello world"}))["tokens"]
    back = await demo.post("/detokenize", {"model": "chat", "tokens": tokens})
    assert "Hello world" in back["prompt"]
    query = {"model": "embed", "query": "a cat", "documents": ["the dog barks", "the cat purrs"]}
    best = (await demo.post("/v1/rerank", query))["results"][0]
    assert best["document"]["text"] == "the cat purrs"
    scored = await demo.post("/score", {"model": "embed", "text_1": "a cat", "text_2": ["a cat", "stocks"]})
    assert scored["data"][0]["score"] > scored["data"][1]["score"]


async def test_a_key_that_isolates_its_prompts_shares_no_prefix_cache(demo: Daemon, engine: Engine) -> None:
    """What one key has asked is cached for itself alone, on every route that generates; its own salt counts less."""
    await demo.write("POST", "/keys", {"name": "anonymous", "scopes": ["inference", "read"]}, 201)
    made = await demo.write("POST", "/keys", {"name": "alone", "isolate_cache": True}, 201)
    try:
        for path, fields in (
            ("/v1/chat/completions", "messages"),
            ("/v1/completions", "prompt"),
            ("/v1/responses", "input"),
            ("/v1/messages", "messages"),
        ):
            text = " ".join(f"{path}{number}" for number in range(60))  # of some blocks, and of this route alone
            asked = [{"role": "user", "content": text}] if fields == "messages" else text
            body = {"model": "chat", "max_tokens": 2, "max_output_tokens": 16, fields: asked, "cache_salt": "guessed"}
            cached = []
            for headers in ({}, {}, {"Authorization": f"Bearer {made['key']}"}, {"x-api-key": made["key"]}):
                before = await engine.prefix_hits()
                async with demo.session.post(path, json=body, headers=headers) as answer:
                    assert answer.status == 200, await answer.text()
                cached.append(await engine.prefix_hits() > before)
            assert cached == [False, True, False, True], path
        async with demo.session.post(
            "/v2/embed", json={"model": "embed"}, headers={"x-api-key": made["key"]}
        ) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (403, "isolation_unavailable")
    finally:
        await demo.write("DELETE", "/keys/alone", status=204)
        await demo.write("DELETE", "/keys/anonymous", status=204)
