"""What keys may use: refused with the true wait, held while it runs, given back whatever ends it, counted once."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from tests.harness import Daemon, daemon, fake_engines, port_block, until
from vllm_proxy.domain.keys import hash_of, new_key

CHAT = "/v1/chat/completions"
HI: Any = [{"role": "user", "content": "hi"}]
LIMITS = {
    "few": "requests_per_minute = 2",
    "small": "tokens_per_minute = 2000",
    "patient": "tokens_per_minute = 2000",
    "careful": "tokens_per_minute = 2000",
    "one": "max_in_flight = 1",
    "short": "max_output_tokens = 7",
    "day": "tokens_per_day = 40",
    "lost": "tokens_per_minute = 1_000_000\nmax_in_flight = 50",
    "first": "priority = 2",
    "free": "",
    "narrow": '[keys.narrow.limits."cha*"]\nrequests_per_minute = 1',
    "counted": "requests_per_minute = 100",
}
KEYS = {name: new_key(bytes([number]) * 32) for number, name in enumerate(LIMITS)}
TABLES = "".join(f'[keys.{name}]\nhash = "{hash_of(KEYS[name])}"\n{limits}\n' for name, limits in LIMITS.items())
MODELS = "".join(f'[models.{name}]\nmodel = "org/{name}"\n' for name in ("chat", "other", "short"))
MODELS += "request_timeout = 0.2\n"


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon whose two models are ready, with a key for each limit."""
    async with daemon(fake_engines(port_block()) + MODELS + TABLES, tmp_path_factory.mktemp("limits")) as found:
        await found.all_ready()
        yield found


def ask(running: Daemon, key: str, path: str = CHAT, **body: Any) -> Any:  # noqa: ANN401 - aiohttp's context manager
    """A request with a key; as a context manager, its answer."""
    whole = {"model": "chat", "messages": HI, **body}
    return running.session.post(path, json=whole, headers={"Authorization": f"Bearer {KEYS[key]}"})


async def refused(running: Daemon, key: str, path: str = CHAT, **body: object) -> tuple[Any, Any]:
    """The error and the headers of a request that is refused by a limit."""
    async with ask(running, key, path, **body) as answer:
        assert answer.status == 429, await answer.text()
        return (await answer.json())["error"], answer.headers


async def used(running: Daemon, key: str) -> Any:  # noqa: ANN401 - JSON
    """What `/usage` has of a key, over all models."""
    found = (await running.get("/usage?by=key"))["rows"]
    return next((row for row in found if row["key"] == key), None)


async def metric(running: Daemon, line: str) -> float:
    """The value of a series."""
    async with running.admin.get("http://localhost/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return next((float(one.rpartition(" ")[2]) for one in lines if one.startswith(line)), 0.0)


async def seen(running: Daemon, model: str = "chat") -> Any:  # noqa: ANN401 - JSON
    """The requests that a model's engine saw."""
    (port,) = await running.ports(model)
    async with running.session.get(f"http://127.0.0.1:{port}/fake/seen") as answer:
        return await answer.json()


async def test_requests_above_the_limit_are_refused_with_the_true_wait(running: Daemon) -> None:
    """In the words of OpenAI's API, which its clients read; a refusal charges nothing."""
    for left in (1, 0):
        async with ask(running, "few") as answer:
            assert answer.status == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
            assert 58 <= int(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 61
    for _ in range(3):
        error, headers = await refused(running, "few")
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert error["message"].startswith("cannot take this: 2 requests a minute are used, 1 wanted, free in ")
        wait = int(headers["retry-after-ms"])
        assert 50_000 < wait <= 61_000
        assert int(headers["Retry-After"]) == -(-wait // 1000)
        assert headers.get("x-should-retry", "false") == "false" if wait > 60_000 else "x-should-retry" not in headers
        assert headers["x-ratelimit-remaining-requests"] == "0"
    row = await used(running, "few")
    assert (row["requests"], row["limited"]) == (2, 3)


async def test_an_answer_to_anthropics_api_has_its_headers_and_its_envelope(running: Daemon) -> None:
    """As their client reads them."""
    async with ask(running, "careful", "/v1/messages", max_tokens=10) as answer:
        assert answer.status == 200
        assert answer.headers["anthropic-ratelimit-tokens-limit"] == "2000"
        assert answer.headers["anthropic-ratelimit-tokens-reset"].endswith("Z")
        assert not any(name.startswith("x-ratelimit") for name in answer.headers)
    async with ask(running, "careful", "/v1/messages", max_tokens=5000) as answer:
        assert (answer.status, (await answer.json())["error"]["type"]) == (429, "rate_limit_error")
        assert answer.headers["x-should-retry"] == "false"


async def test_what_never_fits_is_told_without_a_time(running: Daemon) -> None:
    """No wait helps: a client is told not to try again."""
    error, headers = await refused(running, "small", max_tokens=3000)
    assert (error["type"], error["code"]) == ("tokens", "rate_limit_exceeded")
    assert "2000 a minute are all there may be" in error["message"]
    assert headers["x-should-retry"] == "false"
    assert "Retry-After" not in headers
    assert "retry-after-ms" not in headers


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
async def test_the_official_clients_wait_as_told_and_succeed(running: Daemon, kind: str, tmp_path: Path) -> None:
    """Their second request is the last one: what was held is free by then."""
    hold = tmp_path / "go"
    before = await used(running, "patient") or {"limited": 0, "requests": 0}
    fault: dict[str, Any] = {"fake": {"hold": str(hold)}}
    first = asyncio.create_task(_whole(running, "patient", max_tokens=1900, **fault))
    await until(lambda: metric(running, 'vllm_proxy_key_in_flight{key="patient"}'), lambda count: count == 1)

    async def later() -> None:
        await until(
            lambda: used(running, "patient"), lambda row: row is not None and row["limited"] > before["limited"]
        )
        hold.touch()

    freed = asyncio.create_task(later())
    if kind == "openai":
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEYS["patient"]) as client:
            answer: Any = await client.chat.completions.create(model="chat", messages=HI, max_tokens=1000)
    else:
        async with anthropic.AsyncAnthropic(base_url=running.url, api_key=KEYS["patient"]) as other:
            answer = await other.messages.create(model="chat", messages=HI, max_tokens=1000)
    assert answer.model == "chat"
    await freed
    assert await first == 200
    row = await used(running, "patient")
    assert (row["requests"] - before["requests"], row["limited"] - before["limited"]) == (2, 1)


async def _whole(running: Daemon, key: str, **body: Any) -> int:  # noqa: ANN401 - JSON
    async with ask(running, key, **body) as answer:
        await answer.read()
        return int(answer.status)


async def test_more_in_flight_than_a_key_may_have_waits_and_holds_up_nobody(running: Daemon, tmp_path: Path) -> None:
    """The second one is served when the first has ended; another key is served at once."""
    hold = tmp_path / "go"
    first = asyncio.create_task(_whole(running, "one", fake={"hold": str(hold)}))
    await until(lambda: metric(running, 'vllm_proxy_key_in_flight{key="one"}'), lambda count: count == 1)
    second = asyncio.create_task(_whole(running, "one", model="other"))
    await until(lambda: running.get("/models/other"), lambda model: model["status"]["queued"] == 1)
    assert await _whole(running, "free", model="other") == 200
    assert not second.done()
    hold.touch()
    assert (await first, await second) == (200, 200)


async def test_an_output_above_the_keys_is_refused_and_one_that_is_not_given_is_bounded(running: Daemon) -> None:
    """In the field that the route knows."""
    async with ask(running, "short", max_tokens=8) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "invalid_max_tokens"
    async with ask(running, "short", fake={"echo": True}) as answer:
        assert json.loads((await answer.json())["body"])["max_completion_tokens"] == 7
    async with ask(running, "short", max_tokens=3, fake={"echo": True}) as answer:
        assert "max_completion_tokens" not in json.loads((await answer.json())["body"])


async def test_a_days_tokens_are_a_quota(running: Daemon) -> None:
    """Refused until midnight, UTC, with the code that clients take for final."""
    statuses = [await _whole(running, "day", max_tokens=4) for _ in range(30)]
    assert statuses[0] == 200
    error, headers = await refused(running, "day", max_tokens=4)
    assert error["code"] == "insufficient_quota"
    assert "tokens a day are used" in error["message"]
    assert headers["x-should-retry"] == "false"


async def test_a_models_limit_counts_beside_the_keys_own(running: Daemon) -> None:
    """For each model that the glob matches; other models are free."""
    assert await _whole(running, "narrow") == 200
    error, _ = await refused(running, "narrow")
    assert "cannot take this of chat:" in error["message"]
    assert await _whole(running, "narrow", model="other") == 200


async def test_a_key_without_limits_has_no_headers_of_limits(running: Daemon) -> None:
    """And its request goes on as it came."""
    async with ask(running, "free") as answer:
        assert not any("ratelimit" in name.lower() for name in answer.headers)


async def test_a_stream_is_what_the_client_asked_for_and_counted_all_the_same(running: Daemon) -> None:
    """The event with the usage is for the daemon alone, unless the client asked for it."""
    before = await used(running, "free") or {"completion_tokens": 0}
    asked: list[dict[str, Any]] = [{}, {"stream_options": {"include_usage": True}}]
    for options in asked:
        async with ask(running, "free", stream=True, fake={"chunks": 6}, **options) as answer:
            text = await answer.text()
        assert ('"usage":{' in text) is bool(options)
        assert text.endswith("data: [DONE]\n\n")
    assert (await used(running, "free"))["completion_tokens"] - before["completion_tokens"] == 12


async def test_nothing_is_held_once_clients_have_left_and_engines_have_died(running: Daemon) -> None:
    """Of 1,000: streams, whole answers, before the first byte, in the middle, in the queue; all is there again."""

    async def leave(number: int) -> None:
        body: dict[str, Any] = {"max_tokens": 500, "stream": number % 2 == 0}
        body["fake"] = [{"hang": "before"}, {"chunks": 3, "hang": 2}, {"status": 500}, {"chunks": 3}][number % 4]
        try:
            async with asyncio.timeout(0.2), ask(running, "lost", **body) as answer:
                await answer.read()
        except (TimeoutError, aiohttp.ClientError):
            return

    for round_ in range(10):
        await asyncio.gather(*(leave(number) for number in range(100)))
        if round_ == 5:
            os.kill((await running.instance("chat"))["pid"], signal.SIGKILL)
    await running.all_ready()
    await until(lambda: metric(running, 'vllm_proxy_key_in_flight{key="lost"}'), lambda count: count == 0)
    async with ask(running, "lost", max_tokens=1) as answer:
        left = int(answer.headers["x-ratelimit-remaining-tokens"])
    row = await used(running, "lost")
    charged = row["prompt_tokens"] + row["completion_tokens"] + row["estimated_tokens"]
    assert 1_000_000 - left <= charged + 60  # what the last one held
    assert row["requests"] > 500  # some left before they had sent anything


async def test_engines_take_requests_in_the_order_of_their_numbers(running: Daemon) -> None:
    """A key with a priority is first; what a client says of it is not passed on."""
    numbers = []
    for key in ("free", "first"):
        async with ask(running, key, fake={"echo": True}) as answer:
            headers = {name.lower(): value for name, value in (await answer.json())["headers"]}
        numbers.append(int(headers["x-vllm-priority"]))
    assert numbers == [0, -2 * 2**40]
    async with ask(running, "free", "/v1/embeddings", input="hi", priority=-(2**62), fake={"echo": True}) as answer:
        assert json.loads((await answer.json())["body"])["priority"] == 0  # there vLLM reads no header


async def test_what_nobody_tells_the_tokens_of_is_charged_what_it_held(running: Daemon) -> None:
    """As a response that is made in the background; marked as estimated."""
    before = await used(running, "small") or {"estimated_tokens": 0}
    async with ask(running, "small", "/v1/responses", input="hi", max_output_tokens=300) as answer:
        assert answer.status == 200
    charged = (await used(running, "small"))["estimated_tokens"] - before["estimated_tokens"]
    assert 300 < charged < 400


async def test_what_an_engine_was_given_too_little_time_for_is_charged_its_prompt(running: Daemon) -> None:
    """It may have worked on that; as of a client that leaves."""
    messages = [{"role": "user", "content": "word " * 1000}]
    async with ask(running, "first", model="short", messages=messages, fake={"hang": "before"}) as answer:
        assert answer.status == 504
    assert 1000 < (await used(running, "first"))["estimated_tokens"] < 2000


async def test_what_a_client_may_have_written_itself_is_no_usage(running: Daemon) -> None:
    """With its messages behind the usage, an answer quotes the tools of the client, and the last one is none."""
    before = await used(running, "free") or {"estimated_tokens": 0, "prompt_tokens": 0}
    for quoted in (True, False):
        body = {"input": "hi", "max_output_tokens": 300, "enable_response_messages": quoted}
        said = '{"usage":{"input_tokens":5,"output_tokens":7}}'
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(said)}\r\n\r\n"
        async with ask(running, "free", "/v1/responses", fake={"raw": [head + said]}, **body) as answer:
            assert await answer.text() == said
        found = await used(running, "free")
        assert found["estimated_tokens"] - before["estimated_tokens"] > 300
        assert found["prompt_tokens"] - before["prompt_tokens"] == (0 if quoted else 5)


async def test_absurd_amounts_are_held_and_charged_within_bounds(running: Daemon) -> None:
    """Nobody's usage is lost to them, nobody waits behind them for ever, and a limit of requests alone is not met."""
    absurd = {"input": "hi", "max_output_tokens": 2**53, "n": 2**53}
    for key in ("free", "counted"):
        before = await used(running, key) or {"estimated_tokens": 0}
        async with ask(running, key, "/v1/responses", **absurd) as answer:
            assert answer.status == 200, await answer.text()
        charged = (await used(running, key))["estimated_tokens"] - before["estimated_tokens"]
        assert 0 < charged <= 2**22
    assert (await running.get("/health"))["usage"]["error"] is None
