"""The TLS handshake of one client: the time before there is a connection for `client`.

Clients in a handshake are counted as those that are connected, have a deadline, and cost no TLS session before their
first byte has come: one that only connects holds no more of the daemon than without TLS. Which certificate is shown is
decided when the first byte comes (`vllm_proxy/tls.py`).
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Protocol, cast

import structlog

from vllm_proxy.domain.config import Server
from vllm_proxy.domain.listener import Listener
from vllm_proxy.errors import RequestError
from vllm_proxy.runtime.background import run_once
from vllm_proxy.traffic.client import CLIENT_SECONDS, as_bytes

log = structlog.get_logger()

_BUFFERED = 64 * 1024  # bytes of an answer that wait for the client, as without TLS; asyncio's default is 512 KiB
_LONGEST_SECONDS = 60.0  # where head_timeout is 0
_WITHOUT_ROOM = 64  # so many are let through to be told that the daemon is full; more are closed at once
_CLIENT_HELLO = b"\x16"  # a record of the handshake
_NO_TLS = as_bytes(RequestError("bad_request", "cannot read a request without TLS: use https:// for this address"))


class Front(Protocol):
    """The server of a connection, as a handshake sees it."""

    handshakes: "set[Handshake]"

    def has_room(self, listener: Listener) -> bool:
        """Whether one more connection of this listener may be taken in."""

    def refuse(self, transport: asyncio.Transport, answer: bytes) -> None:
        """Answer so, and close."""

    def connection(self, listener: Listener, wire: asyncio.Transport) -> asyncio.Protocol:
        """The protocol of a connection whose encrypted bytes go through `wire`."""

    def head_seconds(self) -> float:
        """The deadline for a request's head now; 0: none."""


class Handshake(asyncio.Protocol):
    """A client's connection until its TLS session is there."""

    __slots__ = ("_context", "_early", "_front", "_listener", "_since", "_wire")

    def __init__(self, front: Front, listener: Listener, context: Callable[[], ssl.SSLContext]) -> None:
        """`context`: the TLS of one more client."""
        self._front = front
        self._listener = listener
        self._context = context
        self._wire: asyncio.Transport | None = None
        self._early: bytes | None = None  # once TLS reads: what it decrypted before there was a connection for it
        self._since: float | None = None  # the time of the first sweep that saw it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self._wire = cast("asyncio.Transport", transport)
        if not self._front.has_room(self._listener) and len(self._front.handshakes) >= _WITHOUT_ROOM:
            self._wire.abort()
        else:
            self._front.handshakes.add(self)

    def data_received(self, data: bytes) -> None:
        """The client's first bytes, or the first of its request, if they come with the last of the handshake."""
        assert self._wire is not None
        if self._early is not None:
            self._early += data
        elif data.startswith(_CLIENT_HELLO):
            self._early = b""
            self._wire.pause_reading()  # the next bytes are for TLS
            run_once(lambda: self._shake_hands(data), "a TLS handshake")
        else:
            self._front.handshakes.discard(self)
            self._front.refuse(self._wire, _NO_TLS)

    def connection_lost(self, exc: BaseException | None) -> None:  # noqa: ARG002 - asyncio's signature
        """It has left before its first byte came."""
        self._front.handshakes.discard(self)

    def enforce_deadlines(self, now: float, server: Server) -> None:
        """End what takes longer than a head may. `now`: seconds in which the daemon could read."""
        if self._since is None:
            self._since = now
        elif server.head_timeout and now - self._since > server.head_timeout and self in self._front.handshakes:
            self.abort()

    def abort(self) -> None:
        """End it."""
        if self._wire is not None:
            self._wire.abort()

    async def _shake_hands(self, first: bytes) -> None:
        assert self._wire is not None
        loop = asyncio.get_running_loop()
        loop.call_soon(_pass_on, self._wire, first)  # once TLS reads from the wire
        try:
            transport = await loop.start_tls(
                self._wire,
                self,
                self._context(),
                server_side=True,
                ssl_handshake_timeout=self._front.head_seconds() or _LONGEST_SECONDS,
                ssl_shutdown_timeout=CLIENT_SECONDS,
            )
        except OSError as error:  # no version or cipher that both sides know, too late, or gone
            log.debug("a TLS handshake failed", error=repr(error))
            return
        finally:
            self._front.handshakes.discard(self)
        if transport is None or transport.is_closing():
            return
        transport.set_write_buffer_limits(_BUFFERED)
        connection = self._front.connection(self._listener, self._wire)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        if self._early:
            connection.data_received(self._early)


def _pass_on(wire: asyncio.Transport, data: bytes) -> None:
    """Give bytes that were read from a wire to the protocol that reads from it now, as it takes them."""
    tls = cast("asyncio.BufferedProtocol", wire.get_protocol())
    buffer: Any = tls.get_buffer(len(data))
    buffer[: len(data)] = data
    tls.buffer_updated(len(data))
