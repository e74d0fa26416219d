"""Requests of all kinds at once through the official client, each judged: for what must not fail a single one.

The client does not try again, as it would by itself: what failed once has failed.
"""

import asyncio
import random
from collections.abc import Iterable, Sequence

import openai

_STREAMED = 0.5  # of the requests
_MOST_TOKENS = 8
_HANG_SECONDS = 600.0


def wandering(models: Sequence[str], clients: int, requests: int, seed: int, stays: float) -> list[list[str]]:
    """Which models each of so many clients asks for, one after another; it `stays` with one that often."""
    choose = random.Random(seed)
    plans = []
    for number in range(clients):
        plan = [choose.choice(models)]
        while len(plan) < requests // clients + (number < requests % clients):
            plan.append(plan[-1] if choose.random() < stays else choose.choice(models))
        plans.append(plan)
    return plans


def to_and_fro(one: str, other: str, clients: int, requests: int) -> list[list[str]]:
    """Half of the clients ask for one model and then for the other, half the other way round."""
    orders = ([one, other], [other, one])
    return [
        [model for model in orders[number % 2] for _ in range(requests // clients // 2)] for number in range(clients)
    ]


async def run(url: str, plans: Sequence[Iterable[str]], seed: int = 0) -> list[str]:
    """What went wrong, of everything that these clients asked for; each asks for one thing after another."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=_HANG_SECONDS) as official:
        found = await asyncio.gather(
            *(_client(official, plan, random.Random(f"{seed} {number}")) for number, plan in enumerate(plans))
        )
    return [failure for failures in found for failure in failures]


async def _client(official: openai.AsyncOpenAI, plan: Iterable[str], choose: random.Random) -> list[str]:
    failures = []
    for model in plan:
        ask = _stream if choose.random() < _STREAMED else _whole
        try:
            problem = await ask(official, model, choose.randint(1, _MOST_TOKENS))
        except openai.OpenAIError as error:
            problem = repr(error)
        if problem is not None:
            failures.append(f"{model}: {problem}")
    return failures


async def _whole(official: openai.AsyncOpenAI, model: str, tokens: int) -> str | None:
    """Ask for an answer at once; returns what is wrong with it."""
    answer = await official.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Count."}], max_tokens=tokens,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    (choice,) = answer.choices
    return None if choice.finish_reason and answer.usage and answer.usage.completion_tokens else f"no answer: {answer}"


async def _stream(official: openai.AsyncOpenAI, model: str, tokens: int) -> str | None:
    """Ask for so many tokens, each as it comes; returns what is wrong with what came."""
    stream = await official.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Count."}], max_tokens=tokens, stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "fake": {"chunks": tokens, "interval": 0.002}},
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    usage = chunks[-1].usage if chunks else None
    got = usage.completion_tokens if usage else 0
    return None if got == tokens else f"{got} of {tokens} tokens in a stream of {len(chunks)} events"
