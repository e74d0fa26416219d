"""Requests that two servers could read in two ways: refused in the envelope, the connection closed."""

import json
import uuid
from collections.abc import AsyncIterator

import pytest

from tests.harness import WAYS, Daemon, connected, daemon, fake_engines, port_block, request

PATH = "/v1/chat/completions"
BODY = b'{"model": "chat", "fake": {"echo": true}}'
HIDDEN = b'POST /v1/completions HTTP/1.1\r\nX-Request-Id: %s\r\nContent-Length: 17\r\n\r\n{"model": "chat"}'


@pytest.fixture(scope="module", params=WAYS)
async def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """One daemon for all of them, whose requests go one way, and then the other."""
    config = '[server]\nmax_body_size = "2KiB"\n' + fake_engines(port_block()) + '[models.chat]\nmodel = "org/chat"\n'
    async with daemon(config, tmp_path_factory.mktemp("framing")) as running:
        await running.until("1 of 1 models ready")
        running.first = WAYS[request.param]
        yield running


async def refused(running: Daemon, data: bytes, status: int = 400, code: str = "bad_request") -> None:
    """The first answer is this refusal, the last of its connection; no request of it, nor one hidden, is passed on."""
    visible, hidden = uuid.uuid4().hex, uuid.uuid4().hex
    data = data.replace(b"\r\n", b"\r\nX-Request-Id: %s\r\n" % visible.encode(), 1) if b"\r\n" in data else data
    async with connected(running) as client:
        await client.send(data + HIDDEN % hidden.encode())
        answer = await client.answer()
        assert answer.status == status, answer
        error = json.loads(answer.body)["error"]
        assert error["code"] == code
        assert error["message"].startswith("cannot ")
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.all("content-type") == ["application/json"]
        assert await client.closed()
    assert await running.seen(visible) == []
    assert await running.seen(hidden) == []


def chunked(body: bytes = BODY) -> bytes:
    """A body in one chunk."""
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize("path", [PATH, PATH + "?a=b", "/v1/audio/transcriptions", "/v1/models", "/nowhere"])
@pytest.mark.parametrize("first", [True, False])
async def test_a_length_beside_a_transfer_encoding_is_refused(shared: Daemon, path: str, first: bool) -> None:  # noqa: FBT001 - a parameter
    """CL.TE and TE.CL, the shapes that smuggling is made of, on every kind of route."""
    lines = ["Content-Length: 4", "Transfer-Encoding: chunked"]
    await refused(shared, request(path, chunked(), *(lines if first else reversed(lines))))


@pytest.mark.parametrize(
    "coding",
    ["gzip, chunked", "gzip", "identity", "chunked, identity", "chunked, chunked", "xchunked", "chunked;q=1",
     "\x0bchunked", "'chunked'", "chunk", ", chunked", "chunked,"],
)  # fmt: skip
async def test_only_chunked_is_a_transfer_encoding(shared: Daemon, coding: str) -> None:
    """A body in another coding, or in a spelling that another server may not take for chunked, is refused."""
    await refused(shared, request(PATH, chunked(), f"Transfer-Encoding: {coding}"))


@pytest.mark.parametrize(
    "lines", [("chunked", "chunked"), ("chunked", "identity"), ("identity", "chunked"), ("gzip", "chunked")]
)
async def test_a_transfer_encoding_stands_once(shared: Daemon, lines: tuple[str, ...]) -> None:
    """Two header lines of it are refused."""
    await refused(shared, request(PATH, chunked(), *(f"Transfer-Encoding: {line}" for line in lines)))


@pytest.mark.parametrize(
    "lengths",
    [("41", "42"), ("41", "41"), ("41, 42",), ("41,41",), ("-1",), ("+41",), ("4 1",), ("0x29",), ("41.0",), ("",),
     ("abc",), ("41\x0b",), ("18446744073709551657",), ("9" * 40,), ("4_1",), ("\u00b2",)],
)  # fmt: skip
async def test_a_length_is_one_plain_number(shared: Daemon, lengths: tuple[str, ...]) -> None:
    """Two of them, signs, spaces, other bases and overflows are refused."""
    assert len(BODY) == 41
    await refused(shared, request(PATH, BODY, *(f"Content-Length: {length}" for length in lengths)))


@pytest.mark.parametrize(
    "line",
    ["X-Folded: a\r\n b", "X-Folded: a\r\n\tb", " X-Begins: with space", "X-Space : before colon", "No-Colon",
     ": no name", "X-Nul: a\0b", "X-Cr: a\rb", "X-Lf: a\nb", "X-Bell: \x07", "X\0Nul: 1", "X(Bad): 1", "X-\xe9: 1",
     "X-Del: \x7f",
     "Content-Length : 41", "Transfer-Encoding : chunked", "Content-Length\t: 41", "Transfer-Encoding:\x00chunked"],
)  # fmt: skip
async def test_a_header_line_is_a_name_a_colon_and_a_value(shared: Daemon, line: str) -> None:
    """Folded lines, bare CR and LF, NUL and other controls, and names that are no tokens are refused."""
    await refused(shared, request(PATH, BODY, line))


@pytest.mark.parametrize(
    "head",
    [
        b"POST " + PATH.encode() + b" HTTP/1.1\nHost: localhost\nContent-Length: 0\n\n",
        b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\nContent-Length: 0\r\n\r\n",
        b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\n\r\n",
        b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\n",
        b"POST " + PATH.encode() + b" HTTP/1.1\rHost: localhost\r\r",
    ],
)
async def test_a_line_ends_with_cr_and_lf(shared: Daemon, head: bytes) -> None:
    """A bare LF or CR, anywhere in a head, is refused."""
    await refused(shared, head)


@pytest.mark.parametrize(
    "start",
    ["PO ST / HTTP/1.1", "P\xd6ST / HTTP/1.1", "FETCH / HTTP/1.1", "post /v1/chat/completions HTTP/1.1",
     "(GET) / HTTP/1.1", "GET / HTTP/9.9", "GET / HTTP/1", "GET / HTTP/2.0", "GET / HTTP/1.1.1", "GET / HTTPS/1.1",
     "GET / ", "GET /", "GET", "GET  /  HTTP/1.1", "GET / http/1.1", "GET /\x01 HTTP/1.1", "GET /\0 HTTP/1.1",
     "GET / HTTP/1.1 x", "\x16\x03\x01\x02", "PRI * HTTP/2.0"],
)  # fmt: skip
async def test_a_first_line_is_a_known_method_a_target_and_a_known_version(shared: Daemon, start: str) -> None:
    """Anything else, TLS and HTTP/2 included, is refused, or is no route of this daemon."""
    data = start.encode("latin-1") + b"\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    if start.startswith(("FETCH",)):
        data = data.replace(b"localhost", b"localhost\r\nConnection: close")
        async with connected(shared) as client:
            await client.send(data)
            assert (await client.answer()).status in {400, 405}
            assert await client.closed()
        return
    await refused(shared, data)


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "OPTIONS", "PROPFIND"])
async def test_a_method_that_no_route_takes_reaches_no_engine(shared: Daemon, method: str) -> None:
    """405, 404 or 400 in the envelope."""
    request_id = uuid.uuid4().hex
    target = "localhost:80" if method == "CONNECT" else PATH
    async with connected(shared) as client:
        await client.send(request(target, b"", f"X-Request-Id: {request_id}", "Connection: close", method=method))
        answer = await client.answer()
        assert answer.status in {400, 404, 405}
        assert json.loads(answer.body)["error"]["code"] in {"bad_request", "not_found", "method_not_allowed"}
        assert await client.closed()
    assert await shared.seen(request_id) == []


@pytest.mark.parametrize(
    "body",
    [b"x\r\n", b"-1\r\n", b"+29\r\n", b"0x29\r\n", b" 29\r\n", b"\r\n", b"29 \r\n",
     b"ffffffffffffffffff\r\n", b";x\r\n", b"2_9\r\n"],
)  # fmt: skip
async def test_a_chunks_size_is_a_plain_hexadecimal_number(shared: Daemon, body: bytes) -> None:
    """Anything else is refused."""
    await refused(shared, request(PATH, body + BODY + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"))


@pytest.mark.parametrize(
    "body",
    [
        b"29\n%s\r\n0\r\n\r\n",
        b"29\r\n%s0\r\n\r\n",
        b"29\r\n%sxx0\r\n\r\n",
        b"29\r\n%s\n0\r\n\r\n",
        b"29;a\nb\r\n%s\r\n0\r\n\r\n",
        b"29\r\n%s\r\n0\r\nbad trailer\r\n\r\n",
    ],
)
async def test_a_chunk_ends_where_its_size_says(shared: Daemon, body: bytes) -> None:
    """A bare LF behind a size, bytes behind a chunk and bad trailers are refused."""
    await refused(shared, request(PATH, body % BODY, "Transfer-Encoding: chunked"))


@pytest.mark.parametrize("path", [PATH, PATH + "?a=b"])
@pytest.mark.parametrize("pieces", [1, 40])
async def test_a_chunked_body_over_the_limit_is_413(shared: Daemon, path: str, pieces: int) -> None:
    """Also where all of it comes together with its head; no engine sees any of it."""
    request_id = uuid.uuid4().hex
    text = b'{"model": "chat", "pad": "%s"}' % (b"x" * 3_000)
    size = -(-len(text) // pieces)
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    data = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    async with connected(shared) as client:
        await client.send(request(path, data, "Transfer-Encoding: chunked", f"X-Request-Id: {request_id}"))
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (413, "request_too_large")
        client.leave()
    assert await shared.seen(request_id) == []


@pytest.mark.parametrize("path", [PATH, "/v1/models", "/nowhere"])
@pytest.mark.parametrize("large", ["value", "name", "target", "lines", "drip"])
async def test_an_oversized_head_is_431(shared: Daemon, path: str, large: str) -> None:
    """A long value, name or target, too many lines, in one piece or in several: `headers_too_large`."""
    lines = {
        "value": ["X: " + "v" * 30_000],
        "name": ["n" * 30_000 + ": v"],
        "target": [],
        "lines": [f"X-{number}: v" for number in range(2_000)],
        "drip": ["X: " + "v" * 20_000],
    }[large]
    data = request(path + ("?" + "t" * 30_000 if large == "target" else ""), BODY, *lines)
    if large == "drip":  # the head never ends
        async with connected(shared) as client:
            start = data.index(b"vvv")
            await client.send(data[: start + 8_000])
            await client.send(data[start + 8_000 : start + 9_000])
            answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (431, "headers_too_large")
            assert await client.closed()
        return
    await refused(shared, data, 431, "headers_too_large")


async def test_a_request_behind_a_refused_one_is_never_executed(shared: Daemon) -> None:
    """A good request before the bad one is answered; what follows the bad one is not."""
    first, last = uuid.uuid4().hex, uuid.uuid4().hex
    async with connected(shared) as client:
        await client.send(request(PATH, BODY, f"X-Request-Id: {first}"))
        assert (await client.answer()).status == 200
        await client.send(
            request(PATH, chunked(), "Content-Length: 5", "Transfer-Encoding: chunked")
            + request(PATH, BODY, f"X-Request-Id: {last}")
        )
        assert (await client.answer()).status == 400
        assert await client.closed()
    assert len(await shared.seen(first)) == 1
    assert await shared.seen(last) == []


async def test_a_hidden_request_in_a_body_stays_a_body(shared: Daemon) -> None:
    """Bytes that look like a request inside a framed body, and behind a GET with a body, are never executed."""
    hidden = uuid.uuid4().hex
    inside = HIDDEN % hidden.encode()
    for data in (
        request(PATH, b'{"model": "chat", "x": "' + inside.replace(b"\r\n", b" ").replace(b'"', b"'") + b'"}'),
        request("/v1/models", inside, method="GET"),
        request("/health", inside, method="HEAD"),
        request("/nowhere", chunked(inside), "Transfer-Encoding: chunked"),
        request(PATH, inside),
        request("/v1/audio/transcriptions", inside),
        request(PATH, inside, "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: x"),
        request("/v1/realtime", inside, method="GET"),
    ):
        async with connected(shared) as client:
            await client.send(data)
            await client.answer(head=data.startswith(b"HEAD"))
            client.leave()
    assert await shared.seen(hidden) == []


async def test_a_body_that_never_ends_is_no_request(shared: Daemon) -> None:
    """A client that leaves inside its body, or its head, leaves nothing for an engine to do."""
    request_id = uuid.uuid4().hex
    for data in (
        request(PATH, BODY[:10], f"X-Request-Id: {request_id}", f"Content-Length: {len(BODY)}"),
        request(PATH, b"29\r\n" + BODY, f"X-Request-Id: {request_id}", "Transfer-Encoding: chunked"),
        request(PATH, BODY, f"X-Request-Id: {request_id}")[:60],
    ):
        async with connected(shared) as client:
            await client.send(data)
    async with connected(shared) as client:
        await client.send(request(PATH, BODY))
        assert (await client.answer()).status == 200
    assert await shared.seen(request_id) == []
