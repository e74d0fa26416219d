"""Runs a program of vLLM's installation for its output, and ends it with all that it started, whatever happens.

For `options` and `adapter_source`: one reads vLLM's parser, the other downloads from the hub.
"""

import asyncio
import re
import secrets
from asyncio.subprocess import SubprocessStreamProtocol
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from vllm_proxy.domain.command import mark, marked
from vllm_proxy.engine.ownership import Identity
from vllm_proxy.engine.proc import KERNEL, look_up
from vllm_proxy.engine.process import end_processes, run_shielded
from vllm_proxy.runtime.background import spawn

log = structlog.get_logger()

_MOST_BYTES = 4 * 2**20
_BUFFERED = 2**16
_LAST_SECONDS = 1.0
_LAST_BYTES = 2000  # bytes of a failed run's stderr
_LINE_ENDS = re.compile("[\r\n]")  # a progress bar's is a carriage return
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"error\b", re.IGNORECASE)  # what follows it may be a hint


@dataclass(frozen=True, slots=True)
class _Running:
    """The program."""

    transport: asyncio.SubprocessTransport
    process: asyncio.subprocess.Process
    output: asyncio.StreamReader
    who: Identity
    words: asyncio.Task[str]  # of its stderr


async def output_of(argv: Sequence[str], env: Mapping[str, str], name: str, folder: Path) -> bytes:
    """What a program prints, which is ended afterwards with all that it started, as it is where the caller gives up.

    `name`: in the mark of its processes. `folder`: where it works.

    Raises:
        OSError: it cannot be run.
        ValueError: it printed nothing, or too much; what its stderr says last.

    """
    # A start that is cancelled half way would leave what the program has started by then.
    starting = spawn(_start(argv, env, name, folder), f"start of {argv[0]}")
    try:
        await asyncio.wait({starting})
        output = await _bounded(starting.result().output)
    finally:
        said = await run_shielded(_end, starting)
    if not output:
        msg = said or "it ended in silence"
        raise ValueError(msg)
    return output


async def _start(argv: Sequence[str], env: Mapping[str, str], name: str, folder: Path) -> _Running:
    secret = secrets.token_hex()
    loop = asyncio.get_running_loop()
    transport, streams = await loop.subprocess_exec(
        lambda: SubprocessStreamProtocol(_BUFFERED, loop),
        *argv,
        env={**env, **marked(name, secret)},
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    child = asyncio.subprocess.Process(transport, streams, loop)
    KERNEL.waited_for.add(child.pid)
    # Once it is reaped, its number is not its own any more: what is left of it bears its mark.
    process = look_up(child.pid) if child.returncode is None else None
    who = Identity(child.pid if process else 0, process.started if process else 0, mark(name, secret))
    assert child.stdout is not None
    assert child.stderr is not None
    return _Running(transport, child, child.stdout, who, spawn(_tail(child.stderr), f"stderr of {argv[0]}"))


async def _end(starting: asyncio.Task[_Running]) -> str:
    """End all of its processes, once it has been started; returns what its stderr says last."""
    await asyncio.wait({starting})
    if starting.exception() is not None:
        return ""
    running = starting.result()
    child, words = running.process, running.words
    try:
        await end_processes(running.who, 0.0)
    except OSError as error:
        log.warning("a program that was run for its output may be left", pid=child.pid, error=str(error))
    try:
        exited = spawn(child.wait(), "end of a program")
        await asyncio.wait({words, exited}, timeout=_LAST_SECONDS)  # whoever has left the session may hold the pipe
        exited.cancel()
        words.cancel()
        return words.result() if words.done() and not words.cancelled() else ""
    finally:
        KERNEL.waited_for.discard(child.pid)
        running.transport.close()  # the pipes: nobody may have read them to their ends, or somebody else may hold them


async def _bounded(stream: asyncio.StreamReader) -> bytes:
    output = bytearray()
    while chunk := await stream.read(2**16):
        output += chunk
        if len(output) > _MOST_BYTES:
            msg = f"more than {_MOST_BYTES} bytes of output"
            raise ValueError(msg)
    return bytes(output)


async def _tail(stream: asyncio.StreamReader) -> str:
    """The last line of it that tells of an error, else the last one."""
    tail = b""
    while chunk := await stream.read(2**16):
        tail = (tail + chunk)[-_LAST_BYTES:]
    lines = [line.strip() for line in _LINE_ENDS.split(_COLOURS.sub("", tail.decode(errors="replace")))]
    said = [line for line in lines if line]
    return next((line for line in reversed(said) if _ERROR.search(line)), said[-1] if said else "")
