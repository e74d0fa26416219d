"""The HTTP server of the fake: requests in, answers and faults out. What it saw is told at `/fake/seen`."""

import argparse
import asyncio
import collections
import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
from typing import Any, NoReturn

import fake_answers  # type: ignore[import-not-found] # beside this script
import fake_engine  # type: ignore[import-not-found] # as above
import fake_log  # type: ignore[import-not-found] # as above
import fake_lora  # type: ignore[import-not-found] # as above
import fake_realtime  # type: ignore[import-not-found] # as above
import fake_sleep  # type: ignore[import-not-found] # as above
import fake_start  # type: ignore[import-not-found] # as above
import fake_work  # type: ignore[import-not-found] # as above

KEEPALIVE = float(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5"))


class Reader(asyncio.StreamReader):
    """A connection's input, which also says when the other side has gone."""

    def __init__(self) -> None:
        super().__init__(limit=2**26)
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        """An orderly end."""
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        """A reset."""
        super().set_exception(exc)
        self.gone.set()


class Fake:
    """The server."""

    def __init__(self, start: fake_start.Start) -> None:
        self.start = start
        self.log: fake_log.Log = start.log
        self.options: argparse.Namespace = start.options
        self.engine = fake_engine.Engine(start.options, start.core, start.log)
        self.sleep = fake_sleep.Sleep(start.options, self.engine, start.memory, start.log)
        self.lora = fake_lora.Lora(start.options, self.engine, self.lose_core)
        self.sleep.forget_devices = self.lora.slept
        self.work = fake_work.Work(self.engine, self.sleep, self.lora, start.log, start.options.fake_guard)
        self.develops = bool(int(os.environ.get("VLLM_SERVER_DEV_MODE", "0")))
        self.stopping = asyncio.Event()
        self.connections: set[asyncio.StreamWriter] = set()
        self.key = os.environ.get("VLLM_API_KEY")
        self.seen: collections.deque[dict[str, Any]] = collections.deque(maxlen=1000)
        self.server: asyncio.Server | None = None

    async def serve(self, listener: socket.socket) -> None:
        """Listen until SIGTERM, then wait for every connection, without limit, as uvicorn does."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self.engine.core_changed)
        if not self.options.fake_ignore_sigterm:
            loop.add_signal_handler(signal.SIGTERM, self.stopping.set)
            loop.add_signal_handler(signal.SIGINT, self.stopping.set)
        self.engine.core_changed()  # perhaps before anybody was told
        self.log.opening("listen")
        server = self.server = await loop.create_server(
            lambda: asyncio.StreamReaderProtocol(Reader(), self.connection), sock=listener
        )
        self.engine.listens_at = time.time()
        self.start.faults("listen")
        if self.options.fake_flood:
            threading.Thread(target=fake_log.flood, args=[self.options.fake_flood], daemon=True).start()
        await self.stopping.wait()
        self.log.stopping(self.options.shutdown_timeout)
        self.engine.stop()
        server.close()
        for writer in [writer for writer in self.connections if getattr(writer, "idle", True)]:
            writer.close()
        if self.connections:
            self.log.waiting()
        while self.connections:
            await asyncio.sleep(0.01)
        self.log.ended()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests of one connection, one after another."""
        assert isinstance(reader, Reader)
        self.connections.add(writer)
        try:
            while not self.stopping.is_set() and not writer.is_closing():
                writer.idle = True  # type: ignore[attr-defined]
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), KEEPALIVE)
                writer.idle = writer.begun = False  # type: ignore[attr-defined]
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = [tuple(line.split(": ", 1)) for line in lines[1:] if line]
                found = {name.lower(): value for name, value in headers}
                body = await self.body(reader, found)
                seen = self.note(method, path, headers, body)
                writer.seen = seen  # type: ignore[attr-defined]
                if path == "/v1/realtime" and "upgrade" in found and self.allowed(path, found):
                    return await self.realtime(reader, writer, found, seen)
                await self.unless_gone(reader, self.answer(writer, method, path, headers, found, body), seen)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.connections.discard(writer)
            writer.close()

    def note(self, method: str, path: str, headers: list[Any], body: bytes) -> dict[str, Any]:
        """Remember a request. Its `state` becomes "answered" or "gone", the client having left before that."""
        seen: dict[str, Any] = {
            "method": method, "path": path, "headers": headers, "size": len(body), "state": "open", "written": 0,
            "body": body.decode("latin-1") if len(body) < 2**18 else None, "sha256": hashlib.sha256(body).hexdigest(),
            "pid": os.getpid(), "messages": [], "began": time.time(), "ended": None,
        }  # fmt: skip
        if not path.startswith("/fake/") and not fake_answers.asks_for_tasks(method, path):
            self.seen.append(seen)
        return seen

    async def unless_gone(self, reader: Reader, answer: Any, seen: dict[str, Any]) -> None:  # noqa: ANN401 - a coroutine
        """Answer; give up where the client leaves before the end."""
        answering, gone = asyncio.ensure_future(answer), asyncio.ensure_future(reader.gone.wait())
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if answering.done():
            seen["ended"] = time.time()
            seen["state"] = "gone" if isinstance(answering.exception(), ConnectionError) else "answered"
            answering.result()
            return
        seen["state"] = "gone"
        answering.cancel()
        raise ConnectionResetError("the client has left")

    async def realtime(
        self, reader: Reader, writer: asyncio.StreamWriter, found: dict[str, str], seen: dict[str, Any]
    ) -> None:
        """A WebSocket session."""
        await fake_realtime.serve(reader, writer, found, self.names, seen["messages"], self.turn)
        seen["state"] = "gone"

    async def turn(self) -> None:
        """One step of a session, which is new to the scheduler each time."""
        await self.engine.turn(first=True)

    def allowed(self, path: str, found: dict[str, str]) -> bool:
        """Whether the request carries the key that `/v1` wants."""
        return not (path.startswith("/v1") and self.key and found.get("authorization") != f"Bearer {self.key}")

    async def body(self, reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
        """The request's body, whole."""
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await reader.readexactly(int(headers.get("content-length", 0)))
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return body

    async def answer(
        self,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        headers: list[Any],
        found: dict[str, str],
        body: bytes,
    ) -> None:
        """Route one request."""
        if path == "/health":
            return await self.send(writer, 503 if self.engine.sick else 200, b"", "text/plain")
        if path.startswith("/fake/"):
            return await self.control(writer, path)
        if path == "/metrics":
            return await self.send(writer, 200, self.engine.metrics().encode(), "text/plain; version=1.0.0")
        if path.partition("?")[0] in fake_sleep.ROUTES:
            return await self.develop(writer, method, path, body)
        if (status := fake_answers.status_of(self.options.fake_tasks, method, path)) != 200:
            said = "Not Found" if status == 404 else "Method Not Allowed"
            return await self.json(writer, status, {"detail": said})
        if not self.allowed(path, found):
            return await self.json(writer, 401, {"error": "Unauthorized"})
        return await self.guarded(writer, method, path, headers, found, body)

    async def guarded(
        self,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        headers: list[Any],
        found: dict[str, str],
        body: bytes,
    ) -> None:
        """Route one request that carries the key, if it has to."""
        if path == "/v1/models":
            card = {"object": "model", "owned_by": "vllm", "root": self.options.model, "parent": None}
            card["max_model_len"] = self.options.max_model_len
            cards = [{"id": name, **card} for name in self.names] + self.lora.cards()
            return await self.json(writer, 200, {"object": "list", "data": cards})
        if path in fake_lora.ROUTES:
            return await self.adapt(writer, path, body)
        if path == "/secret":
            return await self.json(writer, 200, {"secret": True})
        if method == "HEAD":  # FastAPI gives its GET routes none
            writer.write(b"HTTP/1.1 405 X\r\nserver: uvicorn\r\nallow: GET\r\ncontent-length: 31\r\n\r\n")
            return await writer.drain()
        if path.partition("?")[0] == "/tokenizer_info":
            if self.options.enable_tokenizer_info_endpoint:
                return await self.json(writer, 200, {"tokenizer_class": "FakeTokenizer"})
            return await self.json(writer, 404, {"detail": "Not Found"})
        if stored := re.fullmatch(r"/v1/responses/([^/]+)(/cancel)?", path):
            known = stored[1] in self.work.responses
            answer = {"id": stored[1], "status": "cancelled" if stored[2] else "completed", "pid": os.getpid()}
            return await self.json(writer, 200 if known else 404, answer if known else {"error": {"message": "?"}})
        return await self.infer(writer, method, path, headers, found, body)

    @property
    def names(self) -> list[str]:
        """The models that it says it serves."""
        return ["somebody-else"] if self.options.fake_foreign else self.options.served_model_name

    async def infer(
        self,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        headers: list[Any],
        found: dict[str, str],
        body: bytes,
    ) -> None:
        """A request that names a model."""
        try:
            asked = fake_answers.form(body, found) if "multipart" in found.get("content-type", "") else json.loads(body)
        except (IndexError, KeyError, ValueError):
            return await self.json(writer, 400, {"error": {"message": "bad json"}})
        if not isinstance(asked, dict):
            return await self.json(writer, 400, {"error": {"message": "no object"}})
        adapter = self.lora.listed.get(str(asked.get("model")))
        if adapter is None and asked.get("model") not in self.names:
            message = f"The model `{asked.get('model')}` does not exist."
            error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
            return await self.json(writer, 404, {"error": error})
        with self.engine.request() as request:
            try:
                await self.engine.admit(request)
                if not self.sleep.usable or not (adapter is None or self.lora.use(adapter)):
                    return await self.lose(writer)
                await self.work.answer(writer, method, path, headers, body, asked, adapter)
            except (AttributeError, IndexError, KeyError, TypeError) as error:  # what vLLM validates
                return await self.json(writer, 400, {"error": {"message": repr(error), "code": 400}})
            except asyncio.CancelledError:
                if not request.ended or request.task is None:
                    raise
                request.task.uncancel()
                await self.work.abort(writer, asked, path)
        return None

    async def lose(self, writer: asyncio.StreamWriter) -> None:
        """A step finds memory that is not mapped: the core dies of it, and the server ends."""
        error = {"message": fake_log.DEAD, "type": "InternalServerError", "param": None, "code": 500}
        await self.json(writer, 500, {"error": error})
        self.engine.control("die")

    def lose_core(self) -> None:
        """The core dies; the server notices by itself."""
        self.engine.control("lose-core")

    async def adapt(self, writer: asyncio.StreamWriter, path: str, body: bytes) -> None:
        """A route that loads or unloads an adapter."""
        if not self.lora.updates:
            return await self.json(writer, 404, {"detail": "Not Found"})
        status, value = await self.lora.answer(path, body)
        if isinstance(value, str):  # vLLM gives it no type
            return await self.send(writer, status, value.encode(), "text/plain")
        return await self.json(writer, status, value)

    async def develop(self, writer: asyncio.StreamWriter, method: str, path: str, body: bytes) -> None:
        """A route of the development mode. What fails there closes the connection, as uvicorn does."""
        if not self.develops:
            return await self.json(writer, 404, {"detail": "Not Found"})
        status, value = await self.sleep.answer(method, path, body)
        await self.json(writer, status, value)
        if status == 500:
            writer.close()
        return None

    async def control(self, writer: asyncio.StreamWriter, path: str) -> None:
        """What only tests ask for, on the engine's own port: fake_engine's `control`, and what follows.

        `/fake/seen` tells of the requests, `/fake/state` of the processes, `/fake/lora` of adapters, and its query asks
        for their faults; `/fake/hang-up` closes every connection, `/fake/stop-listening` the port as well, while the
        process lives.
        """
        command = path.removeprefix("/fake/")
        if command in {"stop-listening", "hang-up"}:
            for other in self.connections - {writer}:
                other.close()
            if command == "stop-listening" and self.server is not None:
                self.server.close()
            await self.json(writer, 200, {})
            return writer.close()
        if command.partition("?")[0] == "lora":
            return await self.json(writer, 200, self.lora.control(command.partition("?")[2]))
        if command == "state":
            return await self.json(writer, 200, self.engine.state() | self.sleep.state())
        if command in fake_engine.COMMANDS:
            if command not in fake_engine.FATAL:
                self.engine.control(command)
            await self.json(writer, 200, {})
            if command in fake_engine.FATAL:
                self.engine.control(command)
            return None
        return await self.json(writer, 200, list(self.seen))

    async def json(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        """A JSON answer."""
        await fake_answers.send_json(writer, status, value)

    async def send(self, writer: asyncio.StreamWriter, status: int, body: bytes, kind: str) -> None:
        """A whole answer."""
        await fake_answers.send(writer, status, body, kind)


def run(start: fake_start.Start, listener: socket.socket) -> NoReturn:
    """Serve to the end."""
    asyncio.run(Fake(start).serve(listener))
    os._exit(0)
