"""Fetches the whole `/metrics` of engines, for `/metrics/engines`. What is looked at by itself goes through `probe`.

An answer is not trusted: it is read up to a limit and a deadline, and no credential is sent. aiohttp's client would
take more processor time for twenty engines than everything else that a scrape of them does.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import cast

import httptools

from vllm_proxy.domain.address import Address
from vllm_proxy.traffic.dial import connector

_MOST_BYTES = 4 * 2**20  # vLLM 0.32 has 56 KB


async def scraped(addresses: Sequence[Address], seconds: float) -> list[bytes | None]:
    """What each engine says of itself, as text for Prometheus; None where it does not answer so soon."""
    found: list[bytes | None] = [None] * len(addresses)

    async def ask(number: int, address: Address) -> None:
        found[number] = await _answer_of(address)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(ask(number, address) for number, address in enumerate(addresses)))
    return found


async def _answer_of(address: Address) -> bytes | None:
    request = (
        f"GET /metrics HTTP/1.1\r\nHost: {address.authority}\r\nAccept: text/plain\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    try:
        transport, answer = await connector(address, partial(_Answer, request.encode()))()
        try:
            return await answer.body
        finally:
            transport.abort()
    except (OSError, _NoAnswerError):
        return None


class _NoAnswerError(Exception):
    """What came is not what was asked for."""


class _Answer(asyncio.Protocol):
    """One answer to one request. `body`: its result."""

    def __init__(self, request: bytes) -> None:
        self.body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: list[bytes] = []
        self._size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        cast("asyncio.WriteTransport", transport).write(self._request)  # uvloop's derive from nothing

    def data_received(self, data: bytes) -> None:
        """A part of the answer."""
        self._size += len(data)
        if self._size > _MOST_BYTES:  # head and trailers included
            self._fail("it is too long")
        if self.body.done():
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """No more comes."""
        self._fail(f"the connection has ended: {exc}")

    def on_header(self, name: bytes, _: bytes) -> None:
        """httptools': a header."""
        if name.lower() == b"content-encoding":  # a small one can be large inside
            self._fail("it is encoded though nobody asked for that")

    def on_body(self, body: bytes) -> None:
        """httptools': a part of the body."""
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        """httptools': it is whole."""
        if self._parser.get_status_code() != HTTPStatus.OK:
            self._fail("it says no")
        elif not self.body.done():
            self.body.set_result(b"".join(self._chunks))

    def _fail(self, why: str) -> None:
        if not self.body.done():
            self.body.set_exception(_NoAnswerError(why))
            self.body.exception()  # nobody may be there any more to be told
