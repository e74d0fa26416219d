"""WebSocket `/v1/realtime` through the daemon, against the fake."""

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from tests import certificates
from tests.harness import Daemon, connected, daemon, fake_engines, port_block, request, until
from vllm_proxy.domain.keys import hash_of, new_key

MODELS = """
[server]
max_body_size = "64KiB"
[models.chat]
model = "org/chat"
aliases = ["an-alias"]
[models.narrow]
model = "org/narrow"
max_in_flight = 1
queue_timeout = "100ms"
"""
APPEND = {"type": "input_audio_buffer.append", "audio": "AAAA"}
COMMIT = {"type": "input_audio_buffer.commit"}
type Socket = aiohttp.ClientWebSocketResponse


@pytest.fixture(scope="module", params=["tcp", "tls"])
async def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """One daemon for all of them, and one that speaks TLS; at its end no session is counted anywhere."""
    folder = tmp_path_factory.mktemp("realtime")
    pair = certificates.make(folder) if request.param == "tls" else None
    async with daemon(fake_engines(port_block()) + MODELS, folder, pair=pair) as running:
        await running.until("2 of 2 models ready")
        yield running
        await free(running)


async def free(running: Daemon, model: str = "chat") -> None:
    """Wait until no session of a model is left."""
    await running.eventually(
        f"/models/{model}", lambda found: (found["status"]["in_flight"], found["status"]["queued"]) == (0, 0)
    )


async def hears(socket: Socket, kind: str) -> dict[str, Any]:
    """The next event, of this type."""
    event: dict[str, Any] = json.loads(await socket.receive_str(timeout=20))
    assert event["type"] == kind, event
    return event


async def messages(running: Daemon, request_id: str, model: str = "chat") -> list[str]:
    """What the engine received in a session."""
    seen = await running.seen(request_id, model)
    return list(seen[0]["messages"]) if seen else []


@pytest.mark.parametrize("name", ["chat", "an-alias"])
@pytest.mark.parametrize("where", ["address", "session.update", "both"])
async def test_a_session_reaches_the_model_that_it_names(shared: Daemon, name: str, where: str) -> None:
    """In the address or in the first session.update; one greeting, then what the engine says, event for event."""
    request_id = uuid.uuid4().hex
    path = "/v1/realtime" if where == "session.update" else f"/v1/realtime?model={name}"
    async with shared.session.ws_connect(path, headers={"X-Request-Id": request_id}) as socket:
        assert (await hears(socket, "session.created"))["id"].startswith("sess-")
        await socket.send_json({"type": "session.update", "model": "chat" if where == "address" else name})
        for event in (APPEND, APPEND, COMMIT):
            await socket.send_json(event)
        assert [(await hears(socket, "transcription.delta"))["delta"] for _ in range(2)] == ["word ", "word "]
        assert (await hears(socket, "transcription.done"))["text"] == "word word "
    heard = [json.loads(message) for message in (await messages(shared, request_id))[:4]]
    assert heard == [{"type": "session.update", "model": "chat"}, APPEND, APPEND, COMMIT]
    await free(shared)


async def test_what_each_utterance_took_is_counted_as_it_ends(tmp_path: Path, port_start: int) -> None:
    """Against the limits too, while the session goes on; and once."""
    key = new_key(bytes(32))
    keys = f'[keys.ci]\nhash = "{hash_of(key)}"\nscopes = ["inference", "read"]\ntokens_per_minute = 60\n'
    headers = {"Authorization": f"Bearer {key}"}

    async def used() -> tuple[int, int]:
        async with running.session.get("/usage", headers=headers) as answer:
            rows = (await answer.json())["rows"]
        return sum(row["prompt_tokens"] for row in rows), sum(row["completion_tokens"] for row in rows)

    async with daemon(fake_engines(port_start) + '[models.chat]\nmodel = "org/chat"\n' + keys, tmp_path) as running:
        await running.until("1 of 1 models ready")
        async with running.session.ws_connect("/v1/realtime?model=chat", headers=headers) as socket:
            await hears(socket, "session.created")
            await socket.send_json({"type": "session.update", "model": "chat"})
            for event in (APPEND, APPEND, COMMIT):
                await socket.send_json(event)
            while (await socket.receive_json(timeout=20))["type"] != "transcription.done":
                pass
            assert await until(used, lambda found: found != (0, 0)) == (20, 2)
            body = {"model": "chat", "prompt": "x" * 20, "max_tokens": 40}
            async with running.session.post("/v1/completions", json=body, headers=headers) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (429, "rate_limit_exceeded")
        assert await used() == (20, 2)


async def test_events_pass_byte_for_byte(shared: Daemon) -> None:
    """Spaces, unknown members and events that the daemon does not know are the engine's business."""
    request_id = uuid.uuid4().hex
    texts = [
        '{ "type":"session.update",  "model": "chat", "n": 1e400}',
        '{"type": "odd", "x": "session.update \\u00e9"}',
    ]
    async with shared.session.ws_connect("/v1/realtime?model=chat", headers={"X-Request-Id": request_id}) as socket:
        await hears(socket, "session.created")
        for text in texts:
            await socket.send_str(text)
        assert (await hears(socket, "error"))["code"] == "unknown_event"
    assert (await messages(shared, request_id))[:2] == texts


async def test_of_an_event_with_an_alias_every_other_byte_stays(shared: Daemon) -> None:
    """Wherever the name stands; and the engine gets a request id of its own."""
    request_id = uuid.uuid4().hex
    text = '{ "n": 1e400,\t"model" :"an-alias" , "type":"session.update", "x":"\u00e9 \\u00e9"}'
    async with shared.session.ws_connect("/v1/realtime", headers={"X-Request-Id": request_id}) as socket:
        await hears(socket, "session.created")
        await socket.send_str(text)
        await socket.send_json({"type": "odd"})
        await hears(socket, "error")
    assert (await messages(shared, request_id))[0] == text.replace("an-alias", "chat")
    (seen,) = await shared.seen(request_id)
    assert request_id not in dict(seen["headers"]).values()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="it reads whatever fits into max_body_size here")
@pytest.mark.parametrize("first", [True, False])
async def test_an_event_that_is_nested_too_deeply_names_no_model(shared: Daemon, first: bool) -> None:  # noqa: FBT001 - a parameter
    """As the first one it ends the session with the reason, later it is the engine's."""
    deep = '{"type": "session.update", "model": "chat", "x": ' + "[" * 30_000 + "]" * 30_000 + "}"
    async with shared.session.ws_connect("/v1/realtime" + ("" if first else "?model=chat")) as socket:
        await hears(socket, "session.created")
        await socket.send_str(deep)
        if first:
            assert (await hears(socket, "error"))["error"]["code"] == "missing_model"
        else:
            assert (await socket.receive(timeout=20)).type in {WSMsgType.TEXT, WSMsgType.CLOSE}
    await free(shared)


async def test_bytes_pass_both_ways(shared: Daemon) -> None:
    """Binary messages are passed on as such."""
    request_id = uuid.uuid4().hex
    async with shared.session.ws_connect("/v1/realtime?model=chat", headers={"X-Request-Id": request_id}) as socket:
        await hears(socket, "session.created")
        await socket.send_json({"type": "fake", "binary": "from the engine"})
        assert (await socket.receive(timeout=20)).data == b"from the engine"
        await socket.send_bytes(b"from the client")
        assert (await socket.receive(timeout=20)).type in {WSMsgType.CLOSE, WSMsgType.CLOSED}
    assert "binary from the client" in await messages(shared, request_id)


async def test_an_engine_gets_its_own_key_and_never_the_clients(shared: Daemon) -> None:
    """The client's credentials stop at the daemon, and so does what would set its priority or its replica."""
    request_id = uuid.uuid4().hex
    own = {"Authorization": "Bearer client-key", "X-Vllm-Priority": "client-key", "X-data-parallel-rank": "client-key"}
    headers = {"X-Request-Id": request_id, **own}
    async with shared.session.ws_connect("/v1/realtime?model=chat", headers=headers) as socket:
        await hears(socket, "session.created")
    (seen,) = await shared.seen(request_id)
    assert "client-key" not in str(seen["headers"])


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ({"type": "session.update", "model": "nobody"}, "model_not_found"),
        ({"type": "session.update"}, "missing_model"),
        ({"type": "input_audio_buffer.append", "model": "chat"}, "missing_model"),
        ({"type": "session.update", "model": 5}, "missing_model"),
        (["session.update"], "missing_model"),
    ],
)
async def test_a_session_that_names_no_model_is_ended_with_the_reason(shared: Daemon, first: object, code: str) -> None:
    """An error event with the code, then the end; no engine hears of it."""
    async with shared.session.ws_connect("/v1/realtime") as socket:
        await hears(socket, "session.created")
        await socket.send_json(first)
        event = await hears(socket, "error")
        assert event["error"]["code"] == code
        assert event["error"]["message"].startswith("cannot ")
        message = await socket.receive(timeout=20)
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1008)


@pytest.mark.parametrize("garbage", ["{", "", "session.update"])
async def test_a_first_message_that_is_no_json_ends_the_session(shared: Daemon, garbage: str) -> None:
    """As one that names no model."""
    async with shared.session.ws_connect("/v1/realtime") as socket:
        await hears(socket, "session.created")
        await socket.send_str(garbage)
        assert (await hears(socket, "error"))["error"]["code"] == "missing_model"


async def test_an_unknown_model_in_the_address_is_404_before_the_upgrade(shared: Daemon) -> None:
    """In the envelope, as on every other route."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await shared.session.ws_connect("/v1/realtime?model=nobody")
    assert refused.value.status == 404


async def test_without_an_upgrade_it_is_a_bad_request(shared: Daemon) -> None:
    """400 `bad_request` for a plain GET."""
    error = (await shared.get("/v1/realtime?model=chat", 400))["error"]
    assert error["code"] == "bad_request"


@pytest.mark.parametrize(("code", "seen"), [(1000, 1000), (4001, 4001), (1011, 1011)])
async def test_a_close_of_the_engine_reaches_the_client_with_its_code(shared: Daemon, code: int, seen: int) -> None:
    """The daemon adds nothing."""
    async with shared.session.ws_connect("/v1/realtime?model=chat") as socket:
        await hears(socket, "session.created")
        await socket.send_json({"type": "fake", "close": code})
        message = await socket.receive(timeout=20)
        assert (message.type, message.data) == (WSMsgType.CLOSE, seen)


async def test_an_engine_that_breaks_off_is_not_an_orderly_end(shared: Daemon) -> None:
    """The client gets 1011, the code for a server that failed."""
    async with shared.session.ws_connect("/v1/realtime?model=chat") as socket:
        await hears(socket, "session.created")
        await socket.send_json({"type": "fake", "cut": True})
        message = await socket.receive(timeout=20)
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1011)
    await free(shared)


@pytest.mark.parametrize("code", [1000, 4002])
async def test_a_close_of_the_client_reaches_the_engine_with_its_code(shared: Daemon, code: int) -> None:
    """And the session's place is free."""
    request_id = uuid.uuid4().hex
    async with shared.session.ws_connect("/v1/realtime?model=chat", headers={"X-Request-Id": request_id}) as socket:
        await hears(socket, "session.created")
        await socket.close(code=code)
    await until(lambda: messages(shared, request_id), lambda heard: heard[-1:] == [f"close {code}"])
    await free(shared)


@pytest.mark.parametrize("greeted", [True, False])
async def test_a_client_that_vanishes_frees_its_engine(shared: Daemon, greeted: bool) -> None:  # noqa: FBT001 - a parameter
    """Without a close frame, inside a session and before one has a model."""
    request_id = uuid.uuid4().hex
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"X-Request-Id: {request_id}",
               "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")  # fmt: skip
    async with connected(shared) as client:
        path = "/v1/realtime" + ("?model=chat" if greeted else "")
        await client.send(request(path, b"", *upgrade, method="GET"))
        await client.reader.readuntil(b"session.created")
        client.leave()
    await free(shared)
    if greeted:
        await until(lambda: shared.seen(request_id), lambda seen: [found["state"] for found in seen] == ["gone"])


async def test_a_message_over_the_limit_ends_the_session(shared: Daemon) -> None:
    """1009; a smaller one passes."""
    async with shared.session.ws_connect("/v1/realtime?model=chat") as socket:
        await hears(socket, "session.created")
        await socket.send_json(APPEND | {"audio": "A" * 60_000})
        await socket.send_json({"type": "odd"})
        await hears(socket, "error")
        await socket.send_json(APPEND | {"audio": "A" * 70_000})
        message = await socket.receive(timeout=20)
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1009)
    await free(shared)


async def test_a_session_holds_a_place_of_its_instance_until_it_ends(shared: Daemon) -> None:
    """The next one waits for `queue_timeout` and is told so."""
    async with shared.session.ws_connect("/v1/realtime?model=narrow") as first:
        await hears(first, "session.created")
        async with shared.session.ws_connect("/v1/realtime?model=narrow") as second:
            assert (await hears(second, "error"))["error"]["code"] == "queue_timeout"
    async with shared.session.ws_connect("/v1/realtime?model=narrow") as third:
        await hears(third, "session.created")
    await free(shared, "narrow")


async def test_an_engine_that_dies_ends_its_sessions(tmp_path: Path, port_start: int) -> None:
    """Each client gets 1011 and no count is left."""
    async with daemon(fake_engines(port_start) + '[models.chat]\nmodel = "x"\n', tmp_path) as running:
        await running.until("1 of 1 models ready")
        async with (
            running.session.ws_connect("/v1/realtime?model=chat") as one,
            running.session.ws_connect("/v1/realtime?model=chat") as two,
        ):
            await asyncio.gather(hears(one, "session.created"), hears(two, "session.created"))
            os.kill((await running.pids("chat"))[0], signal.SIGKILL)
            assert [(await socket.receive(timeout=20)).data for socket in (one, two)] == [1011, 1011]
        await free(running)
