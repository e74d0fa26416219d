"""Answers to the letter: how a cut is told, what is never a 500, ids, and what is rewritten of a body."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests import certificates
from tests.harness import Answer, Daemon, connected, daemon, fake_engines, port_block, request, until

PATH = "/v1/chat/completions"
MODELS = """
[server]
shutdown_timeout = "300ms"
[models.chat]
model = "org/chat"
aliases = ["an-alias"]
[models.hasty]
model = "org/hasty"
request_timeout = "300ms"
"""
CHUNKED = "HTTP/1.1 200 OK\r\ncontent-type: {}\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM = CHUNKED.format("text/event-stream; charset=utf-8")
UNFRAMED = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"
PART = "5\r\nhello\r\n"


@pytest.fixture(scope="module", params=["tcp", "tls"])
async def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """One daemon for all of them, and one that speaks TLS."""
    folder = tmp_path_factory.mktemp("answers")
    pair = certificates.make(folder) if request.param == "tls" else None
    async with daemon(fake_engines(port_block()) + MODELS, folder, pair=pair) as running:
        await running.all_ready()
        yield running


def body(model: str = "chat", **fault: Any) -> bytes:  # noqa: ANN401 - JSON
    """A request that tells the fake what to do."""
    return json.dumps({"model": model, "fake": fault}).encode()


async def ask(running: Daemon, data: bytes, *, head: bool = False) -> Answer:
    """The answer to one request on a connection of its own."""
    async with connected(running) as client:
        await client.send(data)
        return await client.answer(head=head)


class Plain:
    """A client that does nothing but read, and sees whether the end is an orderly one."""

    def __init__(self, *, receive_buffer: int | None = None) -> None:
        self._socket = socket.socket()
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.setblocking(False)  # noqa: FBT003 - the signature is the socket's
        self._loop = asyncio.get_running_loop()
        self._tls: ssl.SSLObject | None = None
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.got = b""

    async def open(self, running: Daemon, data: bytes) -> "Plain":
        """Connect and send a request."""
        await self._loop.sock_connect(self._socket, ("127.0.0.1", running.port))
        if running.tls is None:
            await self._loop.sock_sendall(self._socket, data)
        else:
            self._tls = running.tls.wrap_bio(self._in, self._out, server_hostname="localhost")
            await self._through(self._tls.do_handshake)
            await self._through(lambda: tls.write(data) if (tls := self._tls) else 0)
        return self

    async def _through[T](self, step: Callable[[], T]) -> T:
        """Do a step of TLS, with all that goes to and fro for it."""
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self._loop.sock_sendall(self._socket, self._out.read())
                if not (data := await self._loop.sock_recv(self._socket, 2**16)):
                    raise CutError from None
                self._in.write(data)
            else:
                await self._loop.sock_sendall(self._socket, self._out.read())
                return result

    async def _more(self) -> bytes:
        """What comes; b"" at an orderly end, which over TLS is a close_notify."""
        if self._tls is None:
            return await self._loop.sock_recv(self._socket, 2**16)
        tls = self._tls
        try:
            return await self._through(lambda: tls.read(2**16))
        except ssl.SSLZeroReturnError:
            return b""

    async def until(self, wanted: bytes) -> None:
        """Read until this has come."""
        async with asyncio.timeout(60):
            while wanted not in self.got:
                more = await self._more()
                assert more, self.got
                self.got += more

    async def end(self) -> str:
        """Read on to the end: "orderly", "cut" (over TLS: without its goodbye) or "reset"."""
        try:
            async with asyncio.timeout(60):
                while more := await self._more():
                    self.got += more
        except ConnectionResetError:
            return "reset"
        except CutError:
            return "cut"
        finally:
            self._socket.close()
        return "orderly"


class CutError(Exception):
    """A TLS connection ended as only a broken one does."""


# A cut that only the connection's end can tell

KINDS = {"1.0 chunked": ("1.0", CHUNKED.format("application/json") + PART), "1.0 unframed": ("1.0", UNFRAMED + "hello"),
         "1.1 unframed": ("1.1", UNFRAMED + "hello"), "1.0 events": ("1.0", STREAM + "9\r\ndata: hel\r\n")}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cut_answer_that_only_its_end_frames_ends_in_a_reset(shared: Daemon, tmp_path: Path, kind: str) -> None:
    """The engine breaks off: such a client would take an orderly end for the answer's."""
    version, told = KINDS[kind]
    go = tmp_path / "go"
    fault = body(raw=[told, None], hold=str(go), end="reset")
    client = await Plain().open(shared, request(PATH, fault, version=version))
    await client.until(b"hel")
    go.touch()
    assert await client.end() == "reset"
    assert b"engine_failed" not in client.got


@pytest.mark.parametrize("kind", KINDS)
async def test_a_whole_answer_that_only_its_end_frames_ends_in_order(shared: Daemon, kind: str) -> None:
    """A reset there would be an answer lost; a stream that says itself that it broke has said all there is."""
    version, told = KINDS[kind]
    told = told.replace("9\r\ndata: hel\r\n", "b\r\ndata: hel\n\n\r\n") + ("0\r\n\r\n" if "chunked" in kind else "")
    client = await Plain().open(shared, request(PATH, body(raw=[told], end="close"), version=version))
    assert await client.end() == "orderly"
    assert b"hel" in client.got
    assert (b"engine_failed" in client.got) is (kind == "1.0 events")


async def test_a_whole_answer_to_a_client_that_reads_late_ends_in_order(shared: Daemon) -> None:
    """8 MB wait on the way when the engine is through: all of them come, then an orderly end."""
    size = 2**23
    fault = body(raw=[CHUNKED.format("application/json")], flood=size, end="keep")
    client = await Plain(receive_buffer=4096).open(shared, request(PATH, fault, version="1.0"))
    await client.until(b"\r\n\r\n")
    assert await client.end() == "orderly"
    assert len(client.got.partition(b"\r\n\r\n")[2]) == size


async def test_a_client_that_reads_nothing_gets_a_reset_too(shared: Daemon) -> None:
    """`request_timeout` ends it with megabytes still queued for it."""
    fault = body("hasty", raw=[CHUNKED.format("application/json")], flood=2**26, end="hang")
    client = await Plain(receive_buffer=4096).open(shared, request(PATH, fault, version="1.0"))
    await until(lambda: shared.get("/models/hasty"), lambda found: found["status"]["in_flight"] == 1)
    await until(lambda: shared.get("/models/hasty"), lambda found: found["status"]["in_flight"] == 0)
    assert await client.end() == "reset"
    assert len(client.got) < 2**26


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_that_takes_too_long_is_cut_so_that_it_shows(shared: Daemon, kind: str) -> None:
    """`request_timeout` behind the head."""
    version, told = KINDS[kind]
    fault = body("hasty", raw=[told], end="hang")
    client = await Plain().open(shared, request(PATH, fault, version=version))
    assert await client.end() == "reset"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("over", ["tcp", "tls"])
async def test_a_daemon_that_ends_cuts_so_that_it_shows(
    tmp_path: Path, port_start: int, how: signal.Signals, over: str
) -> None:
    """What is in flight at `shutdown_timeout`, or at a SIGKILL, never looks whole."""
    pair = certificates.make(tmp_path) if over == "tls" else None
    async with daemon(fake_engines(port_start) + MODELS, tmp_path, pair=pair) as running:
        await running.all_ready()
        engine = (await running.pids("chat"))[0], (await running.pids("hasty"))[0]
        clients = [
            await Plain().open(running, request(PATH, body(raw=[told], end="hang"), version=version))
            for version, told in KINDS.values()
        ]
        for client in clients:
            await client.until(b"hel")
        running.process.send_signal(how)
        assert [await client.end() for client in clients] == ["reset"] * len(clients)
        await running.process.wait()
        for pid in engine if how is signal.SIGKILL else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


# Behind [DONE]


@pytest.mark.parametrize(
    "events",
    [["data: [DONE]\n\n", ": a comment\n\n"], [*"data: [DONE]\n\n"], ["data: [DONE]\n\n: ", "x" * 5000, "\n\n"],
     [*"data: [DONE]\r\n\r\n", *": c\n\n"]],
    ids=["comment", "bytewise", "long comment", "bytewise, comment"],
)  # fmt: skip
async def test_behind_done_no_error_event_is_added(shared: Daemon, events: list[str]) -> None:
    """However it was cut into chunks, and whatever follows: the stream is cut."""
    chunks = "".join(f"{len(event):x}\r\n{event}\r\n" for event in events)
    answer = await ask(shared, request(PATH, body(raw=[STREAM, chunks], end="close")))
    assert answer.body.decode() == "".join(events)
    assert not answer.whole


async def test_an_event_that_speaks_of_done_is_not_the_end(shared: Daemon) -> None:
    """The text `data: [DONE]` inside an event is the model's."""
    event = 'data: {"content": "data: [DONE]"}\n\n'
    answer = await ask(shared, request(PATH, body(raw=[STREAM, f"{len(event):x}\r\n{event}\r\n"], end="close")))
    assert answer.whole
    assert b"engine_failed" in answer.body


# Routes beside the usual ones


async def test_a_batch_of_chats_is_answered_by_the_engine(shared: Daemon) -> None:
    """`/v1/chat/completions/batch`: a choice for each conversation, the body's `model` found, an alias replaced."""
    chats = [[{"role": "user", "content": text}] for text in ("one", "two")]
    for name in ("chat", "an-alias"):
        answer = await shared.post("/v1/chat/completions/batch", {"model": name, "messages": chats})
        assert [(choice["index"], choice["message"]["content"]) for choice in answer["choices"]] == [
            (0, "echo: one"), (1, "echo: two"),
        ]  # fmt: skip
    assert (await shared.post("/v1/chat/completions/batch", {}, 400))["error"]["code"] == "missing_model"


async def test_generative_scores_are_the_engines(shared: Daemon) -> None:
    """`/generative_scoring`: a score for each item."""
    asked = {"model": "an-alias", "query": "a", "items": ["b", "c"], "label_token_ids": [1, 2]}
    answer = await shared.post("/generative_scoring", asked)
    assert (answer["model"], [item["index"] for item in answer["data"]]) == ("chat", [0, 1])
    assert (await shared.post("/generative_scoring", asked | {"model": "nobody"}, 404))["error"][
        "code"
    ] == "model_not_found"
