"""`GET /models/{model_id}/logs`: the output of a model's engines, its last lines or as it comes.

Files are only read, and each reader has a position of its own: readers do not affect each other or the engine.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web

from vllm_proxy.api.reply import ALIVE, begin_events
from vllm_proxy.engine.logs import LogReader, last_lines, size_of
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.runtime.turns import in_turns
from vllm_proxy.traffic.envelope import Handler

type Mask = Callable[[str], str]

_DESCRIPTORS = Path("/proc/self/fd")
_EVENT = "data: {}\n\n"
_LINES = 100
_MOST_LINES = 10_000
_MOST_BYTES = 8 * 2**20  # of a model's files are searched
_POLL_SECONDS = 0.2
_SILENT_POLLS = 75  # then a comment keeps the stream alive


def engine_output(reconciler: Reconciler, mask: Mask) -> Handler:
    """The last `lines` as text; with `follow` as server-sent events, one a line, until the client or the daemon leaves.

    Lines of a model with several instances begin with `ID/INDEX | `. `mask` hides the secrets in them.
    """

    async def handle(request: web.Request) -> web.StreamResponse:
        follows = request.query.get("follow", "0").lower() not in {"", "0", "false"}
        if follows and request.method == "HEAD":
            raise web.HTTPMethodNotAllowed("HEAD", ["GET"])  # there is no length to answer
        count = _lines(request.query.get("lines", ""))
        with contextlib.ExitStack() as stack:
            files = _held(reconciler.log_files(request.match_info["model_id"]), stack)
            ends = {name: size_of(file) for name, file in files}
            if not follows:
                text = await asyncio.to_thread(_tail, files, count, "{}\n", mask)
                headers = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"}
                return web.Response(body=text, headers=headers)
            text = await asyncio.to_thread(_tail, files, count, _EVENT, mask)
            return await _follow(request, files, ends, text, mask=mask, stopping=reconciler.stopping)

    return handle


def _held(files: list[tuple[str, Path]], stack: contextlib.ExitStack) -> list[tuple[str, Path]]:
    """The files; one without a name is held open here too: its descriptor may be reused once its engine ended."""
    held = []
    for name, file in files:
        if file.is_relative_to(_DESCRIPTORS):
            with contextlib.suppress(OSError):
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                held.append((name, _DESCRIPTORS / str(descriptor)))
        else:
            held.append((name, file))
    return held


def _tail(files: list[tuple[str, Path]], count: int, form: str, mask: Mask) -> bytes:
    """The last lines of each file. For a thread."""
    share = _MOST_BYTES // max(len(files), 1)
    return b"".join(
        _text(name, last_lines(file, count, most_bytes=share), form, mask, several=len(files) > 1)
        for name, file in files
    )


async def _follow(
    request: web.Request,
    files: list[tuple[str, Path]],
    ends: dict[str, int],
    text: bytes,
    *,
    mask: Mask,
    stopping: asyncio.Event,
) -> web.StreamResponse:
    response = await begin_events(request)
    readers = [(name, LogReader(file, ends[name])) for name, file in files]
    silent = 0
    while not stopping.is_set():
        if text:
            await response.write(text)
        elif silent >= _SILENT_POLLS:
            await response.write(ALIVE)
        silent = 0 if text or silent >= _SILENT_POLLS else silent + 1
        more = any(reader.more for _, reader in readers)
        await asyncio.sleep(0 if more else _POLL_SECONDS)
        text = b""
        async for name, reader in in_turns(readers):
            text += _text(name, reader.read(), _EVENT, mask, several=len(files) > 1)
    return response


def _text(name: str, lines: Sequence[str], form: str, mask: Mask, *, several: bool) -> bytes:
    head = f"{name} | " if several else ""
    return mask("".join(form.format(head + line) for line in lines)).encode()


def _lines(text: str) -> int:
    if not text:
        return _LINES
    if text.isascii() and text.isdecimal() and len(text) < 9:
        return min(int(text), _MOST_LINES)
    raise RequestError("bad_request", f"cannot read lines={text}: expected a number of lines")
