"""The official clients meet keys: they raise the error of the right class at once, and take no cut stream for whole."""

import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Daemon, connected, daemon, fake_engines, port_block, request
from vllm_proxy.domain.keys import hash_of, new_key

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
MODELS = '[models.chat]\nmodel = "org/chat"\n[models.other]\nmodel = "org/chat"\n'
NAMES = ("good", "narrow", "revoked", "expired", "streams", "unknown")
TOKENS = {name: new_key(bytes([number]) * 32) for number, name in enumerate(NAMES)}
MISTYPED = TOKENS["good"][:-1] + ("0" if TOKENS["good"][-1] != "0" else "1")
MORE = {
    "good": 'models = ["chat"]',
    "narrow": 'scopes = ["metrics"]',
    "revoked": "enabled = false",
    "expired": "expires_at = 2020-01-01T00:00:00Z",
    "streams": 'models = ["*"]',
}
KEYS = "".join(f'[keys.{name}]\nhash = "{hash_of(TOKENS[name])}"\n{more}\n' for name, more in MORE.items())
STREAM = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BEGUN: list[dict[str, Any]] = [  # an answer of Anthropic's API
    {"type": "message_start", "message": {"id": "m", "type": "message", "role": "assistant", "model": "chat",
     "content": [], "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 0}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "t0 "}},
]  # fmt: skip
HI: Any = [{"role": "user", "content": "hi"}]


@contextlib.asynccontextmanager
async def with_keys(folder: Path) -> AsyncIterator[Daemon]:
    """A daemon whose models are ready, with a key for each thing that may be wrong with one."""
    base = fake_engines(port_block()) + MODELS
    async with daemon(base + KEYS, folder) as found:
        (found.folder / "base.toml").write_text(base, encoding="utf-8")
        await found.all_ready()
        yield found


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """The daemon of all tests here."""
    async with with_keys(tmp_path_factory.mktemp("clients")) as found:
        yield found


async def configure(running: Daemon, keys: str) -> None:
    """Have the daemon follow a file with these keys."""
    running.save((running.folder / "base.toml").read_text(encoding="utf-8") + keys)
    await running.write("POST", "/config/reload")


def chunk(event: dict[str, Any]) -> str:
    """An event of Anthropic's API, as one HTTP chunk."""
    text = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
    return f"{len(text):x}\r\n{text}\r\n"


@dataclass
class Official:
    """A client as people use it, its errors by the names that it exports."""

    package: Any
    client: Any
    route: str

    async def ask(self, model: str = "chat", **more: Any) -> Any:  # noqa: ANN401 - either client's answer
        """One chat."""
        kind = self.client.chat.completions if self.route == CHAT else self.client.messages
        return await kind.create(**{"model": model, "messages": HI, "max_tokens": 9, **more})


@contextlib.asynccontextmanager
async def official(running: Daemon, name: str, token: str) -> AsyncIterator[Official]:
    """The client of this name, which retries as it is made to."""
    import anthropic  # they take seconds, in every process that collects this file
    import openai

    if name == "openai":
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=token) as client:
            yield Official(openai, client, CHAT)
    else:
        async with anthropic.AsyncAnthropic(base_url=running.url, api_key=token) as other:
            yield Official(anthropic, other, MESSAGES)


async def answered(running: Daemon, route: str) -> dict[str, float]:
    """How many requests of a route were answered with each status so far."""
    found: dict[str, float] = {}
    for series, value in (await running.metrics()).items():
        if series.startswith("vllm_proxy_requests_total{") and f'route="{route}"' in series:
            status = series.partition('status="')[2].partition('"')[0]
            found[status] = found.get(status, 0) + value
    return found


def cases() -> list[tuple[str, str, str, str]]:
    """What is sent, and what comes of it: client, key, class of the error, code."""
    expected = [
        (MISTYPED, "AuthenticationError", "invalid_api_key"),
        (TOKENS["unknown"], "AuthenticationError", "invalid_api_key"),
        (TOKENS["revoked"], "AuthenticationError", "invalid_api_key"),
        (TOKENS["expired"], "AuthenticationError", "expired_api_key"),
        (TOKENS["narrow"], "PermissionDeniedError", "missing_scope"),
    ]
    return [(client, *one) for client, one in itertools.product(["openai", "anthropic"], expected)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("client", "token", "error", "code"), cases())
async def test_a_client_without_a_good_key_raises_at_once(
    running: Daemon, client: str, token: str, error: str, code: str, stream: bool,  # noqa: FBT001 - a parameter of the test
) -> None:  # fmt: skip
    """The class that its users catch, with the code, and one request: it tries no second time."""
    async with official(running, client, token) as one:
        before = await answered(running, one.route)
        with pytest.raises(getattr(one.package, error)) as raised:
            await one.ask(stream=stream)
        status = str(raised.value.status_code)
        after = await answered(running, one.route)
    assert code in json.dumps(raised.value.body)
    assert token not in str(raised.value)
    assert after == before | {status: before.get(status, 0) + 1}


@pytest.mark.parametrize("client", ["openai", "anthropic"])
async def test_a_client_whose_large_request_is_refused_raises_the_same(running: Daemon, client: str) -> None:
    """It reads nothing before it has sent all: cut off, it would see a fault of the connection, and try again."""
    large = [{"role": "user", "content": "x" * 30_000_000}]
    async with official(running, client, TOKENS["revoked"]) as one:
        before = await answered(running, one.route)
        with pytest.raises(one.package.AuthenticationError):
            await one.ask(messages=large)
        assert await answered(running, one.route) == before | {"401": before.get("401", 0) + 1}


@pytest.mark.parametrize("client", ["openai", "anthropic"])
async def test_a_client_that_sends_no_key_raises_at_once(running: Daemon, client: str) -> None:
    """As above; the message says how to send one."""
    async with official(running, client, "x") as one:
        nothing = {"Authorization": one.package.Omit(), "X-Api-Key": one.package.Omit()}
        before = await answered(running, one.route)
        with pytest.raises(one.package.AuthenticationError, match="Authorization: Bearer") as raised:
            await one.ask(extra_headers=nothing)
        assert "missing_api_key" in json.dumps(raised.value.body)
        assert await answered(running, one.route) == before | {"401": before.get("401", 0) + 1}


@pytest.mark.parametrize("client", ["openai", "anthropic"])
async def test_a_client_may_use_its_models_and_finds_no_others(running: Daemon, client: str) -> None:
    """Outside of its globs it raises what it raises for a model that does not exist, in the same words."""
    async with official(running, client, TOKENS["good"]) as one:
        assert await one.ask()
        said = []
        for model in ("other", "nobody"):
            with pytest.raises(one.package.NotFoundError) as raised:
                await one.ask(model)
            said.append(str(raised.value).replace(model, "MODEL"))
    assert said[0] == said[1]


async def test_the_list_of_models_is_that_of_the_key(running: Daemon) -> None:
    """As the openai client lists them."""
    async with official(running, "openai", TOKENS["good"]) as one:
        assert [model.id async for model in one.client.models.list()] == ["chat"]


@pytest.mark.parametrize("headers", [{"x-api-key": TOKENS["good"]}, {"Authorization": f"bearer {TOKENS['good']}"}])
async def test_older_clients_send_a_key_in_other_ways(running: Daemon, headers: dict[str, str]) -> None:
    """Anthropic's own header, and another case of the scheme."""
    body = {"model": "chat", "messages": HI, "max_tokens": 9}
    async with running.session.post(MESSAGES, json=body, headers=headers) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("client", ["openai", "anthropic"])
async def test_a_stream_whose_key_is_revoked_raises_and_does_not_look_whole(
    running: Daemon, tmp_path: Path, client: str
) -> None:
    """The client has what came before, and then an error; no reason why the model would have finished."""
    seen: list[Any] = []

    async def read(stream: Any) -> None:  # noqa: ANN401 - either client's
        async for event in stream:
            if not seen:
                await configure(running, KEYS.replace('models = ["*"]', "enabled = false"))
            seen.append(event.model_dump(mode="json"))

    fault: dict[str, Any] = {"hold": str(tmp_path / "never"), "hold_at": 2, "chunks": 4}
    if client == "anthropic":
        fault["raw"] = [STREAM + "".join(map(chunk, BEGUN)), None]
    async with official(running, client, TOKENS["streams"]) as one:
        stream = await one.ask(stream=True, extra_body={"fake": fault})
        with pytest.raises(one.package.APIError, match="disabled"):
            await read(stream)
    await configure(running, KEYS)
    assert seen
    assert '"finish_reason": "' not in json.dumps(seen)
    assert not {event.get("type") for event in seen} & {"message_stop", "message_delta"}


@pytest.mark.parametrize("client", ["openai", "anthropic"])
async def test_any_key_will_do_where_none_is_needed(running: Daemon, client: str) -> None:
    """Clients must be given some text: on loopback without keys, and where anonymous may infer."""
    for keys in ("", KEYS + '[keys.anonymous]\nscopes = ["inference"]\n'):
        await configure(running, keys)
        async with official(running, client, "EMPTY") as one:
            assert await one.ask()
    await configure(running, KEYS)


@pytest.mark.parametrize("route", [CHAT, "/models"])
@pytest.mark.parametrize("framing", ["Content-Length: 67108864", "Transfer-Encoding: chunked"])
async def test_a_request_is_refused_before_a_byte_of_its_body_came(running: Daemon, route: str, framing: str) -> None:
    """The answer is the last one of its connection, since nobody looks at the rest."""
    async with connected(running) as client:
        await client.send(request(route, b"", framing))
        answer = await client.answer()
        assert (answer.status, answer.all("Connection")) == (401, ["close"])


async def test_the_small_body_of_a_request_that_is_refused_does_no_harm(running: Daemon) -> None:
    """It comes behind the head: the answer is the last one of its connection, which ends in order."""
    async with connected(running) as client:
        await client.send(request(CHAT, b"", "Content-Length: 9"))
        assert (await client.answer()).status == 401
        await client.send(b"x" * 9)
        assert await client.closed()
