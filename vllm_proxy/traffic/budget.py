"""Bounds what the bodies of all requests hold together (`server.max_buffered`): more is refused as `overloaded`.

A body counts from its first byte until its request has ended, queueing included, and is released exactly once: in
memory, and for uploads also in TMPDIR, which may be memory too. What aiohttp reads ahead on a connection (128 KiB, then
it stops reading) is not counted.
"""

from typing import Protocol

from vllm_proxy.domain.config import Server
from vllm_proxy.errors import RequestError

_RETRY_SECONDS = 1


class Holder(Protocol):
    """Who holds bytes: a call, or the connection of a request that is none."""

    held: int


class Budget:
    """Bytes of request bodies. Those that came with their head are counted where they are read, in `body.py`."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = 0

    def check_length(self, size: int, server: Server) -> None:
        """Refuse a body of a declared length before any of it is read.

        Raises:
            RequestError: `request_too_large`, or `overloaded` where it may be taken later.

        """
        if size > server.max_body_size or size > server.max_buffered:
            raise too_large(server)
        if self.held + size > server.max_buffered:
            raise overloaded(server)

    def take(self, holder: Holder, size: int, server: Server) -> None:
        """Count bytes that have come.

        Raises:
            RequestError: as `check_length`. They are counted all the same, until they are given back.

        """
        holder.held += size
        self.held += size
        if holder.held > server.max_body_size or holder.held > server.max_buffered:
            raise too_large(server)
        if self.held > server.max_buffered:
            raise overloaded(server)

    def release(self, holder: Holder) -> None:
        """The request has ended: nothing of its body is held any more."""
        self.held -= holder.held
        holder.held = 0


def too_large(server: Server) -> RequestError:
    """The refusal of a body that will never be taken."""
    key, limit = min(
        ("max_body_size", server.max_body_size), ("max_buffered", server.max_buffered), key=lambda item: item[1]
    )
    msg = f"cannot take this request: its body is larger than server.{key} ({limit} bytes)"
    return RequestError("request_too_large", msg)


def overloaded(server: Server) -> RequestError:
    """The refusal of a body that has no room beside those of other requests."""
    msg = (
        f"cannot take this request: bodies of other requests leave no room for its own in server.max_buffered"
        f" ({server.max_buffered} bytes); try again"
    )
    return RequestError("overloaded", msg, retry_after=_RETRY_SECONDS)
