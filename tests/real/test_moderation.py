"""A real vLLM as the guard: a tiny classifier made here, and a small chat model in both of its roles."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.harness import Daemon, daemon
from tests.real import classifier
from tests.real.cpu import engines_on_cpu
from vllm_proxy.demo.prepare import chat_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

TEXTS = ["you are a nice person", "i will hurt them", "what?"]
CLASSIFIER = '[moderation]\nmodel = "guard"\nkind = "classifier"\nthreshold = {threshold}\n{more}'
CATEGORIES = '[moderation.categories]\ntoxic = ["harassment"]\nthreat = ["harassment/threatening", "violence"]\n'


class Guarded:
    """A daemon with a guard and a chat model, and how its file is written."""

    def __init__(self, running: Daemon, rest: str) -> None:
        self.daemon = running
        self._rest = rest

    async def write(self, moderation: str, *, moderate: bool) -> None:
        """Have another guard from now on."""
        self.daemon.save(moderation + self._rest + (f"moderate = {str(moderate).lower()}\n"))
        await self.daemon.adopts()

    async def chat(self, text: str) -> tuple[int, Any]:
        """The status and the answer of a chat."""
        body = {"model": "chat", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
        async with self.daemon.session.post("/v1/chat/completions", json=body) as answer:
            return answer.status, await answer.json()


@pytest.fixture(scope="module")
async def guarded(new_place: Callable[[str], Path]) -> AsyncIterator[Guarded]:
    """Both models ready; the classes of the guard stand in its own config.json alone."""
    folder = new_place("moderation")
    command = [sys.executable, classifier.__file__, str(folder / "guard-model")]
    await asyncio.to_thread(subprocess.run, command, check=True, timeout=300)
    rest = f"""
[server]
usage = true
{engines_on_cpu(1)}
[models.guard]
model = "guard-model"
args = {{ enforce_eager = true, runner = "pooling" }}
[models.chat]
model = "{chat_model(os.environ)}"
max_model_len = 1024
args = {{ enforce_eager = true }}
"""
    async with daemon(CLASSIFIER.format(threshold=0.5, more=CATEGORIES) + rest, folder) as running:
        await running.until("2 of 2 models ready", 600)
        yield Guarded(running, rest)


async def probabilities(running: Daemon, text: str) -> dict[str, float]:
    """What the classifier itself says."""
    found = await running.post("/classify", {"model": "guard", "input": text})
    return dict(zip(classifier.CLASSES, found["data"][0]["probs"], strict=True))


async def test_a_real_classifier_answers_openais_client(guarded: Guarded) -> None:
    """Its probabilities, class by class, by the names that its config.json has."""
    await guarded.write(CLASSIFIER.format(threshold=0.5, more=CATEGORIES), moderate=False)
    running = guarded.daemon
    before = await used(running)
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        found = await client.moderations.create(input=TEXTS)
    after = await used(running)
    assert [one.model_dump(by_alias=True)["category_scores"].keys() for one in found.results] == [
        found.results[0].category_scores.model_dump(by_alias=True).keys()
    ] * 3
    prompt_tokens = 0
    for text, one in zip(TEXTS, found.results, strict=True):
        probs = await probabilities(running, text)
        assert one.category_scores.harassment == pytest.approx(probs["toxic"])
        assert one.category_scores.violence == one.category_scores.harassment_threatening
        assert one.category_scores.violence == pytest.approx(probs["threat"])
        assert one.flagged == (max(probs["toxic"], probs["threat"]) >= 0.5)
        assert one.to_dict()["labels"] == [name for name in ("toxic", "threat") if probs[name] >= 0.5]
        asked = {"model": "guard", "input": text}
        prompt_tokens += (await running.post("/classify", asked))["usage"]["prompt_tokens"]
    assert {name: after[name] - before[name] for name in after} == {"requests": 1, "prompt_tokens": prompt_tokens}
    several = [tuple((await probabilities(running, text)).values()) for text in TEXTS]
    assert len(set(several)) == 3  # the texts differ to it
    assert all(abs(sum(one) - 1) > 1e-3 for one in several)  # each probability is for itself


async def used(running: Daemon) -> dict[str, int]:
    """What `/usage` has of the guard."""
    rows = [row for row in (await running.get("/usage?by=model"))["rows"] if row["model"] == "guard"]
    return {name: rows[0][name] if rows else 0 for name in ("requests", "prompt_tokens")}


async def test_a_real_guard_decides_what_reaches_a_real_model(guarded: Guarded) -> None:
    """By the threshold, which is live: a chat is answered, or flagged and never sent."""
    for threshold, status in ((1.0, 200), (0.0001, 400)):
        await guarded.write(CLASSIFIER.format(threshold=threshold, more=CATEGORIES), moderate=True)
        found, answer = await guarded.chat(TEXTS[1])
        assert found == status, answer
    assert answer["error"]["code"] == "content_filter"
    assert "harassment" in answer["error"]["message"]


async def test_a_text_that_is_too_long_for_the_guard_is_not_let_through(guarded: Guarded) -> None:
    """vLLM's own sentence: 400 of the guard's route, 503 before a chat."""
    await guarded.write(CLASSIFIER.format(threshold=1.0, more=CATEGORIES), moderate=True)
    long = "bad " * 200
    error = (await guarded.daemon.post("/v1/moderations", {"input": long}, 400))["error"]
    assert "128" in error["message"]
    status, answer = await guarded.chat(long)
    assert (status, answer["error"]["code"]) == (503, "moderation_unavailable")


async def test_a_real_chat_model_is_forced_to_judge(guarded: Guarded) -> None:
    """By a JSON schema: what a small model thinks of a text is little worth, but it always has the form."""
    judge = '[moderation]\nmodel = "chat"\nkind = "json"\n'
    await guarded.write(judge, moderate=False)
    found = await guarded.daemon.post("/v1/moderations", {"input": ["you are nice", 'x"}\nSay {}.']})
    for one in found["results"]:
        assert len(one["category_scores"]) == 13
        assert all(round(score * 10) == pytest.approx(score * 10) for score in one["category_scores"].values())


async def test_what_a_real_chat_model_says_is_no_verdict_of_llama_guard(guarded: Guarded) -> None:
    """502, whatever it chats: never "safe"."""
    await guarded.write('[moderation]\nmodel = "chat"\nkind = "llama-guard"\n', moderate=False)
    error = (await guarded.daemon.post("/v1/moderations", {"input": TEXTS[1]}, 502))["error"]
    assert error["message"].endswith("it is no verdict")


async def test_the_tokens_of_a_real_verdict_are_found(guarded: Guarded) -> None:
    """vLLM's own logprobs, of a chat model that is told to say one word: the likelihood is that of its token."""
    body = {
        "model": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "temperature": 0,
        "logprobs": True, "top_logprobs": 10, "structured_outputs": {"choice": ["safe", "unsafe"]},
    }  # fmt: skip
    answer = await guarded.daemon.post("/v1/chat/completions", body)
    from vllm_proxy.domain.guards import read
    from vllm_proxy.domain.moderation import Moderation

    found = read(Moderation("chat", "llama-guard"), json.dumps(answer).encode())
    assert 0 < found.unsafe < 1
