"""A key that is taken away, narrowed or expired: its next request is refused, and what it has running ends honestly."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.harness import Daemon, daemon, fake_engines, port_block
from vllm_proxy.domain.keys import hash_of, new_key

CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"
MODELS = '[models.chat]\nmodel = "org/chat"\naliases = ["gpt"]\n[models.other]\nmodel = "org/chat"\n'
KEY, SECOND, OTHER = (new_key(bytes([number]) * 32) for number in range(3))


def keys(ci: str = "", hashes: list[str] | None = None) -> str:
    """Two keys, of which one is changed."""
    listed = json.dumps(hashes or [hash_of(KEY)])
    return f'[keys.ci]\nhash = {listed}\n{ci}\n[keys.other]\nhash = "{hash_of(OTHER)}"\nscopes = ["admin"]\n'


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon whose two models are ready."""
    folder = tmp_path_factory.mktemp("revocation")
    base = fake_engines(port_block()) + MODELS
    (folder / "base.toml").write_text(base, encoding="utf-8")
    async with daemon(base + keys(), folder) as found:
        await found.all_ready()
        yield found


@pytest.fixture(autouse=True)
async def _as_at_first(running: Daemon) -> AsyncIterator[None]:
    """Each test leaves the keys as they were."""
    yield
    save(running, keys())
    await running.write("POST", "/config/reload")


def save(running: Daemon, text: str) -> None:
    """Save the file with these keys, as an editor does."""
    beside = running.file.with_suffix(".new")
    beside.write_text((running.folder / "base.toml").read_text(encoding="utf-8") + text, encoding="utf-8")
    beside.rename(running.file)


@contextlib.asynccontextmanager
async def asking(
    running: Daemon, go: Path, *, path: str = CHAT, key: str = KEY, model: str = "chat", hold_at: int | None = 2,
) -> AsyncIterator[aiohttp.ClientResponse]:  # fmt: skip
    """A request that goes on until there is a file."""
    fault = {"hold": str(go), "chunks": 4} | ({} if hold_at is None else {"hold_at": hold_at})
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 9,
            "fake": fault}  # fmt: skip
    headers = {"Authorization": f"Bearer {key}"}
    async with running.session.post(path, json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        yield answer


async def rest(answer: Any) -> bytes:  # noqa: ANN401 - an aiohttp answer
    """What comes until it ends; it must end in order."""
    async with asyncio.timeout(60):
        return bytes(await answer.read())


async def first_event(answer: Any) -> bytes:  # noqa: ANN401 - an aiohttp answer
    """Wait until the engine has begun to answer."""
    async with asyncio.timeout(60):
        return bytes(await answer.content.readuntil(b"\n\n"))


async def in_flight(running: Daemon, count: int) -> None:
    """Wait until the model has so many requests."""
    await running.eventually("/models/chat", lambda found: found["status"]["in_flight"] == count)


def last_event(body: bytes) -> dict[str, Any]:
    """The error that ends a stream."""
    assert b"[DONE]" not in body
    assert body.endswith(b"\n\n")
    return dict(json.loads(re.findall(rb"^data: (.*)$", body, re.MULTILINE)[-1]))


@pytest.mark.parametrize(
    ("after", "code"),
    [
        (keys("enabled = false"), "invalid_api_key"),
        (keys(hashes=[hash_of(SECOND)]), "invalid_api_key"),
        (f'[keys.other]\nhash = "{hash_of(OTHER)}"\nscopes = ["admin"]\n', "invalid_api_key"),
        (keys('scopes = ["read"]'), "missing_scope"),
        (keys('models = ["other"]'), "model_not_found"),
        (keys("expires_at = 2020-01-01T00:00:00Z"), "expired_api_key"),
    ],
)
async def test_an_edit_of_the_file_ends_the_streams_of_a_key_and_refuses_its_next_request(
    running: Daemon, tmp_path: Path, after: str, code: str
) -> None:
    """With an error event and no [DONE]; the stream of another key goes on to its end."""
    go = tmp_path / "go"
    async with asking(running, go) as mine, asking(running, go, key=OTHER) as others:
        await first_event(mine)
        await first_event(others)
        save(running, after)
        assert last_event(await rest(mine))["error"]["code"] == code
        body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
        async with running.session.post(CHAT, json=body, headers={"Authorization": f"Bearer {KEY}"}) as refused:
            assert (await refused.json())["error"]["code"] == code
        go.touch()
        assert (await rest(others)).endswith(b"data: [DONE]\n\n")


async def test_the_engine_stops_working_on_a_stream_that_was_ended(running: Daemon, tmp_path: Path) -> None:
    """As if its client had left."""
    go = tmp_path / "never"
    async with asking(running, go) as mine:
        await first_event(mine)
        save(running, keys("enabled = false"))
        await rest(mine)
    await in_flight(running, 0)
    await running.logged("an answer was ended early")


async def test_a_stream_of_anthropics_api_ends_as_its_clients_read_it(running: Daemon, tmp_path: Path) -> None:
    """Event `error`, with Anthropic's type."""
    async with asking(running, tmp_path / "never", path="/v1/messages") as mine:
        await first_event(mine)
        save(running, keys("enabled = false"))
        body = await rest(mine)
    assert b"event: error\n" in body
    assert last_event(body)["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_has_no_answer_yet_is_refused(running: Daemon, tmp_path: Path, stream: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """401 instead of an answer that its key may not have any more."""
    go, request_id = tmp_path / "never", f"waits-{stream}"
    body = {"model": "chat", "messages": [], "stream": stream, "fake": {"hold": str(go)}}
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": request_id}
    asked = asyncio.ensure_future(running.session.post(CHAT, json=body, headers=headers))
    await in_flight(running, 1)
    save(running, keys("enabled = false"))
    async with asyncio.timeout(60), await asked as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")
    await in_flight(running, 0)


async def test_a_rotation_ends_the_streams_of_the_old_key_alone_and_at_its_end(running: Daemon, tmp_path: Path) -> None:
    """With both hashes in the file both keys work; what the old one has running ends when its hash goes."""
    go = tmp_path / "go"
    async with asking(running, go) as old:
        await first_event(old)
        save(running, keys(hashes=[hash_of(KEY), hash_of(SECOND)]))
        await running.write("POST", "/config/reload")
        async with asking(running, go, key=SECOND) as new:
            await first_event(new)
            save(running, keys(hashes=[hash_of(SECOND)]))
            assert last_event(await rest(old))["error"]["code"] == "invalid_api_key"
            go.touch()
            assert (await rest(new)).endswith(b"data: [DONE]\n\n")


async def test_a_stream_ends_when_its_key_expires(running: Daemon, tmp_path: Path) -> None:
    """Nobody has to do anything for it."""
    async with asking(running, tmp_path / "never") as mine:
        await first_event(mine)
        soon = datetime.now(UTC) + timedelta(seconds=2)
        save(running, keys(f"expires_at = {soon.isoformat()}"))
        assert last_event(await rest(mine))["error"]["code"] == "expired_api_key"


async def test_what_a_change_does_not_concern_goes_on(running: Daemon, tmp_path: Path) -> None:
    """More models, another description, a later end, other models' keys."""
    go = tmp_path / "go"
    async with asking(running, go) as mine:
        await first_event(mine)
        for ci in ('models = ["chat"]', 'models = ["gpt"]', 'description = "x"', "expires_at = 2999-01-01T00:00:00Z",
                   'scopes = ["admin"]'):  # fmt: skip
            save(running, keys(ci) + '[models.more]\nmodel = "x"\nenabled = false\n')
            await running.write("POST", "/config/reload")
        go.touch()
        assert (await rest(mine)).endswith(b"data: [DONE]\n\n")


async def test_a_stream_of_events_ends_with_its_key(running: Daemon) -> None:
    """With an error event of its own."""
    save(running, keys('scopes = ["read"]'))
    await running.write("POST", "/config/reload")
    async with running.session.get("/events", headers={"Authorization": f"Bearer {KEY}"}) as events:
        assert (await events.content.readany()).startswith(b":")
        save(running, keys('scopes = ["inference"]'))
        body = await rest(events)
    assert last_event(body)["error"]["code"] == "missing_scope"


async def test_a_websocket_ends_with_its_key(running: Daemon) -> None:
    """An error event, and the close code of a violated policy; the key came as browsers send it, and is not echoed."""
    offered = ["realtime", f"openai-insecure-api-key.{KEY}"]
    async with running.session.ws_connect("/v1/realtime?model=chat", protocols=offered) as session:
        assert session.protocol == "realtime"
        assert (await session.receive_json())["type"] == "session.created"
        save(running, keys("enabled = false"))
        error = await session.receive_json(timeout=60)
        assert (error["type"], error["error"]["code"]) == ("error", "invalid_api_key")
        assert (await session.receive(timeout=60)).data == aiohttp.WSCloseCode.POLICY_VIOLATION


async def test_a_reload_says_what_became_of_the_keys(running: Daemon) -> None:
    """By name, in the answer and as an event."""
    async with running.admin.get("/events") as events:
        await events.content.readany()
        save(running, keys("enabled = false") + f'[keys.new]\nhash = "{hash_of(SECOND)}"\n')
        answer = await running.write("POST", "/config/reload")
        assert answer["keys"] in (
            {"added": ["new"], "changed": ["ci"], "removed": []},
            {"added": [], "changed": [], "removed": []},  # the watch of the file was quicker
        )
        async with asyncio.timeout(60):
            while b"event: config" not in (line := await events.content.readline()):
                pass
            line = await events.content.readline()
        assert json.loads(line.removeprefix(b"data: "))["keys"] == {"added": ["new"], "changed": ["ci"], "removed": []}


async def test_a_write_is_one_line_and_one_event_with_who_and_what(running: Daemon) -> None:
    """The name of the key, the request, the revision before and after."""
    before = (await running.write("GET", "/health"))["config"]["revision"]
    async with running.admin.get("/events") as events:
        await events.content.readany()
        headers = {"Authorization": f"Bearer {OTHER}"}
        async with running.session.patch("/models/chat", json={"description": "x"}, headers=headers) as answer:
            assert answer.status == 200
            after = answer.headers["ETag"].strip('"')
        async with asyncio.timeout(60):
            while b"event: write" not in await events.content.readline():
                pass
            written = json.loads((await events.content.readline()).removeprefix(b"data: "))
    assert written == {"who": "key other", "what": "PATCH /models/chat", "before": before, "after": after}
    await running.logged("who='key other'", times=1)
    await running.write("POST", "/models/other/restart", status=202)
    await running.logged("what='POST /models/other/restart'")


async def test_a_key_that_revokes_itself_is_told_that_it_did(running: Daemon) -> None:
    """What a write has changed is answered; the next request is refused."""
    headers = {"Authorization": f"Bearer {OTHER}"}
    async with running.session.patch("/keys/other", json={"enabled": False}, headers=headers) as answer:
        assert (answer.status, (await answer.json())["enabled"]) == (200, False)
    async with running.session.get("/keys", headers=headers) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")


async def test_the_log_of_a_request_has_the_name_of_its_key(running: Daemon) -> None:
    """Of one that was let in; neither the key nor what else was sent in its place."""
    body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
    for sent, shown in ((KEY, "ci"), ("vp-nobodys", "-")):
        headers = {"Authorization": f"Bearer {sent}", "X-Request-Id": f"log-{shown}"}
        async with running.session.post(CHAT, json=body, headers=headers) as answer:
            assert answer.status in {200, 401}
        await running.logged(f"request id=log-{shown} ")
        (line,) = (line for line in running.log().splitlines() if f"request id=log-{shown} " in line)
        assert f" key={shown} " in line
        assert sent not in running.log()
