"""Answers that are the same for everybody until the daemon is upgraded: pages, their files, schemas; with an ETag."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from aiohttp import web

from vllm_proxy.traffic.envelope import Handler

HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # cached, but revalidated: an upgrade changes it
}
_TEXT = ("text/", "application/javascript")


@dataclass(frozen=True, slots=True)
class File:
    """What is served under one path."""

    body: bytes
    kind: str
    etag: str

    @classmethod
    def of(cls, body: bytes, kind: str) -> "File":
        """With the ETag of its bytes."""
        return cls(body, kind, hashlib.sha256(body).hexdigest()[:16])


def constant(file: File, headers: Mapping[str, str], status: int = HTTPStatus.OK) -> Handler:
    """A handler that serves one file."""

    async def handle(request: web.Request) -> web.Response:
        return served(request, file, headers, status)

    return handle


def served(
    request: web.Request, file: File, headers: Mapping[str, str] = HEADERS, status: int = HTTPStatus.OK
) -> web.Response:
    """The answer, or that what the client has is still right."""
    sent = {**headers, "ETag": f'"{file.etag}"'}
    if any(tag.value in {file.etag, "*"} for tag in request.if_none_match or ()):
        return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=sent)
    charset = "utf-8" if file.kind.startswith(_TEXT) else None
    return web.Response(status=status, body=file.body, content_type=file.kind, charset=charset, headers=sent)
