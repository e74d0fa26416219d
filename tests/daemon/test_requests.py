"""`/requests`: what is in flight, what was, and a request that is cancelled."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.harness import Daemon, connected, daemon, fake_engines, port_block, request, until
from vllm_proxy.domain.keys import hash_of, new_key

CHAT = "/v1/chat/completions"
READER, NARROW, OPERATOR = (new_key(bytes([number]) * 32) for number in range(3))
MODELS = f"""
[models.chat]
model = "org/chat"
max_in_flight = 1
aliases = ["gpt"]
[models.other]
model = "org/chat"
[keys.reader]
hash = "{hash_of(READER)}"
scopes = ["read", "inference"]
[keys.narrow]
hash = "{hash_of(NARROW)}"
scopes = ["operate", "inference"]
models = ["other"]
[keys.operator]
hash = "{hash_of(OPERATOR)}"
scopes = ["operate", "inference"]
[keys.anonymous]
scopes = ["inference"]
"""


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with two models and some keys."""
    async with daemon(fake_engines(port_block()) + MODELS, tmp_path_factory.mktemp("requests")) as found:
        await found.all_ready()
        yield found


@contextlib.asynccontextmanager
async def asking(
    running: Daemon, name: str, model: str = "chat", *, path: str = CHAT, key: str | None = None, stream: bool = True,
    **fault: object,
) -> AsyncIterator["asyncio.Task[aiohttp.ClientResponse]"]:  # fmt: skip
    """A request with this id; its answer, once it begins."""
    body = {"model": model, "messages": [{"role": "user", "content": "the-prompt"}], "stream": stream, "max_tokens": 9,
            "fake": fault}  # fmt: skip
    headers = {"X-Request-Id": name} | ({"Authorization": f"Bearer {key}"} if key else {})
    sending = asyncio.create_task(running.session.post(path, json=body, headers=headers))
    try:
        yield sending
    finally:
        sending.cancel()
        for answer in await asyncio.gather(sending, return_exceptions=True):
            if isinstance(answer, aiohttp.ClientResponse):
                answer.close()


async def shown(running: Daemon, name: str, state: str) -> Any:  # noqa: ANN401 - JSON
    """A request, once it is known and in this state."""

    async def ask() -> Any:  # noqa: ANN401 - JSON
        async with running.admin.get(f"/requests/{name}") as answer:
            return await answer.json()

    return await until(ask, lambda found: found.get("state") == state)


def unused() -> str:
    """An id that nobody has."""
    return uuid.uuid4().hex


async def test_a_request_is_queued_then_waits_then_streams_then_has_ended(running: Daemon, tmp_path: Path) -> None:
    """With its model, replica, client and key in between, and its outcome at the end."""
    first, name, go = unused(), unused(), tmp_path / "go"
    async with asking(running, first, hold=str(go), hold_at=1, chunks=2) as before:
        await shown(running, first, "streaming")
        async with asking(running, name, "gpt", key=READER, chunks=3) as asked:
            queued = await shown(running, name, "queued")
            assert (queued["model"], queued["replica"], queued["status"], queued["key"]) == (
                "chat",
                None,
                None,
                "reader",
            )
            listed = await running.get("/requests?model=gpt")
            assert [one["id"] for one in listed["active"]] == [first, name]
            go.touch()
            await (await before).read()
            await (await asked).read()
    ended = await shown(running, name, "ended")
    assert {key: ended[key] for key in ("model", "replica", "route", "client", "key", "status", "code", "retries")} == {
        "model": "chat", "replica": 0, "route": CHAT, "client": "127.0.0.1", "key": "reader", "status": 200,
        "code": None, "retries": 0,
    }  # fmt: skip
    assert 0 < ended["queue_seconds"] < ended["first_byte"] <= ended["seconds"]
    assert ended["bytes"] > 0
    assert ended["engine_id"].startswith(name)
    assert (await running.get(f"/requests/{ended['engine_id']}"))["id"] == name
    assert [one["id"] for one in (await running.get("/requests?model=chat&limit=2"))["recent"]] == [name, first]


async def test_one_that_has_no_byte_yet_waits(running: Daemon) -> None:
    """Its engine has it."""
    name = unused()
    async with asking(running, name, hang="before"):
        found = await shown(running, name, "waiting")
        assert (found["replica"], found["first_byte"], found["bytes"]) == (0, None, 0)
    ended = await shown(running, name, "ended")
    assert (ended["status"], ended["code"]) == (499, None)


async def test_an_error_of_the_daemons_own_has_its_code(running: Daemon) -> None:
    """Of a model that is not there, of an engine that gives no answer, of a stream that breaks."""
    for model, fault, code in (
        ("nobody", {}, "model_not_found"), ("chat", {"raw": ["garbage"]}, "engine_failed"),
        ("chat", {"chunks": 3, "die": 1}, "engine_failed"),
    ):  # fmt: skip
        name = unused()
        async with asking(running, name, model, **fault) as asked:
            await (await asked).read()
        ended = await shown(running, name, "ended")
        assert ended["code"] == code
        assert ended["model"] == (None if model == "nobody" else model)
    await running.all_ready()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("key", [None, READER])
async def test_tokens_are_those_that_the_answer_tells(running: Daemon, key: str | None, stream: bool) -> None:  # noqa: FBT001 - a parameter
    """Of whoever is metered, and of others too; a stream that was not asked for them tells none."""
    name = unused()
    body = {"model": "other", "messages": [{"role": "user", "content": "hi"}], "stream": stream, "max_tokens": 3}
    headers = {"X-Request-Id": name} | ({"Authorization": f"Bearer {key}"} if key else {})
    async with running.session.post(CHAT, json=body, headers=headers) as answer:
        text = await answer.text()
    ended = await shown(running, name, "ended")
    if not stream:
        usage = json.loads(text)["usage"]
        wanted = usage["prompt_tokens"], usage["completion_tokens"]
        assert (ended["prompt_tokens"], ended["completion_tokens"]) == wanted
    else:
        assert isinstance(ended["prompt_tokens"], int)


async def test_bodies_and_keys_are_not_shown(running: Daemon) -> None:
    """Not what was asked, not what was answered, not the key."""
    name = unused()
    async with asking(running, name, key=READER, chunks=2) as asked:
        await (await asked).read()
    await shown(running, name, "ended")
    text = json.dumps(await running.get("/requests?limit=1000"))
    assert name in text
    assert "the-prompt" not in text
    assert READER not in text


async def test_the_last_thousand_are_kept_and_a_limit_is_a_number(running: Daemon) -> None:
    """A hundred of them are told where nobody says how many."""
    async with connected(running.port) as client:
        for _ in range(120):
            await client.send(request(CHAT, b"{"))
            assert (await client.answer()).status == 400
    assert len((await running.get("/requests"))["recent"]) == 100
    assert len((await running.get("/requests?limit=110"))["recent"]) == 110
    assert (await running.get("/requests?limit=0"))["recent"] == []
    assert (await running.get("/requests?limit=x", 400))["error"]["code"] == "bad_request"
    assert (await running.get("/requests?model=nobody", 404))["error"]["code"] == "model_not_found"
    assert (await running.get(f"/requests/{unused()}", 404))["error"]["code"] == "not_found"


async def test_a_key_sees_and_cancels_what_is_of_its_models(running: Daemon) -> None:
    """Another's requests are not there for it."""
    mine, others = unused(), unused()
    headers = {"Authorization": f"Bearer {NARROW}"}
    async with asking(running, mine, "other", hang="before"), asking(running, others, "chat", hang="before"):
        await shown(running, mine, "waiting")
        await shown(running, others, "waiting")
        async with running.session.get("/requests", headers=headers) as answer:
            listed = await answer.json()
        assert mine in [one["id"] for one in listed["active"]]
        assert {one["model"] for one in [*listed["active"], *listed["recent"]]} == {"other"}
        for method in ("GET", "DELETE"):
            async with running.session.request(method, f"/requests/{others}", headers=headers) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")
        async with running.session.get("/requests?model=chat", headers=headers) as answer:
            assert answer.status == 404


async def test_only_an_operator_may_cancel(running: Daemon) -> None:
    """Who may read may not."""
    name = unused()
    async with asking(running, name, hang="before"):
        await shown(running, name, "waiting")
        path = f"/requests/{name}"
        async with running.session.delete(path, headers={"Authorization": f"Bearer {READER}"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (403, "missing_scope")
        async with running.session.delete(path, headers={"Authorization": f"Bearer {OPERATOR}"}) as answer:
            assert answer.status == 202
            assert (await answer.json())["state"] == "waiting"
    await running.logged(f"DELETE /requests/{name}")
    await running.logged("key operator")


async def idle(running: Daemon, model: str = "chat") -> None:
    """Wait until no request of a model is in flight."""
    await running.eventually(f"/models/{model}", lambda found: found["status"]["in_flight"] == 0)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_a_stream_that_is_cancelled_ends_with_an_error_event(running: Daemon, path: str) -> None:
    """Without [DONE]; its engine stops working on it, and the connection goes on."""
    name = unused()
    async with asking(running, name, path=path, chunks=4, hang=2) as asked:
        answer = await asked
        await answer.content.readuntil(b"\n\n")
        await running.write("DELETE", f"/requests/{name}", status=202)
        body = await answer.content.read()
    assert b"request_cancelled" in body.splitlines()[-2]
    assert b"[DONE]" not in body
    await idle(running)
    ended = await shown(running, name, "ended")
    assert (ended["status"], ended["code"]) == (200, "request_cancelled")
    assert ended["bytes"] > 0


async def test_an_answer_that_is_no_stream_is_cut(running: Daemon) -> None:
    """Its client sees that it is not whole."""
    name = unused()
    told = {"raw": ["HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello"], "end": "hang"}
    body = json.dumps({"model": "chat", "fake": told}).encode()
    async with connected(running.port) as client:
        await client.send(request(CHAT, body, f"X-Request-Id: {name}"))
        await client.peek(b"hello")
        await running.write("DELETE", f"/requests/{name}", status=202)
        answer = await client.answer()
        assert (answer.status, answer.whole) == (200, False)
    await idle(running)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_that_has_no_answer_yet_is_refused_with_a_status_that_nobody_retries(
    running: Daemon, stream: bool  # noqa: FBT001 - a parameter
) -> None:  # fmt: skip
    """410, in the envelope; also where it is still queued."""
    first, name = unused(), unused()
    async with (
        asking(running, first, hang="before", stream=stream) as before,
        asking(running, name, hang="before", stream=stream) as asked,
    ):
        await shown(running, first, "waiting")
        await shown(running, name, "queued")
        for one, sending in ((name, asked), (first, before)):
            await running.write("DELETE", f"/requests/{one}", status=202)
            answer = await sending
            assert (answer.status, (await answer.json())["error"]["code"]) == (410, "request_cancelled")
            assert answer.headers["X-Request-Id"] == one
    await idle(running)


async def test_what_is_over_cannot_be_cancelled(running: Daemon) -> None:
    """404; the request is still told of."""
    name = unused()
    async with asking(running, name, chunks=2) as asked:
        await (await asked).read()
    await shown(running, name, "ended")
    assert (await running.write("DELETE", f"/requests/{name}", status=404))["error"]["code"] == "not_found"


async def test_a_session_is_a_request_too_and_can_be_cancelled(running: Daemon) -> None:
    """A WebSocket: it streams while it is open, and closes with an error."""
    name = unused()
    async with running.session.ws_connect("/v1/realtime?model=other", headers={"X-Request-Id": name}) as session:
        found = await shown(running, name, "streaming")
        assert (found["status"], found["model"], found["replica"]) == (101, "other", 0)
        await running.write("DELETE", f"/requests/{name}", status=202)
        messages = [message.data async for message in session]
        assert "request_cancelled" in messages[-1]
    await idle(running, "other")
