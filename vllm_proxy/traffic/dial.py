"""Opens connections to engines. The one module that tells a TCP port from a Unix socket to do so.

For the pool in `wire`, for `realtime`, and for health checks.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import aiohttp

from vllm_proxy.domain.address import Address, TcpAddress, UnixAddress


def connector[P: asyncio.Protocol](
    address: Address, protocol: Callable[[], P]
) -> Callable[[], Coroutine[Any, Any, tuple[asyncio.Transport, P]]]:
    """What opens one connection after another to an address, each with a `protocol` of its own.

    Opening one raises OSError where nobody accepts. It has no deadline.
    """
    match address:
        case TcpAddress(host, port):
            return lambda: asyncio.get_running_loop().create_connection(protocol, host, port)
        case UnixAddress(path):
            return lambda: asyncio.get_running_loop().create_unix_connection(protocol, path)


@contextlib.asynccontextmanager
async def session_to(address: Address, tcp: aiohttp.ClientSession) -> AsyncIterator[aiohttp.ClientSession]:
    """A session of aiohttp's whose URLs, made with the address's `authority`, lead to it.

    `tcp` where it is a port, else one of its own, since aiohttp knows a Unix socket by its connector alone.
    """
    match address:
        case TcpAddress():
            yield tcp
        case UnixAddress(path):
            own = aiohttp.UnixConnector(path, force_close=True)
            async with aiohttp.ClientSession(connector=own, trust_env=False) as session:
                yield session
