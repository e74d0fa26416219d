"""What the daemon's own requests say of answers that are none."""

import asyncio

import aiohttp
import pytest

from vllm_proxy.domain.address import TcpAddress
from vllm_proxy.engine.http_client import UncleanError, answer_to, within


async def test_an_answer_that_is_none_is_told_in_a_bounded_message() -> None:
    """The HTTP client quotes the header that it cannot read, whole."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nX\x01bad: " + b"y" * 4000 + b"\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async def call(port: int) -> None:
        async with (
            aiohttp.ClientSession(trust_env=False) as session,
            answer_to(session, TcpAddress("127.0.0.1", port), "GET", "/is_sleeping"),
        ):
            pass

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        with pytest.raises(UncleanError, match=r"^/is_sleeping gives no clean answer: ") as error:
            await within(call(server.sockets[0].getsockname()[1]), 5.0, "/is_sleeping")
    assert len(str(error.value)) == 501
