"""What somebody tries who has read the page about security: at a running daemon, byte by byte where that matters."""

import asyncio
import io
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Client, Daemon, connected, daemon, fake_engines, port_block, request, until
from vllm_proxy.domain.keys import hash_of, new_key

CHAT, KEY_LINE = "/v1/chat/completions", "Authorization: Bearer "
KEYS = {
    name: new_key(bytes([number]) * 32)
    for number, name in enumerate(["ci", "read", "operate", "admin", "tenant", "second"])
}
TABLES = "".join(
    f'[keys.{name}]\nhash = "{hash_of(KEYS[name])}"\nscopes = ["{scope}"]\n{more}\n'
    for name, scope, more in (
        ("ci", "inference", 'models = ["chat"]'),
        ("tenant", "inference", "isolate_cache = true"),
        ("read", "read", ""),
        ("operate", "operate", ""),
        ("admin", "admin", ""),
    )
)
MODELS = '[models.chat]\nmodel = "org/chat"\naliases = ["gpt"]\n[models.other]\nmodel = "org/other"\n'
ASK = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]}).encode()
UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
           "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")  # fmt: skip
ADMIN, CI = KEY_LINE + KEYS["admin"], KEY_LINE + KEYS["ci"]


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with keys of each kind, ready; its keys stand in a file of their own."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "keys.toml").write_text(TABLES)
    config = '[server]\nkeys_file = "keys.toml"\nmax_body_size = "4MiB"\n' + fake_engines(port_block()) + MODELS
    (folder / "first.toml").write_text(config)
    async with daemon(config, folder) as found:
        await found.all_ready()
        yield found


@pytest.fixture(autouse=True)
async def _as_at_first(running: Daemon) -> AsyncIterator[None]:
    """Each test leaves the files as they were."""
    yield
    keys = running.folder / "keys.toml"
    if keys.is_dir() and not keys.is_symlink():
        keys.rmdir()
    save(keys, TABLES.encode())
    save(running.file, (running.folder / "first.toml").read_bytes())
    await running.write("POST", "/config/reload")


def save(file: Path, data: bytes) -> None:
    """Put a file in the place of another."""
    beside = file.with_name(f"{file.name}.{os.getpid()}.saved")
    beside.write_bytes(data)
    beside.rename(file)


def get(path: str, *lines: str, version: str = "1.1", method: str = "GET") -> bytes:
    """A request without a body."""
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: localhost", *lines, "", ""]).encode("latin-1")


async def statuses(client: Client, count: int) -> list[int]:
    """Of the next answers."""
    async with asyncio.timeout(60):
        return [(await client.answer()).status for _ in range(count)]


# Heads


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (get("/models", ADMIN, KEY_LINE + "x"), [401]),
        (get("/models", KEY_LINE + "x", ADMIN), [401]),
        (get("/models", ADMIN, ADMIN), [401]),
        (get("/models", ADMIN.replace(": ", " : ")), [400]),
        (get("/models", "Authorization: Bearer\r\n " + KEYS["admin"]), [400]),
        (get("/models", "X-A: b\r\n " + ADMIN), [400]),
        (get("/models", ADMIN + "\0"), [400]),
        (get("/models", "Authorization: Bearer \xff\xfe"), [401]),
        (get("/models", "AUTHORIZATION: bEARER " + KEYS["admin"]), [200]),
        (get("/models", ADMIN, version="1.0"), [200]),
        (get("/models", version="1.0"), [401]),
        (get("/models", "Authorization: Basic " + KEYS["admin"]), [401]),
        (get("/models", "Cookie: key=" + KEYS["admin"], "Proxy-Authorization: Bearer " + KEYS["admin"]), [401]),
        (get("/models", "Connection: authorization", KEY_LINE + "x", "x-api-key: " + KEYS["read"]), [200]),
        (get("/models", "Sec-WebSocket-Protocol: openai-insecure-api-key." + KEYS["admin"], *UPGRADE), [401]),
        (get("/v1/realtime?model=chat", *UPGRADE), [401]),
        (get("/v1/realtime?model=other", CI, *UPGRADE), [404]),
    ],
)
async def test_a_key_counts_where_it_stands_alone_and_in_its_own_header(
    running: Daemon, sent: bytes, expected: list[int]
) -> None:
    """Twice, folded, in another scheme or header: it is none."""
    async with connected(running.port) as client:
        await client.send(sent)
        assert await statuses(client, len(expected)) == expected


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (get("/models", ADMIN) + get("/models") + get("/keys", ADMIN) + get("/keys"), [200, 401, 200, 401]),
        (get("/models") + get("/models", ADMIN), [401, 200]),
        (request(CHAT, ASK, CI) + request(CHAT, ASK) + request(CHAT, ASK, CI), [200, 401, 200]),
        (request(CHAT, ASK, ADMIN) + request(CHAT, ASK.replace(b"chat", b"other"), CI), [200, 404]),
        (get("/keys", ADMIN) + get("/keys", KEY_LINE + KEYS["read"]), [200, 403]),
        (get("/models", ADMIN, *UPGRADE) + get("/models"), [200, 401]),
        (get("localhost:80", ADMIN, method="CONNECT") + get("/models"), [404, 401]),
        (get("/v1/files", ADMIN) + get("/models"), [501, 401]),
        (get("/nowhere", ADMIN) + get("/models"), [404, 401]),
        (request(CHAT, b"5\r\nhello\r\n0\r\n\r\n", "Transfer-Encoding: chunked") + get("/models", ADMIN), [401, 200]),
        (request(CHAT, get("/models", ADMIN)) + get("/models"), [401, 401]),
        (request("/models", get("/models", ADMIN)) + get("/models"), [401, 401]),
    ],
)
async def test_a_caller_is_that_of_one_request_and_not_of_its_connection(
    running: Daemon, sent: bytes, expected: list[int]
) -> None:
    """In one write, in any order: what came before or stands in a body gives nothing to what comes behind it."""
    async with connected(running.port) as client:
        await client.send(sent)
        assert await statuses(client, len(expected)) == expected


@pytest.mark.parametrize(
    "target",
    ["/models", "//models", "/%6dodels", "/%6Dodels/", "/v1/../models", "/v1/%2e%2e/models", "/./models", "http://x/models",
     "http://x:1/config", "http://u:p@x/keys", "/models?a=b", "/models;a", "/keys/%61dmin", "/keys/../config",
     "/config#a", "/v1//models", "/models/chat/../other", "/MODELS", "/config/", "/metrics%3f", "*"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
async def test_no_spelling_of_a_path_and_no_method_gets_in_without_a_key(
    running: Daemon, method: str, target: str
) -> None:
    """It is the route, which asks for a key, or none."""
    before = running.file.read_bytes()
    async with connected(running.port) as client:
        await client.send(get(target, method=method))
        async with asyncio.timeout(60):
            answer = await client.answer(head=method == "HEAD")
    assert answer.status in {400, 401, 404, 405}
    assert running.file.read_bytes() == before


@pytest.mark.parametrize("method", ["FOO", "get", "GET\t", "", "CHAT", "\xff"])
async def test_a_method_that_nobody_knows_is_refused(running: Daemon, method: str) -> None:
    """By the parser."""
    async with connected(running.port) as client:
        await client.send(get("/models", ADMIN, method=method))
        assert await statuses(client, 1) == [400]


@pytest.mark.parametrize("path", [CHAT, "/models", "/v1/models", "/v1/realtime", "/v1/responses/r", "/keys/ci"])
@pytest.mark.parametrize("name", ["api_key", "key", "access_token", "Authorization", "x-api-key"])
async def test_a_key_in_a_url_is_none_and_stands_nowhere(running: Daemon, path: str, name: str) -> None:
    """Neither in an answer nor in the log."""
    method = "POST" if path == CHAT else "GET"
    async with connected(running.port) as client:
        await client.send(request(f"{path}?{name}={KEYS['admin']}", ASK if method == "POST" else b"", method=method))
        async with asyncio.timeout(60):
            answer = await client.answer()
    assert answer.status == 401
    assert KEYS["admin"].encode() not in answer.body
    if path.startswith("/v1/") and path != "/v1/models":
        await running.logged("status=401")
    assert KEYS["admin"] not in running.log()


# Bodies


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", CHAT), ("POST", CHAT + "?a=b"), ("POST", "/models"), ("PUT", "/config"), ("POST", "/config/plan"),
     ("PATCH", "/models/chat"), ("POST", "/keys"), ("POST", "/v1/audio/transcriptions"),
     ("POST", "/v1/responses/r/cancel"), ("POST", "/nowhere"), ("POST", "/v1/files"), ("DELETE", "/models/chat")],
)  # fmt: skip
async def test_nobody_is_asked_for_a_body_who_will_not_be_let_in(running: Daemon, method: str, path: str) -> None:
    """A client that waits for 100 Continue gets its refusal at once, and sends nothing."""
    async with connected(running.port) as client:
        head = ("Expect: 100-continue", "Content-Length: 1000", "Content-Type: text/toml")
        await client.send(get(path, *head, method=method))
        assert await statuses(client, 1) in ([401], [404], [501])


@pytest.mark.parametrize(
    ("method", "path", "kind", "body", "status"),
    [
        ("POST", CHAT, "application/json", ASK, 200),
        ("POST", CHAT + "?a=b", "application/json", ASK, 200),
        ("PATCH", "/models/chat", "application/json", b'{"description": "x"}', 200),
        ("POST", "/config/plan", "text/toml", MODELS.encode(), 200),
        ("POST", "/v1/responses/r/cancel", "application/json", b"{}", 404),
        ("PATCH", "/models/chat", "text/plain", b"x", 415),
        ("PATCH", "/models/nobody", "application/json", b"{}", 404),
    ],
)
async def test_who_is_let_in_is_asked_for_the_body_once(
    running: Daemon, method: str, path: str, kind: str, body: bytes, status: int
) -> None:
    """Where it is taken at all: what is refused for its type is not asked for either."""
    async with connected(running.port) as client:
        head = ("Expect: 100-continue", f"Content-Length: {len(body)}", f"Content-Type: {kind}", ADMIN)
        await client.send(get(path, *head, method=method))
        if status != 415:
            assert await statuses(client, 1) == [100]
            await client.send(body)
        assert await statuses(client, 1) == [status]


@pytest.mark.parametrize("pad", [0, 2**20, 3 * 2**20])
@pytest.mark.parametrize("end", [b"", b" \r\n\t\n", b"\n"])
@pytest.mark.parametrize("name", [b"chat", b"gpt"])
async def test_a_prompt_of_a_key_that_isolates_has_its_salt(running: Daemon, name: bytes, end: bytes, pad: int) -> None:
    """Whatever its size, with an alias, with spaces behind it, and though the client sends one of its own."""
    body = b'{"cache_salt": "mine", "model": "%s", "pad": "%s", "fake": {"echo": true}}' % (name, b"x" * pad) + end
    async with running.session.post(
        CHAT, data=io.BytesIO(body), headers={"Authorization": f"Bearer {KEYS['tenant']}"}
    ) as answer:
        assert answer.status == 200
        seen = json.loads((await answer.json())["body"])
    assert seen["model"] == "chat"
    assert re.fullmatch("[0-9a-f]{64}", seen["cache_salt"])


async def test_no_encoding_takes_a_prompt_past_its_salt(running: Daemon) -> None:
    """A large body that engines would read as UTF-16, and that names a model in UTF-8 as well."""
    hidden = b'", "model": "chat", "y": "'.decode("utf-16-le")
    body = f'{{"model": "chat", "x": "{hidden}", "pad": "{"x" * 2**20}", "fake": {{"echo": true}}}}'.encode("utf-16-le")
    async with running.session.post(
        CHAT, data=io.BytesIO(body), headers={"Authorization": f"Bearer {KEYS['tenant']}"}
    ) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "invalid_json")


# Files


@pytest.mark.parametrize(
    "text",
    [
        '[server]\nkeys_file = "{0}/secret.yaml"',
        '[server]\nkeys_file = "secret.yaml"',
        '[keys.a]\nfile = "{0}/secret.yaml"',
        '[keys.a]\nfile = "{0}/nothing"',
        '[server]\nkeys_file = "{0}/nothing"',
        '[server]\nkeys_file = "/proc/self/environ"',
        '[server]\nkeys_file = "credential:x"',
        '[server]\nkeys_file = "{0}"',
        '[keys.a]\nfile = "{0}/long"\n[keys.b]\nhash = "{1}"',
    ],
)
async def test_who_may_read_has_no_file_of_the_machine_looked_at(running: Daemon, text: str) -> None:
    """A plan says the same whatever a file holds, and whether it is there; an administrator's plan looks."""
    (running.folder / "secret.yaml").write_text("user: hunter2\n")
    (running.folder / "long").write_text("a-password-of-more-than-32-characters\n")
    body = text.format(running.folder, hash_of("a-password-of-more-than-32-characters")).encode()
    answers = {}
    for name in ("read", "operate", "admin"):
        headers = {"Authorization": f"Bearer {KEYS[name]}", "Content-Type": "text/toml"}
        async with running.session.post("/config/plan", data=body, headers=headers) as answer:
            answers[name] = answer.status, await answer.text()
    assert answers["read"] == answers["operate"]
    assert answers["read"][0] == 200
    assert answers["admin"][0] == 422
    assert "hunter2" not in answers["admin"][1]


async def test_a_plan_looks_at_the_files_that_are_in_force(running: Daemon) -> None:
    """For whoever may read as well: a name in both files is told."""
    body = '[server]\nkeys_file = "keys.toml"\n[keys.ci]\nhash = "sha256:' + "0" * 64 + '"\n'
    headers = {"Authorization": f"Bearer {KEYS['read']}", "Content-Type": "text/toml"}
    async with running.session.post("/config/plan", data=body, headers=headers) as answer:
        assert answer.status == 422
        assert "keys.ci" in (await answer.json())["error"]["problems"][0]["path"]


async def _becomes(running: Daemon, *, holds: bool) -> Any:  # noqa: ANN401 - JSON
    """The configuration's error, once there is one, or none."""
    found = await running.eventually("/health", lambda health: bool(health["config"]["error"]) is holds)
    return found["config"]["error"]


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "link": lambda keys: keys.symlink_to("nowhere"),
    "loop": lambda keys: keys.symlink_to("keys.toml"),
    "device": lambda keys: keys.symlink_to("/dev/zero"),
    "socket": lambda keys: keys.symlink_to("state/control.sock"),
    "large": lambda keys: keys.write_bytes(b"#" * (2**24 + 1)),
    "bytes": lambda keys: keys.write_bytes(b"[keys.x]\nhash = '\xff'\n"),
    "gone": lambda _: None,
    "garbage": lambda keys: keys.write_text(f"hash = {KEYS['second']}"),
    "wrong": lambda keys: keys.write_text(f'[keys.x]\nhash = "{KEYS["second"]}"\n'),
}


@pytest.mark.parametrize("kind", list(UNUSABLE))
async def test_a_keys_file_that_cannot_be_used_opens_and_closes_nothing(running: Daemon, kind: str) -> None:
    """It is told, the keys that were there stay in force, and a good one in its place is followed."""
    keys = running.folder / "keys.toml"
    keys.unlink()
    UNUSABLE[kind](keys)
    error = await _becomes(running, holds=True)
    assert "keys" in error
    assert KEYS["second"] not in error
    for name, status in (("admin", 200), ("second", 401)):
        async with running.session.get("/models", headers={"Authorization": f"Bearer {KEYS[name]}"}) as answer:
            assert answer.status == status
    if kind == "folder":
        keys.rmdir()
    save(keys, (TABLES + f'[keys.x]\nhash = "{hash_of(KEYS["second"])}"\nscopes = ["read"]\n').encode())
    await _becomes(running, holds=False)
    async with running.session.get("/models", headers={"Authorization": f"Bearer {KEYS['second']}"}) as answer:
        assert answer.status == 200


async def test_anonymous_may_stand_in_the_keys_file(running: Daemon) -> None:
    """And means there what it means in the configuration."""
    save(running.folder / "keys.toml", (TABLES + '[keys.anonymous]\nscopes = ["metrics"]\n').encode())
    await running.write("POST", "/config/reload")
    assert [await _status(running, path, {}) for path in ("/metrics", "/models", "/v1/models")] == [200, 401, 401]


async def _status(running: Daemon, path: str, headers: Mapping[str, str]) -> int:
    async with running.session.get(path, headers=headers) as answer:
        return answer.status


# What was begun before a key was taken away


@pytest.mark.parametrize(
    ("method", "path", "kind", "body"),
    [
        ("PUT", "/config", "text/toml", b"[server]\nallow_remote_admin = true\n"),
        ("POST", "/keys", "application/json", b'{"name": "mine", "scopes": ["admin"]}'),
        ("POST", "/models", "application/json", b'{"id": "mine", "model": "x", "command": ["sh", "-c", "id"]}'),
        ("PATCH", "/models/chat", "application/merge-patch+json", b'{"command": ["sh", "-c", "id"]}'),
        ("POST", CHAT, "application/json", ASK),
        ("POST", "/v1/audio/transcriptions", "multipart/form-data; boundary=b", b"--b\r\n" + b"x" * 100),
    ],
)
async def test_what_a_stolen_key_has_half_sent_is_never_done(
    running: Daemon, method: str, path: str, kind: str, body: bytes
) -> None:
    """It is revoked while the body is on its way: 401 at once, and the rest of it changes nothing."""
    before = [file.read_bytes() for file in (running.file, running.folder / "keys.toml")]
    async with connected(running.port) as client:
        await client.send(request(path, body[:-1], ADMIN, f"Content-Length: {len(body)}", method=method).replace(
            b"Content-Type: application/json", f"Content-Type: {kind}".encode(), 1
        ))  # fmt: skip
        await running.eventually("/health", lambda _: True)  # it has come: the control socket's request came later
        save(running.folder / "keys.toml", TABLES.replace("[keys.admin]", "[keys.admin]\nenabled = false").encode())
        assert await statuses(client, 1) == [401]
        await client.send(body[-1:])
        await client.closed()
    await running.write("POST", "/config/reload")
    assert running.file.read_bytes() == before[0]
    assert b"mine" not in (running.folder / "keys.toml").read_bytes()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PATCH", "/keys/admin", {"enabled": False}, 200),
        ("PATCH", "/keys/admin", {"scopes": ["inference"]}, 200),
        ("DELETE", "/keys/admin", None, 204),
    ],
)
async def test_who_takes_its_own_key_away_is_told_that_it_is_done(
    running: Daemon, method: str, path: str, body: object, status: int
) -> None:
    """And can do nothing more."""
    headers = {"Authorization": f"Bearer {KEYS['admin']}"}
    async with running.session.request(method, path, json=body, headers=headers) as answer:
        assert answer.status == status, await answer.text()
    assert await _status(running, "/keys", headers) in {401, 403}


async def test_who_loads_a_file_without_its_own_key_is_told_what_became_of_it(running: Daemon) -> None:
    """Or the watch of the file was quicker, and it is not let in."""
    save(running.folder / "keys.toml", TABLES.replace("[keys.operate]", "[keys.operate]\nenabled = false").encode())
    headers = {"Authorization": f"Bearer {KEYS['operate']}"}
    async with running.session.post("/config/reload", headers=headers) as answer:
        assert (answer.status, (await answer.json()).get("revision") is not None) in {(200, True), (401, False)}


@pytest.mark.parametrize("path", ["/models/chat/logs?follow=1", "/events"])
async def test_what_is_followed_ends_with_its_key(running: Daemon, path: str) -> None:
    """A log, the events: with an error event, in order."""
    async with running.session.get(path, headers={"Authorization": f"Bearer {KEYS['operate']}"}) as answer:
        await answer.content.readany()
        save(running.folder / "keys.toml", TABLES.replace("[keys.operate]", "[keys.operate]\nenabled = false").encode())
        async with asyncio.timeout(60):
            text = await answer.text()
    assert "invalid_api_key" in text


async def test_a_session_that_has_said_nothing_ends_with_its_key(running: Daemon) -> None:
    """It was greeted, and has named no model yet."""
    headers = {"Authorization": f"Bearer {KEYS['ci']}"}
    async with running.session.ws_connect("/v1/realtime", headers=headers) as session:
        assert (await session.receive_json(timeout=60))["type"] == "session.created"
        save(running.folder / "keys.toml", TABLES.replace("[keys.ci]", "[keys.ci]\nenabled = false").encode())
        assert (await session.receive_json(timeout=60))["error"]["code"] == "invalid_api_key"


async def test_a_session_that_waits_for_its_model_ends_when_its_key_may_not_have_that_any_more(
    tmp_path: Path, port_start: int
) -> None:
    """In the queue, before the first engine is ready: an error event, and the session is closed."""
    gate = tmp_path / "gate"
    config = (
        f'{fake_engines(port_start)}[models.chat]\nmodel = "x"\nargs = {{ fake_phase_until = "weights={gate}" }}\n'
        '[models.other]\nmodel = "x"\nenabled = false\n'
    )
    keys = f'[keys.ci]\nhash = "{hash_of(KEYS["ci"])}"\n'
    async with daemon(config + keys, tmp_path) as found:
        headers = {"Authorization": f"Bearer {KEYS['ci']}"}
        async with found.session.ws_connect("/v1/realtime?model=chat", headers=headers) as session:
            await found.eventually("/models/chat", lambda model: model["status"]["queued"] == 1)
            save(found.file, (config + keys + 'models = ["other"]\n').encode())
            error = await session.receive_json(timeout=60)
            assert error["error"]["code"] == "model_not_found"
        await found.eventually("/models/chat", lambda model: model["status"]["queued"] == 0)
        gate.touch()


# Two daemons


async def test_two_daemons_with_one_keys_file_follow_each_other(running: Daemon, tmp_path: Path) -> None:
    """What one of them writes for REST is in force at the other; so is what somebody saves."""
    config = f'[server]\nkeys_file = "{running.folder / "keys.toml"}"\n{fake_engines(port_block())}'
    async with daemon(config, tmp_path) as other:
        made = await running.write("POST", "/keys", {"name": "shared", "scopes": ["read"]}, 201)
        headers = {"Authorization": f"Bearer {made['key']}"}
        await until(lambda: _status(other, "/models", headers), lambda status: status == 200)
        await other.write("PATCH", "/keys/shared", {"enabled": False})
        await until(lambda: _status(running, "/models", headers), lambda status: status == 401)
        names = [f"k{number}" for number in range(3)]
        await asyncio.gather(*(running.write("POST", "/keys", {"name": name}, 201) for name in names))
        listed = await other.eventually("/keys", lambda found: {*names} <= {key["name"] for key in found["keys"]})
        assert not next(key["enabled"] for key in listed["keys"] if key["name"] == "shared")


@pytest.mark.slow
async def test_keys_that_come_and_go_a_hundred_times_a_second_leave_nothing_behind(running: Daemon) -> None:
    """Fifty clients with streams: an answer is whole, a refusal, or ends in one; at the end nothing is held."""
    tokens = [f"{number:040}" for number in range(50)]
    tables = {
        on: "".join(
            f'[keys.k{number}]\nhash = "{hash_of(token)}"\nenabled = {str(on or not number % 2).lower()}\n'
            for number, token in enumerate(tokens)
        )
        for on in (True, False)
    }
    body = {"model": "chat", "stream": True, "messages": [{"role": "user", "content": "x"}],
            "fake": {"chunks": 40, "interval": 0.002}}  # fmt: skip
    ends = dict.fromkeys(("done", "refused", "ended"), 0)
    over = asyncio.Event()

    async def client(token: str) -> None:
        while not over.is_set():
            async with running.session.post(CHAT, json=body, headers={"Authorization": f"Bearer {token}"}) as answer:
                text = await answer.text()
            if answer.status == 200:
                ended = "invalid_api_key" in text
                assert ended or "data: [DONE]" in text
                ends["ended" if ended else "done"] += 1
            else:
                assert (answer.status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
                ends["refused"] += 1

    async def toggle() -> None:
        on = True
        while ends["ended"] < 100 or ends["refused"] < 100 or ends["done"] < 100:
            on = not on
            save(running.folder / "keys.toml", (TABLES + tables[on]).encode())
            await asyncio.sleep(0.01)
        over.set()

    save(running.folder / "keys.toml", (TABLES + tables[True]).encode())
    await running.write("POST", "/config/reload")
    await asyncio.gather(toggle(), *map(client, tokens))
    for model in (await running.get("/models"))["models"]:
        assert (model["status"]["in_flight"], model["status"]["queued"]) == (0, 0)
    metrics = await running.metrics()
    assert metrics["vllm_proxy_buffered_bytes"] == 0
    assert "Traceback" not in running.log()
    assert "fault of the daemon" not in running.log()
