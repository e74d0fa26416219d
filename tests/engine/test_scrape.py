"""An engine's whole `/metrics`, and answers that are none."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vllm_proxy.domain.address import Address, TcpAddress, UnixAddress
from vllm_proxy.engine import scrape

OK = b"HTTP/1.1 200 OK\r\n"


async def scraped(address: Address, seconds: float) -> bytes | None:
    """Of one engine."""
    (found,) = await scrape.scraped([address], seconds)
    return found


@contextlib.asynccontextmanager
async def answering(answer: bytes, *, hangs: bool = False) -> AsyncIterator[TcpAddress]:
    """A server that answers so, whatever it is asked, and closes; or does not."""

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            if hangs:
                await reader.read()
        writer.close()

    asked: list[bytes] = []
    server = await asyncio.start_server(answered, "127.0.0.1", 0)
    async with server:
        yield TcpAddress("127.0.0.1", server.sockets[0].getsockname()[1])
    assert all(b"uthorization" not in one and one.startswith(b"GET /metrics HTTP/1.1\r\nHost: 127.") for one in asked)


@pytest.mark.parametrize(
    "answer",
    [OK + b"Content-Length: 3\r\n\r\na 1", OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\n 1\r\n0\r\n\r\n"],
)
async def test_a_whole_answer_is_read_and_not_waited_behind(answer: bytes) -> None:
    """With its length or in chunks; that the engine keeps the connection open holds nobody up."""
    async with answering(answer, hangs=True) as address:
        assert await scraped(address, 30.0) == b"a 1"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\na 1",
        OK + b"Content-Length: 4\r\n\r\na 1",
        OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\n 1\r\n",
        OK + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\na 1",
        b"what?\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
    ids=["nothing", "no", "cut", "cut chunks", "encoded", "no HTTP", "another protocol"],
)
async def test_what_is_no_whole_answer_is_none(answer: bytes) -> None:
    """Another status, one that breaks off, one that is compressed unasked, one that is no HTTP."""
    async with answering(answer) as address:
        assert await scraped(address, 30.0) is None


async def test_an_engine_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the deadline, and at once where nobody listens, or it says too much."""
    async with answering(OK, hangs=True) as address:
        assert await scraped(address, 0.01) is None
    assert await scraped(address, 30.0) is None
    monkeypatch.setattr(scrape, "_MOST_BYTES", 2)
    async with answering(OK + b"Content-Length: 3\r\n\r\na 1") as address:
        assert await scraped(address, 30.0) is None


@pytest.mark.parametrize(
    "endless",
    [b"X: ", b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: ", b"Transfer-Encoding: chunked\r\n\r\n1;"],
    ids=["head", "trailer", "extension"],
)
async def test_an_answer_that_ends_nowhere_is_given_up(monkeypatch: pytest.MonkeyPatch, endless: bytes) -> None:
    """Whatever it is that has no end, and long before the deadline."""
    monkeypatch.setattr(scrape, "_MOST_BYTES", 1000)
    async with answering(OK + endless + b"x" * 1000, hangs=True) as address:
        assert await scraped(address, 3600.0) is None


async def test_engines_at_unix_sockets_are_asked_too(tmp_path: Path) -> None:
    """Those that may sleep listen there alone."""

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Content-Length: 3\r\n\r\na 1")
        writer.close()

    async with await asyncio.start_unix_server(answered, tmp_path / "socket"):
        assert await scraped(UnixAddress(str(tmp_path / "socket")), 30.0) == b"a 1"


async def test_one_that_does_not_answer_keeps_the_others_answers_from_nobody() -> None:
    """The deadline is one for all, and ends only what is still open then."""
    async with answering(OK, hangs=True) as silent, answering(OK + b"Content-Length: 3\r\n\r\na 1") as talking:
        assert await scrape.scraped([silent, talking, silent], 0.5) == [None, b"a 1", None]
    assert await scrape.scraped([], 0.5) == []
