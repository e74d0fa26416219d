"""Requests of the daemon's own to engines: of `probe`, `nap`, `adapters`. What clients send goes by `traffic/wire`.

Answers are not trusted: each is read up to a limit, no redirect is followed, nothing is decompressed.
"""

import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from vllm_proxy.domain.address import Address
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import spawn
from vllm_proxy.traffic.dial import session_to

_MOST_BYTES = 2**20  # of an answer that is read whole
_MOST_CHARACTERS = 500  # of what an engine says, in a message

# What a request may end in: nobody there, no answer in time, one that is none.
FAULTS = (aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError)


class UncleanError(Exception):
    """An answer that is not as it should be. Its message says why, and is bounded."""

    def __init__(self, why: str) -> None:
        super().__init__(shortened(why))


def shortened(text: str) -> str:
    """As much of it as a message may have: an engine can say anything."""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


@asynccontextmanager
async def answer_to(
    session: aiohttp.ClientSession,
    address: Address,
    method: str,
    path: str,
    *,
    credential: str | None = None,
    body: Mapping[str, object] | None = None,
    seconds: float | None = None,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """An answer's head; what it is not read of ends with the block. `seconds`: the deadline, one for all of it.

    `session` must not share its connections with requests of clients; where the address is a Unix socket, one of its
    own is used.
    """
    headers = {"Accept-Encoding": "identity"}
    if credential is not None:
        headers["Authorization"] = f"Bearer {credential}"
    async with (
        session_to(address, session) as client,
        client.request(
            method,
            f"http://{address.authority}{path}",
            headers=headers,
            json=body,
            timeout=aiohttp.ClientTimeout(total=seconds),
            allow_redirects=False,  # an engine's answer is its own, and its credential is for it alone
        ) as answer,
    ):
        if "Content-Encoding" in answer.headers:  # a small one can be large inside
            raise ValueError("it is encoded though nobody asked for that")
        yield answer


async def body_of(answer: aiohttp.ClientResponse) -> bytes:
    """What an answer holds, to its end.

    Raises:
        ValueError: it is too long.

    """
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise ValueError("it is too long")
    return bytes(body)


async def json_of(answer: aiohttp.ClientResponse) -> object:
    """What an answer holds.

    Raises:
        ValueError: it is no JSON, or too long.

    """
    return json.loads(await body_of(answer))


async def within[T](call: Coroutine[Any, Any, T], seconds: float, path: str) -> T:
    """A call of a path with a deadline, in time in which this process ran.

    Raises:
        UncleanError: it has not answered by then, or ended in one of the FAULTS.

    """
    task = spawn(call, f"a call of {path}")
    try:
        if not await clock.wait([task], seconds):
            raise UncleanError(f"{path} has not answered for {seconds:g} s")
        return task.result()
    except FAULTS as error:
        raise UncleanError(f"{path} gives no clean answer: {str(error) or type(error).__name__}") from error
    finally:
        task.cancel()
