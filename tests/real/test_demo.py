"""Real vLLM behind the daemon, through an unmodified openai client."""

import asyncio
import math
import subprocess
from collections.abc import AsyncIterator, Sequence

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.harness import Daemon, session_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


@pytest.fixture(scope="session")
async def client(demo: Daemon) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, told nothing but the address."""
    async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="unused", timeout=300) as official:
        yield official


async def test_chat_answers(client: openai.AsyncOpenAI) -> None:
    """A chat completion comes from the real model, with its usage."""
    answer = await client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "What is the capital of France? Answer in one word."}],
        max_tokens=16,
        temperature=0,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


async def test_chat_streams_with_usage(client: openai.AsyncOpenAI) -> None:
    """A streamed answer comes in several chunks, is the same text, and ends with its usage."""
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Count from one to five."}]
    whole = await client.chat.completions.create(model="chat", messages=question, max_tokens=24, temperature=0)
    stream = await client.chat.completions.create(
        model="chat",
        messages=question,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[-1].usage == whole.usage


async def test_completions_answer_and_stream(client: openai.AsyncOpenAI) -> None:
    """The older completions route works both ways and gives the same text."""
    whole = await client.completions.create(model="chat", prompt="Once upon a time", max_tokens=12, temperature=0)
    stream = await client.completions.create(
        model="chat", prompt="Once upon a time", max_tokens=12, temperature=0, stream=True
    )
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text
    assert whole.choices[0].text


async def test_embeddings_mean_something(client: openai.AsyncOpenAI) -> None:
    """Two paraphrases are closer than two unrelated sentences."""
    sentences = ["A cat sits on the mat.", "There is a cat on the rug.", "The stock market fell sharply today."]
    answer = await client.embeddings.create(model="embed", input=sentences)
    cat, rug, market = (item.embedding for item in answer.data)
    assert len(cat) == 384
    assert cosine(cat, rug) > cosine(cat, market) + 0.3


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine of the angle between two vectors."""
    return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))


async def test_models_are_listed_and_retrieved(client: openai.AsyncOpenAI) -> None:
    """The list shows both ids and nothing of the engines' own names; max_model_len is what vLLM says."""
    listed = [model async for model in client.models.list()]
    assert [model.id for model in listed] == ["chat", "embed"]
    chat = await client.models.retrieve("chat")
    assert chat.model_dump()["max_model_len"] == 1024
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody")


async def test_an_engines_own_error_passes_unchanged(client: openai.AsyncOpenAI) -> None:
    """What vLLM refuses, the client hears in vLLM's words."""
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "hi"}], max_tokens=100_000
        )
    assert "max_tokens" in str(refused.value)
    with pytest.raises(openai.NotFoundError):  # a pooling model has no such route
        await client.chat.completions.create(model="embed", messages=[{"role": "user", "content": "hi"}])


async def both_pids(running: Daemon) -> list[int]:
    """The first processes of both engines, once both are started."""
    listing = await running.eventually(
        "/models", lambda found: all(model["status"]["instances"][0]["pid"] for model in found["models"])
    )
    return [model["status"]["instances"][0]["pid"] for model in listing["models"]]


@pytest.mark.last
async def test_the_printed_curl_line_works_and_sigterm_leaves_no_process(demo: Daemon) -> None:
    """What the demo prints can be pasted into a shell; `kill -TERM` then ends all of it with status 0."""
    printed = (demo.folder / "daemon.log").read_text(encoding="utf-8")
    line = printed[printed.index("curl ") :].split("\n\n")[0]
    ran = await asyncio.to_thread(subprocess.run, ["sh", "-c", line], capture_output=True, text=True, check=True)
    assert '"object":"chat.completion"' in ran.stdout
    pids = await both_pids(demo)
    assert all(len(session_of(pid)) > 2 for pid in pids)  # server, engine core, worker
    assert await demo.stop() == 0
    assert [session_of(pid) for pid in pids] == [set(), set()]
