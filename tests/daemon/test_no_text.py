"""Requests that are no text where text is expected, or shaped as nobody shapes them: refused, never a fault."""

import json
import random
import re
import uuid
from collections.abc import AsyncIterator

import pytest

from tests.harness import OPEN, Answer, Daemon, connected, daemon, fake_engines, port_block, request

PATH = "/v1/chat/completions"
FORM = "/v1/audio/transcriptions"
MODELS = '[models.chat]\nmodel = "org/chat"\naliases = ["an-alias"]\n'
DEEP = 500_000  # Python 3.13 goes down 10,000 levels, 3.14 as far as its stack reaches
FIELD = b'--%s\r\nContent-Disposition: form-data; name="model"\r\n\r\nchat\r\n--%s--\r\n'
UPGRADE = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
KEY = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One daemon for all of them, which in the end has logged no fault of its own."""
    async with daemon(OPEN + fake_engines(port_block()) + MODELS, tmp_path_factory.mktemp("no-text")) as running:
        await running.until("1 of 1 models ready")
        yield running
        assert "fault of the daemon" not in running.log()
        assert "Traceback" not in running.log()


async def ask(running: Daemon, data: bytes, *, head: bool = False) -> Answer:
    """The answer to one request on a connection of its own."""
    async with connected(running.port) as client:
        await client.send(data)
        return await client.answer(head=head)


def refusal(answer: Answer, *, anthropic: bool = False) -> tuple[int, str]:
    """Status and code of an answer in the envelope, with a sentence and an id."""
    told = json.loads(answer.body)
    assert answer.all("content-type") == ["application/json"]
    assert len(answer.all("x-request-id")) == 1
    if anthropic:
        assert set(told) == {"type", "error"}
        assert set(told["error"]) == {"type", "message", "code"}
    else:
        assert set(told["error"]) == {"message", "type", "param", "code"}
    assert told["error"]["message"].startswith("cannot ")
    return answer.status, told["error"]["code"]


@pytest.mark.parametrize("path", [PATH, PATH + "?a=b", "/v1/messages", "/models", "/models/chat"])
async def test_a_body_that_is_nested_too_deeply_is_refused(shared: Daemon, path: str) -> None:
    """400 `invalid_json`, on every kind of route that reads JSON."""
    method = "PATCH" if path == "/models/chat" else "POST"
    for body in (
        b'{"model": "chat", "a": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"a":' * 1000 + b"[" * DEEP + b"]" * DEEP + b"}" * 1000,
    ):
        answer = await ask(shared, request(path, body, method=method))
        assert refusal(answer, anthropic=path == "/v1/messages") == (400, "invalid_json")


@pytest.mark.parametrize(
    "boundary",
    ["b" * 71, "b" * 300, "b" * 5_000, "\xe9", "\xff\xfe", '"a b "', '"\t"', "\x80" * 70],
    ids="71 300 5000 latin bytes space tab high".split(),
)
async def test_a_boundary_that_nobody_may_use_is_refused(shared: Daemon, boundary: str) -> None:
    """400: longer than 70, no printable ASCII, or with a space at its end."""
    bare = boundary.strip('"').encode("latin-1")
    data = request(FORM, FIELD % (bare, bare)).replace(
        b"application/json", b"multipart/form-data; boundary=" + boundary.encode("latin-1")
    )
    assert refusal(await ask(shared, data)) == (400, "bad_request")


@pytest.mark.parametrize("boundary", ["b" * 70, "'()+_,-./:=?", '"a b"', "----WebKitFormBoundaryx"])
async def test_a_boundary_that_may_be_is_taken(shared: Daemon, boundary: str) -> None:
    """Up to 70 of what RFC 2046 names."""
    request_id = uuid.uuid4().hex
    bare = boundary.strip('"').encode()
    data = request(FORM, FIELD % (bare, bare), f"X-Request-Id: {request_id}")
    data = data.replace(b"application/json", b"multipart/form-data; boundary=" + boundary.encode())
    assert (await ask(shared, data)).status == 200
    assert len(await shared.seen(request_id)) == 1


@pytest.mark.parametrize(
    "kind",
    [b"multipart/form-data", b"multipart/form-data; boundary=", b"\xff\xfe", b"text/\xe9; boundary=b", b"", b";;;==",
     b"multipart/form-data; \xff=\xff", b"MULTIPART/MIXED; boundary=b"],
)  # fmt: skip
async def test_a_content_type_that_is_no_forms_is_415(shared: Daemon, kind: bytes) -> None:
    """Whatever its bytes are."""
    data = request(FORM, FIELD % (b"b", b"b")).replace(b"application/json", kind)
    assert refusal(await ask(shared, data)) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", [b"multipart/form-data; x=\xff; boundary=b", b"Multipart/Form-Data; Boundary=b"])
async def test_odd_bytes_beside_a_boundary_are_the_engines(shared: Daemon, kind: bytes) -> None:
    """The head goes on as it came."""
    data = request(FORM, FIELD % (b"b", b"b")).replace(b"application/json", kind)
    assert (await ask(shared, data)).status in {200, 400, 404}


@pytest.mark.parametrize(
    "lines",
    [["Sec-WebSocket-Key: \xff\xfe"], ["Sec-WebSocket-Key: \xe9" * 1], ["Sec-WebSocket-Key: short"], [],
     [KEY, "Sec-WebSocket-Version: \xff"], [KEY, "Upgrade: \xff"]],
)  # fmt: skip
async def test_a_handshake_that_is_none_is_refused(shared: Daemon, lines: list[str]) -> None:
    """400, also where a header is no text."""
    data = request("/v1/realtime?model=chat", b"", *lines, *UPGRADE[: 3 - ("Version" in str(lines))], method="GET")
    if any(line.startswith("Upgrade") for line in lines):
        data = data.replace(b"Upgrade: websocket\r\n", b"")
    assert refusal(await ask(shared, data)) == (400, "bad_request")


@pytest.mark.parametrize("line", ["Sec-WebSocket-Protocol: \xff", "Sec-WebSocket-Extensions: \xff;=",
                                  "Cookie: \xff\xfe", "X-Request-Id: \xff"])  # fmt: skip
async def test_odd_bytes_elsewhere_in_a_handshake_do_no_harm(shared: Daemon, line: str) -> None:
    """The session is opened."""
    async with connected(shared.port) as client:
        await client.send(request("/v1/realtime?model=chat", b"", KEY, line, *UPGRADE, method="GET"))
        assert (await client.answer()).status == 101
        client.leave()


@pytest.mark.parametrize(
    "query", ["a=\xff", "a=%ff", "\xc3\x28", "a=\xe9&model=\xff", "%00", "model=%00", "a=%ed%a0%80"]
)
@pytest.mark.parametrize(
    "path", [PATH, "/v1/realtime", "/models/chat/logs", "/v1/models", "/nowhere", "/v1/responses/r"]
)
async def test_a_query_that_is_no_text_is_no_fault(shared: Daemon, path: str, query: str) -> None:
    """What reads no query passes it on or ignores it; what does finds nothing in it."""
    method = "POST" if path == PATH else "GET"
    answer = await ask(shared, request(f"{path}?{query}", b'{"model": "chat"}', method=method))
    assert answer.status in {200, 400, 404}
    if answer.status != 200 and path != "/v1/responses/r":
        refusal(answer)


@pytest.mark.parametrize("name", ["\xff", "%ff", "%00", "%ed%a0%80", "a\xe9b", "%"])
@pytest.mark.parametrize(
    "path", ["/models/{}", "/v1/models/{}", "/models/{}/logs", "/docs/assets/{}", "/{}", "/v1/responses/{}"]
)
async def test_a_path_that_is_no_text_is_not_found(shared: Daemon, path: str, name: str) -> None:
    """404, or 400 where it is no path at all."""
    answer = await ask(shared, request(path.format(name), b"", method="GET"))
    assert refusal(answer)[0] in {400, 404}


@pytest.mark.parametrize("value", ["\xff", "\xe9\xff\x80", '"\xff"', "a" * 3_000])
@pytest.mark.parametrize(
    "name",
    "If-Match If-None-Match Host Origin Content-Type X-Request-Id Accept Access-Control-Request-Method Cookie "
    "Authorization Connection Expect".split(),
)
async def test_a_header_that_is_no_text_is_no_fault(shared: Daemon, name: str, value: str) -> None:
    """On routes of every kind; whatever is not 200 comes in the envelope."""
    for method, path, body in (
        ("PATCH", "/models/chat", b'{"description": "x"}'),
        ("POST", PATH, b'{"model": "chat"}'),
        ("POST", PATH + "?a=b", b'{"model": "an-alias"}'),
        ("GET", "/openapi.json", b""),
        ("POST", "/v1/messages", b"{"),
        ("OPTIONS", "/models", b""),
    ):
        data = request(path, body, "Connection: close", method=method)
        data = re.sub(rb"\r\n%s: [^\r]*" % name.encode(), b"", data)
        data = data.replace(b"\r\n", f"\r\n{name}: {value}\r\n".encode("latin-1"), 1)
        answer = await ask(shared, data)
        assert answer.status < 500, (method, path, answer)
        if answer.status >= 400:
            refusal(answer, anthropic=path == "/v1/messages")


@pytest.mark.parametrize(
    "body",
    [b'{"\xff": 1, "model": "an-alias"}', b'{"model": "an-alias", "a": "\xff"}', b'{"model": "an-\xffalias"}',
     b'{"model": "\\ud800"}', b'{"model": "a\\u0000"}', b'{"model": "an-alias"}\0', b'\0{"model": "an-alias"}',
     b'{"\\ud800": 1, "model": "an-alias"}', b'{"model": "an-alias", "model": "\xff"}', b"\xef\xbb\xbf",
     b"\xff\xfe{\0}\0"],
)  # fmt: skip
async def test_a_body_that_is_no_text_is_refused_by_us_or_by_the_engine(shared: Daemon, body: bytes) -> None:
    """400, or 404 where it names a model that nobody has."""
    assert (await ask(shared, request(PATH, body))).status in {400, 404}


@pytest.mark.parametrize("name", ["chat", "an-alias"])
@pytest.mark.parametrize("pad", [0, 2**20], ids=["small", "large"])
@pytest.mark.parametrize("path", [PATH, "/v1/embeddings", "/v1/messages", "/tokenize"])
async def test_a_body_behind_a_byte_order_mark_is_taken(shared: Daemon, name: str, pad: int, path: str) -> None:
    """As vLLM takes it; it goes on, mark included."""
    request_id = uuid.uuid4().hex
    body = b'\xef\xbb\xbf{"pad": "%s", "model" :  "%s" }' % (b"x" * pad, name.encode())
    answer = await ask(shared, request(path, body, f"X-Request-Id: {request_id}"))
    assert answer.status == 200, answer
    (seen,) = await shared.seen(request_id)
    assert seen["size"] == len(body) - len(name) + len("chat")
    if not pad:
        assert seen["body"].encode("latin-1") == body.replace(name.encode(), b"chat")


async def test_of_an_aliased_body_every_other_byte_stays(shared: Daemon) -> None:
    """Spaces, escapes, odd numbers, doubled keys; the last `model` is the one that counts."""
    request_id = uuid.uuid4().hex
    body = b' {"model": "other",\t"o":1e400, "m\\u006fdel"\n: "an-alias" ,"x":"\xc3\xa9\\/" }\r\n'
    assert (await ask(shared, request(PATH, body, f"X-Request-Id: {request_id}"))).status == 200
    (seen,) = await shared.seen(request_id)
    assert seen["body"].encode("latin-1") == body.replace(b"an-alias", b"chat")


# aiohttp's own answers


@pytest.mark.parametrize("path", [PATH, PATH + "?a=b", FORM, "/v1/messages", "/models", "/v1/messages?a=b", "/nowhere"])
@pytest.mark.parametrize("wanted", ["200-ok", "100-continue, 200-ok", "\xff"])
async def test_an_expectation_that_nobody_knows_is_417(shared: Daemon, path: str, wanted: str) -> None:
    """In the envelope of the route; no engine sees the request."""
    request_id = uuid.uuid4().hex
    answer = await ask(shared, request(path, b'{"model": "chat"}', f"Expect: {wanted}", f"X-Request-Id: {request_id}"))
    assert refusal(answer, anthropic="messages" in path) == (417, "expectation_failed")
    assert answer.all("x-request-id") == [request_id]
    assert await shared.seen(request_id) == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/messages", 405, "method_not_allowed"),
        ("PUT", "/v1/messages/count_tokens", 405, "method_not_allowed"),
        ("POST", "/v1/messages", 404, "model_not_found"),
    ],
)
async def test_on_anthropics_routes_every_error_is_anthropics(
    shared: Daemon, method: str, path: str, status: int, code: str
) -> None:
    """Those that no handler saw included."""
    answer = await ask(shared, request(path, b'{"model": "nobody"}', method=method))
    assert refusal(answer, anthropic=True) == (status, code)


async def test_what_the_parser_refuses_has_an_id_too(shared: Daemon) -> None:
    """One of the daemon's: the request's own may not have been read."""
    assert refusal(await ask(shared, b"GET / HTTP/9.9\r\n\r\n")) == (400, "bad_request")
    assert refusal(await ask(shared, request(PATH, b"", "X: " + "x" * 30_000))) == (431, "headers_too_large")
    answer = await ask(shared, request("/models", b"", "Transfer-Encoding: gzip", method="POST"))
    assert refusal(answer)[0] == 400


async def test_head_is_answered_where_there_is_a_length_and_nowhere_else(shared: Daemon) -> None:
    """405 with Allow for streams; every other GET route has a length, and the connection goes on behind it."""
    paths = {path for path, methods in (await shared.get("/openapi.json"))["paths"].items() if "get" in methods}
    given = {"/docs/assets/{file}": "/docs/assets/swagger.js", "/keys/{name}": "/keys/head"}
    given |= {"/models/{model_id}/logs": "/models/chat/logs", "/requests/{request_id}": "/requests/head"}
    given |= {"/help": "/help/", "/help/{topic}": "/help/start", "/tokenizer_info": "/tokenizer_info?model=chat"}
    given |= {"/ui": "/ui/", "/ui/{file}": "/ui/app.js"}
    await shared.post("/keys", {"name": "head"}, 201)
    async with connected(shared.port) as client:
        await client.send(request(PATH, b'{"model": "chat"}', "X-Request-Id: head"))
        assert (await client.answer()).status == 200
        for path in (*sorted(paths), "/models/{model_id}/logs?follow=1"):
            real = given.get(path, path).replace("{model_id}", "chat").replace("{id}", "resp_x")
            await client.send(request(real, b"", method="HEAD"))
            answer = await client.answer(head=True)
            assert answer.all("content-length"), path
            if path in {"/events", "/v1/realtime", "/models/{model_id}/logs?follow=1"}:
                assert (answer.status, answer.all("allow")) == (405, ["GET"]), path
            else:
                is_engines = "responses" in path or path == "/tokenizer_info"
                assert answer.status in ({200, 405} if is_engines else {200}), path
        await client.send(request(PATH, b'{"model": "chat"}'))
        assert (await client.answer()).status == 200


TEXTS = [*b'chat an-alias %ff %00 \\ud800 \\u0000 {} [ null -1 1e999 = ; , * 100-continue chunked */* W/ "'.split(),
         b"", b" ", b"\xff", b"\xc3\x28", b"\xef\xbb\xbf", b"a" * 300]  # fmt: skip
PATHS = (
    b"/ /v1/chat/completions /v1/audio/transcriptions /v1/messages /v1/realtime /v1/responses/ /models /models/ "
    b"/models/chat /models/chat/logs /v1/models/ /config /config/plan /docs /health /metrics /v1/files /v1/files/ "
    b"/keys /keys/ /keys/head /keys/head/rotate /requests /requests/ /requests/head /stats /events?since=x"
).split()
NAMES = (
    b"Content-Type Accept If-Match If-None-Match Host Origin Expect Upgrade Connection Range X-Request-Id TE Forwarded "
    b"Sec-WebSocket-Key Sec-WebSocket-Version Cookie Authorization Content-Encoding X-Forwarded-For "
    b"Access-Control-Request-Method"
).split()
METHODS = [b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"]
KINDS = [b"application/json", b"text/toml", b"multipart/form-data; boundary=b", b"application/merge-patch+json"]


def shapeless(dice: random.Random) -> bytes:
    """A request whose every part is as odd as chance has it, and whose connection ends behind it."""

    def some(most: int) -> bytes:
        return b"".join(dice.choices(TEXTS, k=dice.randint(0, most)))

    target = (dice.choice(PATHS) + some(1) + dice.choice([b"", b"?" + some(3)])).replace(b" ", b"%20")
    lines = [b"%s: %s" % (dice.choice(NAMES), some(2)) for _ in range(dice.randint(0, 3))]
    body = dice.choice([
        some(4), b'{"model": "%s", "%s": %s}' % (some(1), some(1), some(2)), b'{"id": "%s", %s}' % (some(1), some(2)),
        b'{"name": "%s", "expires_at": "%s", "hash": %s}' % (some(1), some(1), some(1)),
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n--b--\r\n' % (some(1), some(2)),
        b'[models."%s"]\nmodel = "%s"' % (some(1), some(1)),
    ])  # fmt: skip
    lines += [b"Content-Type: " + dice.choice(KINDS), b"Content-Length: %d" % len(body), b"Connection: close"]
    if not any(line.startswith(b"Host") for line in lines):
        lines.append(b"Host: localhost")
    return b"%s %s HTTP/1.1\r\n%s\r\n\r\n%s" % (dice.choice(METHODS), target, b"\r\n".join(lines), body)


@pytest.mark.parametrize("seed", range(20))
async def test_no_shapeless_request_is_a_fault_of_the_daemon(shared: Daemon, seed: int) -> None:
    """Of many random ones each has an answer, none a 500, and the model serves on."""
    dice = random.Random(seed)
    for _ in range(50):
        data = shapeless(dice)
        async with connected(shared.port) as client:
            await client.send(data)
            line = await client.reader.readuntil(b"\r\n")
            assert not line.startswith(b"HTTP/1.1 500"), data
            client.leave()
    assert (await ask(shared, request("/health", b"", method="GET"))).status == 200


@pytest.mark.parametrize("path", ["/events", "/models/chat/logs?follow=1", "/v1/realtime?model=chat"])
async def test_streams_have_an_id_too(shared: Daemon, path: str) -> None:
    """The client's, or one that is made: in the head, as in every other answer's."""
    upgrade = [KEY, *UPGRADE] if "realtime" in path else []
    for lines, wanted in ((["X-Request-Id: mine"], ["mine"]), ([], None)):
        async with connected(shared.port) as client:
            await client.send(request(path, b"", *lines, *upgrade, method="GET"))
            head = (await client.reader.readuntil(b"\r\n\r\n")).decode()
            found = re.findall(r"(?i)x-request-id: (\S+)", head)
            assert found == wanted if wanted else len(found) == 1
            client.leave()
