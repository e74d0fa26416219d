"""`GET /models/{model_id}/logs`: what engines write. Its one rule: each reader has a place of its own in the file."""

import asyncio
from pathlib import Path

from aiohttp import web

from vllm_proxy.api.envelope import Handler
from vllm_proxy.engine.logs import LogReader, last_lines, size_of
from vllm_proxy.engine.reconciler import Reconciler
from vllm_proxy.errors import RequestError

_LINES = 100
_MOST_LINES = 10_000
_POLL_SECONDS = 0.2
_SILENT_POLLS = 75  # then a comment, so that nobody in between takes the stream for dead


def engine_output(reconciler: Reconciler) -> Handler:
    """The last `lines` as text; with `follow` as server-sent events, one a line, until the client or the daemon leaves.

    Lines of a model with several instances begin with `ID/INDEX | `.
    """

    async def handle(request: web.Request) -> web.StreamResponse:
        follows = request.query.get("follow", "0").lower() not in {"", "0", "false"}
        if follows and request.method == "HEAD":
            raise web.HTTPMethodNotAllowed("HEAD", ["GET"])  # there is no length to tell
        files = reconciler.log_files(request.match_info["model_id"])
        count = _lines(request.query.get("lines", ""))
        ends = {name: size_of(file) for name, file in files}
        lines = [line for name, file in files for line in _named(name, last_lines(file, count), several=len(files) > 1)]
        if not follows:
            text = "".join(f"{line}\n" for line in lines)
            return web.Response(text=text, content_type="text/plain", headers={"Cache-Control": "no-store"})
        return await _follow(request, files, ends, lines, reconciler.stopping)

    return handle


async def _follow(
    request: web.Request,
    files: list[tuple[str, Path]],
    ends: dict[str, int],
    lines: list[str],
    stopping: asyncio.Event,
) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    readers = [(name, LogReader(file, ends[name])) for name, file in files]
    silent = 0
    while not stopping.is_set():
        if lines:
            await response.write("".join(f"data: {line}\n\n" for line in lines).encode())
        elif silent >= _SILENT_POLLS:
            await response.write(b":\n\n")
        silent = 0 if lines or silent >= _SILENT_POLLS else silent + 1
        await asyncio.sleep(_POLL_SECONDS)
        lines = [line for name, reader in readers for line in _named(name, reader.read(), several=len(files) > 1)]
    return response


def _named(name: str, lines: list[str] | tuple[str, ...], *, several: bool) -> list[str]:
    return [f"{name} | {line}" for line in lines] if several else list(lines)


def _lines(text: str) -> int:
    if not text:
        return _LINES
    if text.isascii() and text.isdecimal() and len(text) < 9:
        return min(int(text), _MOST_LINES)
    raise RequestError("bad_request", f"cannot read lines={text}: expected a number of lines")
