"""Tokens as real vLLM counts them: what its answers say on every route, and what the daemon reads of its counters.

By its name the first file that uses the demo: no test has started its engines anew, so the daemon's figures are theirs.
"""

import asyncio
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import Daemon, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

WORDS = "The quick brown fox jumps over the lazy dog. "
CHAT = [{"role": "user", "content": WORDS}]
LONG = [{"role": "user", "content": WORDS * 40}]  # some blocks of the prefix cache
ASKS = {"stream": True, "stream_options": {"include_usage": True}}
REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("chat", "/v1/chat/completions", {"messages": CHAT, "max_tokens": 7}),
    ("chat", "/v1/chat/completions", {"messages": CHAT, "stop": ["a", "e"]}),
    ("chat", "/v1/chat/completions", {"messages": LONG, "max_tokens": 5, **ASKS}),
    ("chat", "/v1/chat/completions", {"messages": LONG, "max_completion_tokens": 3}),
    ("chat", "/v1/completions", {"prompt": WORDS, "max_tokens": 1}),
    ("chat", "/v1/completions", {"prompt": [WORDS, "Two"], "max_tokens": 4}),
    ("chat", "/v1/completions", {"prompt": WORDS, "max_tokens": 9, **ASKS}),
    ("chat", "/v1/responses", {"input": WORDS, "max_output_tokens": 16}),
    ("chat", "/v1/responses", {"input": WORDS * 40, "max_output_tokens": 16, "stream": True}),
    ("chat", "/v1/messages", {"messages": CHAT, "max_tokens": 6}),
    ("chat", "/v1/messages", {"messages": LONG, "max_tokens": 6, "stream": True}),
    ("chat", "/v1/messages", {"messages": LONG, "max_tokens": 4}),
    ("chat", "/v1/messages/count_tokens", {"messages": CHAT}),
    ("chat", "/tokenize", {"prompt": WORDS}),
    ("chat", "/detokenize", {"tokens": [1, 2, 3]}),
    ("embed", "/v1/embeddings", {"input": WORDS}),
    ("embed", "/v1/embeddings", {"input": [WORDS, "Two", "And three"]}),
    ("embed", "/pooling", {"input": WORDS}),
    ("embed", "/v1/score", {"text_1": "a cat", "text_2": ["a cat", WORDS]}),
    ("embed", "/v1/rerank", {"query": "a cat", "documents": ["the dog barks", WORDS]}),
    ("embed", "/v2/embed", {"texts": [WORDS, "Two"], "embedding_types": ["float"]}),
]


@pytest.fixture
async def engines(demo: Daemon) -> dict[str, str]:
    """Where the engine of each model is."""
    restarts = {name: (await demo.instance(name))["restarts"] for name in ("chat", "embed")}
    assert restarts == {"chat": 0, "embed": 0}, "the daemon's figures are those of several engines"
    records = tomllib.loads((demo.state_dir / "engines.toml").read_text())["engines"]
    return {record["instance"].removesuffix("/0"): f"http://{record['address']}" for record in records}


async def counted(demo: Daemon, engine: str) -> Counter[str]:
    """Tokens by kind, as the engine itself says."""
    async with demo.session.get(f"{engine}/metrics") as answer:
        text = await answer.text()
    kinds = {"prompt": "prompt_tokens", "cached": "prompt_tokens_cached", "generation": "generation_tokens"}
    return Counter(
        {
            kind: sum(int(float(value)) for value in re.findall(rf"(?m)^vllm:{name}_total\S* (.+)$", text))
            for kind, name in kinds.items()
        }
    )


async def read(demo: Daemon, model: str) -> Counter[str]:
    """Tokens by kind, as the daemon says."""
    found = await demo.metrics()
    return Counter(
        {
            kind: int(found.get(f'vllm_proxy_tokens_total{{kind="{kind}",model="{model}"}}', 0))
            for kind in ("prompt", "cached", "generation")
        }
    )


def usages(text: str) -> Iterator[dict[str, Any]]:
    """Every `usage` or `billed_units` of an answer, streamed or not, nested or not."""
    for one in [text, *re.findall(r"(?m)^data: (\{.*)$", text)]:
        if one.startswith("{"):
            yield from found_in(json.loads(one))


def found_in(value: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - JSON
    """In any depth."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key in {"usage", "billed_units"} and inner:
            yield inner
        elif isinstance(inner, dict):
            yield from found_in(inner)


async def said(
    demo: Daemon, model: str, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> Counter[str]:
    """The tokens of one request, as its answer says: the last usage that is there."""
    async with demo.session.post(path, json={"model": model, **body}, headers=headers) as answer:
        text = await answer.text()
        assert answer.status == 200, (path, text)
    *_, last = (Counter[str](), *usages(text))
    found: dict[str, int] = dict(last)
    prompt = found.get("prompt_tokens", found.get("input_tokens", 0)) or 0
    generated = found.get("completion_tokens", found.get("output_tokens", 0)) or 0
    return Counter(prompt=prompt + (found.get("cache_read_input_tokens") or 0), generation=generated)


async def test_an_answer_says_exactly_the_tokens_that_its_engine_counts(demo: Daemon, engines: dict[str, str]) -> None:
    """On every route, one after another: what a ledger can be made of."""
    wrong = []
    for model, path, body in REQUESTS:
        before = await counted(demo, engines[model])
        says = await said(demo, model, path, body)
        after = await counted(demo, engines[model])
        counts = {kind: after[kind] - before[kind] for kind in ("prompt", "generation")}
        if counts != {kind: says[kind] for kind in counts}:
            wrong.append((path, body.get("stream"), counts, says))
    assert not wrong


async def test_a_mixed_load_is_counted_to_the_last_token(demo: Daemon, engines: dict[str, str]) -> None:
    """Side by side, cached prompts and clients that leave in the middle too: the daemon knows what vLLM does."""
    before = {model: await counted(demo, engine) for model, engine in engines.items()}
    async with demo.admin.get("/events") as watched:  # which makes figures fresher
        await watched.content.readline()
        says = await asyncio.gather(*(said(demo, *case) for case in REQUESTS * 2))
        after = {model: await counted(demo, engine) for model, engine in engines.items()}
        for model in engines:
            told = sum((one for one, case in zip(says, REQUESTS * 2, strict=True) if case[0] == model), Counter())
            assert {kind: after[model][kind] - before[model][kind] for kind in told} == dict(told), model
        assert after["chat"]["cached"] > before["chat"]["cached"]
        await asyncio.gather(*(leave(demo) for _ in range(5)))
        for model, engine in engines.items():

            async def same(model: str = model, engine: str = engine) -> bool:
                return await read(demo, model) == await counted(demo, engine)

            await until(same, bool)


async def test_the_ledger_is_what_vllm_counts(demo: Daemon, engines: dict[str, str]) -> None:
    """Over the same load, of streams too whose clients did not ask for what they used: the difference is 0."""
    await demo.write("POST", "/keys", {"name": "anonymous", "scopes": ["inference", "read"]}, 201)
    made = await demo.write("POST", "/keys", {"name": "ledger"}, 201)
    key = {"Authorization": f"Bearer {made['key']}"}
    silent = [(model, path, {**body, "stream_options": None}) for model, path, body in REQUESTS if body.get("stream")]
    load = [*REQUESTS * 2, *silent * 3]
    try:
        await asyncio.gather(*(said(demo, model, "/tokenize", {"prompt": WORDS}, key) for model in engines))
        before = {model: await counted(demo, engine) for model, engine in engines.items()}
        attributed = {model: await unattributed(demo, model, engine) for model, engine in engines.items()}
        await asyncio.gather(*(said(demo, *case, key) for case in load))
        rows = {row["model"]: row for row in (await demo.get("/usage?by=key,model"))["rows"] if row["key"] == "ledger"}
        for model, engine in engines.items():
            after, row = await counted(demo, engine), rows[model]
            has = {"prompt": row["prompt_tokens"], "generation": row["completion_tokens"]}
            assert has == {kind: after[kind] - before[model][kind] for kind in has}, model
            assert (row["requests"], row["estimated_tokens"], row["failed"]) == (
                1 + sum(case[0] == model for case in load), 0, 0,
            )  # fmt: skip
            assert await unattributed(demo, model, engine) == attributed[model]
    finally:
        await demo.write("DELETE", "/keys/ledger", status=204)
        await demo.write("DELETE", "/keys/anonymous", status=204)


async def unattributed(demo: Daemon, model: str, engine: str) -> float:
    """What the daemon says of it, once it knows all that the engine has counted."""

    async def same() -> bool:
        return await read(demo, model) == await counted(demo, engine)

    async with demo.admin.get("/events") as watched:
        await watched.content.readline()
        await until(same, bool)
    return (await demo.metrics())[f'vllm_proxy_tokens_unattributed{{model="{model}"}}']


async def leave(demo: Daemon) -> None:
    """Begin a long answer, and go in the middle of it."""
    body = {"model": "chat", "messages": CHAT, "max_tokens": 500, "ignore_eos": True, "stream": True}
    async with demo.session.post("/v1/chat/completions", json=body) as answer:
        for _ in range(6):
            await answer.content.readline()
