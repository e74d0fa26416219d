"""Bytes through the daemon: bodies and answers as they were, framing and heads as HTTP wants them."""

import gzip
import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests import certificates
from tests.harness import (
    WAYS,
    Answer,
    Client,
    Daemon,
    connected,
    daemon,
    fake_engines,
    memory,
    port_block,
    request,
    until,
)

PATH = "/v1/chat/completions"
ECHO = b'{"model": "chat", "fake": {"echo": true}}'


@pytest.fixture(scope="module", params=[*WAYS, "tls"])
async def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """One daemon for all of them, whose requests go one way, and then the other; and one that speaks TLS."""
    config = fake_engines(port_block()) + '[models.chat]\nmodel = "org/chat"\naliases = ["short"]\n'
    folder = tmp_path_factory.mktemp("bytes")
    pair = certificates.make(folder) if request.param == "tls" else None
    async with daemon(config, folder, pair=pair) as running:
        await running.until("1 of 1 models ready")
        running.first = WAYS.get(request.param, b"")
        yield running


def faulty(**fault: Any) -> bytes:  # noqa: ANN401 - JSON
    """A body that tells the fake what to answer."""
    return json.dumps({"model": "chat", "fake": fault}).encode()


def raw(*pieces: str, end: str = "keep") -> bytes:
    """As `faulty`: these very bytes."""
    return faulty(raw=list(pieces), end=end)


async def ask(running: Daemon, data: bytes, *, head: bool = False) -> Answer:
    """The answer to one request on a connection of its own."""
    async with connected(running) as client:
        await client.send(data)
        return await client.answer(head=head)


async def arrived(running: Daemon, body: bytes, *lines: str) -> dict[str, Any]:
    """What the engine saw of a request."""
    request_id = uuid.uuid4().hex
    answer = await ask(running, request(PATH, body, f"X-Request-Id: {request_id}", *lines))
    assert answer.status == 200, answer
    (seen,) = await running.seen(request_id)
    return seen


def names(seen: dict[str, Any]) -> list[str]:
    """The names of a request's headers as the engine saw them."""
    return [name.lower() for name, _ in seen["headers"]]


# The request


async def test_a_chunked_request_body_arrives_whole(shared: Daemon) -> None:
    """Whatever the chunks and their extensions; the engine gets a Content-Length instead."""
    chunks = (
        b"5;x=y\r\n" + ECHO[:5] + b"\r\n1\r\n" + ECHO[5:6] + b"\r\n%X\r\n" % len(ECHO[6:]) + ECHO[6:] + b"\r\n0\r\n"
    )
    request_id = uuid.uuid4().hex
    head = request(PATH, b"", "Transfer-Encoding: Chunked", f"X-Request-Id: {request_id}")
    answer = await ask(shared, head + chunks + b"Trailer-Field: x\r\n\r\n")
    assert answer.status == 200
    (seen,) = await shared.seen(request_id)
    assert seen["body"] == ECHO.decode()
    assert ["Content-Length", str(len(ECHO))] in seen["headers"]
    assert "transfer-encoding" not in names(seen)
    assert "trailer-field" not in names(seen)


@pytest.mark.parametrize("path", [PATH, PATH + "?a=b", "/v1/audio/transcriptions"])
async def test_a_client_that_waits_for_100_continue_is_told_to_go_on_once(shared: Daemon, path: str) -> None:
    """One interim answer before the body, then the answer; the engine never sees the expectation."""
    request_id = uuid.uuid4().hex
    body = ECHO
    head = request(path, b"", "Expect: 100-Continue", f"X-Request-Id: {request_id}", f"Content-Length: {len(ECHO)}")
    if "audio" in path:
        body = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nchat\r\n--b--\r\n'
        head = head.replace(b"application/json", b"multipart/form-data; boundary=b")
        head = head.replace(b"Content-Length: %d" % len(ECHO), b"Content-Length: %d" % len(body))
    async with connected(shared) as client:
        await client.send(head)
        assert (await client.answer()).status == 100
        await client.send(body)
        assert (await client.answer()).status == 200
    (seen,) = await shared.seen(request_id)
    assert seen["body"] == body.decode()
    assert "expect" not in names(seen)


async def test_a_client_of_http10_is_not_told_to_go_on(shared: Daemon) -> None:
    """It would take the interim answer for the answer."""
    for path in (PATH, PATH + "?a=b"):
        assert (await ask(shared, request(path, ECHO, "Expect: 100-continue", version="1.0"))).status == 200


async def test_a_body_that_will_be_refused_is_not_asked_for(shared: Daemon) -> None:
    """A client that waits for 100-continue with a body over the limit gets 413 at once."""
    async with connected(shared) as client:
        await client.send(request(PATH, b"", "Expect: 100-continue", f"Content-Length: {2**40}"))
        assert (await client.answer()).status == 413
        client.leave()


@pytest.mark.parametrize("path", [PATH, PATH + "?a=b", "/v1/audio/transcriptions", "/v1/models"])
@pytest.mark.parametrize("coding", ["gzip", "GZIP", "br", "deflate, gzip"])
async def test_a_compressed_request_body_is_415(shared: Daemon, path: str, coding: str) -> None:
    """In the envelope, on every kind of route, and no engine sees it."""
    request_id = uuid.uuid4().hex
    body = gzip.compress(ECHO)
    answer = await ask(shared, request(path, body, f"Content-Encoding: {coding}", f"X-Request-Id: {request_id}"))
    assert answer.status == 415
    assert json.loads(answer.body)["error"]["code"] == "unsupported_media_type"
    assert await shared.seen(request_id) == []


async def test_a_body_reaches_the_engine_byte_for_byte(shared: Daemon) -> None:
    """Spaces, key order, doubled keys, odd numbers and `"stream": null` are the engine's business."""
    body = (
        b' {"stream": null,\t"model" : "cha\\u0074", "n":1e400, "n": -0.0 ,"fake":{"echo":true}, "x":"\xc3\xa9\\/"}\n'
    )
    assert (await arrived(shared, body))["body"].encode("latin-1") == body


async def test_hop_by_hop_headers_of_a_client_end_at_the_daemon(shared: Daemon) -> None:
    """Those that `Connection` names too; its credentials never go on; the rest does, in order, doubled or not."""
    kept = ["X-One: 1", "Accept: text/html", "X-Two: a", "X-Two: b", "Cookie: c=d", "User-Agent: \xe9"]
    dropped = [
        "Connection: keep-alive, X-Secret", "Keep-Alive: timeout=5", "X-Secret: 1", "Proxy-Authorization: Basic eA==",
        "Proxy-Connection: keep-alive", "TE: trailers", "Trailer: x", "Authorization: Bearer client-key",
        "X-Api-Key: client-key", "Api-Key: client-key", "Connection: x-other", "X-OTHER: 2",
        "X-Vllm-Priority: -1", "x-vllm-PRIORITY: 0", "X-data-parallel-rank: 1", "X-Data-Parallel-Rank: 0",
    ]  # fmt: skip
    seen = await arrived(shared, ECHO, *kept, *dropped)
    found = [f"{name}: {value}" for name, value in seen["headers"]]
    assert [line for line in found if line in kept] == kept
    gone = {line.split(":")[0].lower() for line in dropped} - {"authorization"}
    assert not gone & set(names(seen))
    assert names(seen).count("authorization") == 1
    assert "client-key" not in str(seen["headers"])
    assert names(seen).count("host") == names(seen).count("content-length") == names(seen).count("x-request-id") == 1
    assert ["Host", f"127.0.0.1:{(await shared.ports('chat'))[0]}"] in seen["headers"]


async def test_eight_megabytes_arrive_and_come_back_intact(shared: Daemon) -> None:
    """A large body, its model at the end, and a large answer; the same connection goes on afterwards."""
    body = (
        b'{"pad": "' + bytes(range(48, 91)) * 200_000 + b'", ' + faulty(flood=8 * 2**20, raw=[CHUNKED], end="keep")[1:]
    )
    request_id = uuid.uuid4().hex
    async with connected(shared) as client:
        await client.send(request(PATH, body, f"X-Request-Id: {request_id}"))
        answer = await client.answer()
        assert answer.body == b"".join(bytes([65 + n % 26]) * 2**16 for n in range(128))
        await client.send(request(PATH, ECHO))
        assert (await client.answer()).status == 200
    (seen,) = await shared.seen(request_id)
    assert seen["size"] == len(body)
    assert seen["sha256"] == hashlib.sha256(body).hexdigest()


CHUNKED = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("name", ["chat", "short"])
async def test_the_model_of_a_large_body_may_stand_at_its_end(shared: Daemon, name: str) -> None:
    """Behind 3 MB of strings that quote other models; an alias is still rewritten."""
    pad = json.dumps({"model": 'nobody", "model": "nobody'}).encode() * 60_000
    body = (
        b'{"messages": [%s], ' % json.dumps(pad.decode()).encode()
        + b'"fake": {"echo": 1}, "model": "%s"}' % name.encode()
    )
    assert len(body) > 3 * 2**20
    echo = json.loads((await ask(shared, request(PATH, body))).body)
    assert json.loads(echo["body"]) == json.loads(body) | {"model": "chat"}
    assert (echo["body"] == body.decode()) is (name == "chat")


# The answer


async def test_status_reason_and_headers_of_an_answer_are_kept(shared: Daemon) -> None:
    """Unknown status codes, doubled Set-Cookie, odd values, in their order; one Date and one Server."""
    lines = ["set-cookie: a=1; Path=/", "Set-Cookie: b=2", "x-odd: \xe9 ,;", "Date: Thu, 01 Jan 2026 00:00:00 GMT",
             "server: uvicorn", "x-request-id: of-the-engine", 'etag: "x"']  # fmt: skip
    data = request(PATH, raw("HTTP/1.1 299 Odd Enough\r\n" + "\r\n".join(lines) + "\r\nContent-Length: 2\r\n\r\nhi"))
    async with connected(shared) as client:
        await client.send(data)
        line = await client.reader.readuntil(b"\r\n")
        assert line == b"HTTP/1.1 299 Odd Enough\r\n"
    answer = await ask(shared, data)
    assert answer.body == b"hi"
    assert answer.all("Set-Cookie") == ["a=1; Path=/", "b=2"]
    assert [len(answer.all(name)) for name in ("date", "server", "x-request-id", "content-length")] == [1, 1, 1, 1]
    assert answer.all("date") == ["Thu, 01 Jan 2026 00:00:00 GMT"]
    assert answer.all("x-odd") == ["\xe9 ,;"]
    assert answer.all("x-request-id") != ["of-the-engine"]
    assert answer.all("X-Vllm-Proxy-Model") == ["chat"]
    assert answer.all("X-Vllm-Proxy-Instance") == ["chat/0"]


async def test_hop_by_hop_headers_of_an_engine_end_at_the_daemon(shared: Daemon) -> None:
    """Those that `Connection` names too, wherever it stands."""
    head = (
        "HTTP/1.1 200 OK\r\nX-Named: 1\r\nKeep-Alive: timeout=5\r\nTE: x\r\nTrailer: y\r\nProxy-Authenticate: Basic\r\n"
        "Connection: keep-alive, x-named\r\nProxy-Connection: close\r\nUpgrade: h2c\r\nX-Kept: 1\r\n"
        "Content-Length: 0\r\n\r\n"
    )
    answer = await ask(shared, request(PATH, raw(head)))
    found = {name.lower() for name, _ in answer.headers}
    assert found == {"x-kept", "content-length", "x-request-id", "x-vllm-proxy-model", "x-vllm-proxy-instance"}


async def test_a_compressed_answer_passes_untouched(shared: Daemon) -> None:
    """Its bytes and its Content-Encoding are the engine's."""
    packed = gzip.compress(b"x" * 10_000, mtime=0)
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(packed)}\r\n\r\n"
    answer = await ask(shared, request(PATH, raw(head + packed.decode("latin-1")), "Accept-Encoding: gzip"))
    assert (answer.body, answer.all("content-encoding")) == (packed, ["gzip"])


@pytest.mark.parametrize("framing", ["chunked", "length", "end"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("keep", ["keep-alive", "close", ""])
async def test_each_framing_for_each_kind_of_client(shared: Daemon, framing: str, version: str, keep: str) -> None:
    """The body is whole, the connection kept exactly where both sides can tell the answer's end; 1.0 gets no chunks."""
    head = {
        "chunked": "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
        "length": "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        "end": "HTTP/1.1 200 OK\r\n\r\nhello",
    }[framing]
    lines = [f"Connection: {keep}"] if keep else []
    body = raw(head, end="close" if framing == "end" else "keep")
    async with connected(shared) as client:
        await client.send(request(PATH, body, *lines, version=version))
        answer = await client.answer()
        assert (answer.body, answer.whole) == (b"hello", True)
        wants = keep == "keep-alive" or (version == "1.1" and keep != "close")
        if wants and (framing == "length" or (framing == "chunked" and version == "1.1")):
            assert "close" not in answer.all("connection")
            assert version == "1.1" or answer.all("connection") == ["keep-alive"]
            await client.send(request(PATH, ECHO))
            assert (await client.answer()).status == 200
        else:
            assert await client.closed()
            assert version == "1.0" or answer.all("connection") == ["close"]
        if version == "1.0":
            assert answer.all("transfer-encoding") == []


async def test_an_http10_stream_comes_event_by_event(shared: Daemon) -> None:
    """A client of HTTP/1.0 gets the events of a stream, decoded, while the stream goes on."""
    body = b'{"model": "chat", "stream": true, "fake": {"chunks": 2, "hang": 1}}'
    async with connected(shared) as client:
        await client.send(request(PATH, body, version="1.0"))
        await client.reader.readuntil(b"\r\n\r\n")
        assert (await client.reader.readuntil(b"\n\n")).startswith(b"data: {")


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_without_a_body_ends_with_its_head(shared: Daemon, status: int) -> None:
    """The connection is used again at once."""
    async with connected(shared) as client:
        await client.send(request(PATH, raw(f"HTTP/1.1 {status} X\r\nx: y\r\n\r\n")))
        answer = await client.answer()
        assert (answer.status, answer.all("connection"), answer.all("transfer-encoding")) == (status, [], [])
        await client.send(request(PATH, ECHO))
        assert (await client.answer()).status == 200


async def test_interim_answers_of_an_engine_stay_behind_or_pass_whole(shared: Daemon) -> None:
    """The final answer comes with its own head and its whole body, in one piece or in several."""
    pieces = ["HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n", "HTTP/1.1 102 Processing\r\n\r\n"]
    final = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-final: 1\r\n\r\nhi"
    for told in (raw(*pieces, final), raw("".join(pieces) + final), raw(*pieces, final[:20], final[20:])):
        async with connected(shared) as client:
            await client.send(request(PATH, told))
            answer = await client.answer()
            while answer.status < 200:
                answer = await client.answer()
            assert (answer.status, answer.body, answer.all("x-final"), answer.all("link")) == (200, b"hi", ["1"], [])
            await client.send(request(PATH, ECHO))
            assert (await client.answer()).status == 200


async def test_head_is_answered_without_a_body(shared: Daemon) -> None:
    """By the daemon for its own routes and by the engine for a stored response; the connection goes on."""
    async with connected(shared) as client:
        for path, status in (("/v1/models", 200), ("/health", 200), ("/v1/responses/r", 405), ("/nowhere", 404)):
            await client.send(request(path, b"", method="HEAD"))
            answer = await client.answer(head=True)
            assert answer.status == status, path
            assert int(answer.all("content-length")[0]) > 0, path
        await client.send(request(PATH, ECHO))
        assert (await client.answer()).status == 200


async def test_pipelined_requests_are_answered_in_order(shared: Daemon) -> None:
    """Ten at once, on relayed and on own routes: each answer is the one to its request."""
    ids = [uuid.uuid4().hex for _ in range(10)]
    data = b"".join(
        request("/v1/models", b"", method="GET") + request(PATH, ECHO, f"X-Request-Id: {request_id}")
        for request_id in ids
    )
    async with connected(shared) as client:
        await client.send(data)
        for request_id in ids:
            assert json.loads((await client.answer()).body)["object"] == "list"
            assert (await client.answer()).all("x-request-id") == [request_id]


async def test_a_connection_to_an_engine_is_kept_for_the_next_request(shared: Daemon) -> None:
    """A hundred requests, one after another, need one connection to the engine at a time."""
    (pid,) = await shared.pids("chat")
    async with connected(shared) as client:
        await ask_again(client)
        before = sockets(pid)
        for _ in range(100):
            await ask_again(client)
        assert sockets(pid) <= before


async def ask_again(client: Client) -> None:
    """One more whole request."""
    await client.send(request(PATH, ECHO))
    assert (await client.answer()).status == 200


def sockets(pid: int) -> int:
    """How many sockets a process has open."""
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += entry.readlink().name.startswith("socket:")
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


async def test_a_client_that_reads_nothing_costs_little_and_slows_its_engine(shared: Daemon) -> None:
    """64 MB wait in the engine, not in the daemon; they come whole once the client reads."""
    request_id = uuid.uuid4().hex
    await ask(shared, request(PATH, faulty(flood=2**20, raw=[CHUNKED], end="keep")))
    before = memory(shared.process.pid)
    async with connected(shared, receive_buffer=4096, limit=4096) as client:
        await client.send(request(PATH, faulty(flood=2**26, raw=[CHUNKED], end="keep"), f"X-Request-Id: {request_id}"))
        history: list[int] = []

        async def written() -> list[int]:
            history.extend([seen["written"] for seen in await shared.seen(request_id)] or [0])
            return history[-50:]

        await until(written, lambda last: len(last) == 50 and last[0] == last[-1] > 2**16)
        assert history[-1] < 2**25
        assert memory(shared.process.pid) - before < 5 * 10**6
        total = 0
        await client.reader.readuntil(b"\r\n\r\n")
        while not (data := await client.reader.read(2**16)).endswith(b"0\r\n\r\n"):
            assert data
            total += len(data)
        assert total > 2**26 - 2**16
    assert [seen["state"] for seen in await shared.seen(request_id)] == ["answered"]
