"""A program that behaves as `vllm serve` 0.32 does towards a supervisor and a proxy, without a model.

Kept from the real one: it binds at once and listens late; its engine core is a process of its own that survives a
SIGKILL of the server; `/health` says little; `/v1` wants the key of VLLM_API_KEY; SIGTERM freezes streams and then
waits without limit for open connections; exit codes (0 when its engine dies, 1 on a failed start, 2 on bad options); a
request whose client has left is given up at once.
Faults: by `--fake-...` options at start, and by a `"fake"` object in a request's body (a form:
a field with JSON), whose keys `pause`, `stream` and `raw` explain. What it saw of each request is told at `/fake/seen`.
"""

import argparse
import asyncio
import collections
import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any, NoReturn

import fake_answers  # type: ignore[import-not-found] # beside this script
import fake_realtime  # type: ignore[import-not-found] # as above

KEEPALIVE = float(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5"))


def parse() -> argparse.Namespace:
    """The options of the real program that the daemon uses, and the faults."""
    parser = argparse.ArgumentParser(prog="vllm serve")
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", nargs="+", required=True)
    parser.add_argument("--shutdown-timeout", type=int, default=0)
    parser.add_argument("--disable-access-log-for-endpoints")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--tensor-parallel-size", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--trust-remote-code", action=argparse.BooleanOptionalAction)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    parser.add_argument("--hf-overrides", type=json.loads)
    parser.add_argument("--fake-load-seconds", type=float, default=0.0, help="between bind and listen")
    parser.add_argument("--fake-load-until", help="listen once this file exists")
    parser.add_argument("--fake-exit-at", choices=["import", "load"], help="end there")
    parser.add_argument("--fake-exit-code", type=int, default=1)
    parser.add_argument("--fake-exit-text", default="RuntimeError: Engine core initialization failed.")
    parser.add_argument("--fake-unhealthy", action="store_true", help="/health answers 503")
    parser.add_argument("--fake-foreign", action="store_true", help="lists other names than asked for")
    parser.add_argument("--fake-ignore-sigterm", action="store_true")
    return parser.parse_args(sys.argv[2:] if sys.argv[1:2] == ["serve"] else sys.argv[1:])


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

    def __init__(self, options: argparse.Namespace, core: "subprocess.Popen[bytes]") -> None:
        self.options = options
        self.core = core
        self.frozen = asyncio.Event()
        self.stopping = asyncio.Event()
        self.connections: set[asyncio.StreamWriter] = set()
        self.key = os.environ.get("VLLM_API_KEY")
        self.seen: collections.deque[dict[str, Any]] = collections.deque(maxlen=1000)
        self.responses: list[str] = []
        self.server: asyncio.Server | None = None

    async def serve(self, listener: socket.socket) -> None:
        """Listen until SIGTERM, then wait for every connection, without limit, as uvicorn does."""
        loop = asyncio.get_running_loop()
        if not self.options.fake_ignore_sigterm:
            loop.add_signal_handler(signal.SIGTERM, self.stopping.set)
        server = self.server = await loop.create_server(
            lambda: asyncio.StreamReaderProtocol(Reader(), self.connection), sock=listener
        )
        print("INFO:     Application startup complete.", file=sys.stderr)
        await self.stopping.wait()
        if not self.options.shutdown_timeout:
            self.frozen.set()
        self.core.kill()
        self.core.wait()
        server.close()
        for writer in [writer for writer in self.connections if getattr(writer, "idle", True)]:
            writer.close()
        print("INFO:     Waiting for connections to close. (CTRL+C to force quit)", file=sys.stderr)
        while self.connections:
            await asyncio.sleep(0.01)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests of one connection, one after another."""
        assert isinstance(reader, Reader)
        self.connections.add(writer)
        try:
            while not self.stopping.is_set() and not writer.is_closing():
                writer.idle = True  # type: ignore[attr-defined]
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), KEEPALIVE)
                writer.idle = False  # type: ignore[attr-defined]
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
            "pid": os.getpid(), "messages": [],
        }  # fmt: skip
        if not path.startswith("/fake/"):
            self.seen.append(seen)
        return seen

    async def unless_gone(self, reader: Reader, answer: Any, seen: dict[str, Any]) -> None:  # noqa: ANN401 - a coroutine
        """Answer; give up where the client leaves before the end."""
        answering, gone = asyncio.ensure_future(answer), asyncio.ensure_future(reader.gone.wait())
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if answering.done():
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
        await fake_realtime.serve(reader, writer, found, self.options.served_model_name, seen["messages"])
        seen["state"] = "gone"

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
            return await self.send(writer, 503 if self.options.fake_unhealthy else 200, b"", "text/plain")
        if path.startswith("/fake/"):
            return await self.control(writer, path)
        if not self.allowed(path, found):
            return await self.json(writer, 401, {"error": "Unauthorized"})
        if path == "/v1/models":
            length, names = self.options.max_model_len, self.names
            cards = [{"id": name, "object": "model", "owned_by": "vllm", "max_model_len": length} for name in names]
            return await self.json(writer, 200, {"object": "list", "data": cards})
        if path == "/secret":
            return await self.json(writer, 200, {"secret": True})
        if method == "HEAD":  # FastAPI gives its GET routes none
            writer.write(b"HTTP/1.1 405 X\r\nserver: uvicorn\r\nallow: GET\r\ncontent-length: 31\r\n\r\n")
            return await writer.drain()
        if stored := re.fullmatch(r"/v1/responses/([^/]+)(/cancel)?", path):
            known = stored[1] in self.responses
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
        except ValueError:
            return await self.json(writer, 400, {"error": {"message": "bad json"}})
        if asked.get("model") not in self.names:
            message = f"The model `{asked.get('model')}` does not exist."
            error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
            return await self.json(writer, 404, {"error": error})
        fault = asked.get("fake") or {}
        if "once" in fault and not fake_answers.first(fault["once"]):
            fault = {}
        if fault.get("echo"):
            text = body.decode(errors="replace")
            seen = {"method": method, "path": path, "headers": headers, "body": text, "pid": os.getpid()}
            return await self.json(writer, 200, seen)
        if "raw" in fault:
            return await self.raw(writer, fault)
        if path == "/v1/responses":
            self.responses.append(f"resp_{os.getpid()}_{len(self.responses)}")
            return await self.json(writer, 200, {"id": self.responses[-1], "object": "response"})
        if path == "/v1/embeddings":
            return await self.json(writer, 200, fake_answers.embeddings(asked))
        if asked.get("stream"):
            return await self.stream(writer, asked, fault)
        await self.pause(fault)
        return await self.json(writer, fault.get("status", 200), fake_answers.completion(asked))

    async def control(self, writer: asyncio.StreamWriter, path: str) -> None:
        """What only tests ask for, on the engine's own port."""
        if path in {"/fake/deaf", "/fake/hang-up"}:  # the process lives, its connections, or also its port, do not
            for other in self.connections - {writer}:
                other.close()
            if path == "/fake/deaf" and self.server is not None:
                self.server.close()
            await self.json(writer, 200, {})
            return writer.close()
        return await self.json(writer, 200, list(self.seen))

    async def raw(self, writer: asyncio.StreamWriter, fault: dict[str, Any]) -> None:
        """The very bytes in `raw`, null standing for a wait until the file `hold` exists; `flood` bytes in chunks.

        Then `end`: "keep" the connection, "close" it, "reset" it or "hang".
        """
        for piece in fault["raw"]:
            if piece is None:
                await self.hold(fault)
            else:
                await self.write(writer, piece.encode("latin-1"))
        for start in range(0, fault.get("flood", 0), 2**16):
            size = min(2**16, fault["flood"] - start)
            await self.write(writer, b"%x\r\n" % size + bytes([65 + start // 2**16 % 26]) * size + b"\r\n")
        if fault.get("flood"):
            await self.write(writer, b"0\r\n\r\n")
        end = fault.get("end", "close")
        if end == "hang":
            await asyncio.Event().wait()
        elif end == "reset":
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        elif end == "close":
            writer.close()

    async def write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Bytes of an answer, counted once the system has taken them."""
        writer.write(data)
        await writer.drain()
        writer.seen["written"] += len(data)  # type: ignore[attr-defined]

    async def hold(self, fault: dict[str, Any]) -> None:
        """Wait until the test says so by a file."""
        while not os.path.exists(fault["hold"]):  # noqa: PTH110 - imports nothing
            await asyncio.sleep(0.01)

    async def pause(self, fault: dict[str, Any]) -> None:
        """Before the first byte: `die` or `hang` there ("before"), or wait until the file `hold` exists."""
        if "hold" in fault:
            await self.hold(fault)
        if fault.get("die") == "before":
            die()
        if fault.get("hang") == "before":
            await asyncio.Event().wait()

    async def stream(self, writer: asyncio.StreamWriter, asked: dict[str, Any], fault: dict[str, Any]) -> None:
        """Server-sent events: `chunks` of them, `interval` seconds apart; `die` or `hang` after that many."""
        await self.pause(fault)
        head = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        count = fault.get("chunks", 5)
        for number in range(count):
            if self.frozen.is_set() or fault.get("hang") == number:
                await writer.drain()
                await asyncio.Event().wait()
            if fault.get("die") == number:
                await writer.drain()
                die()
            fake_answers.write_event(
                writer, asked["model"], choices=[{"index": 0, "delta": {"content": f"t{number} "}}]
            )
            await writer.drain()
            await asyncio.sleep(fault.get("interval", 0))
        usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
        fake_answers.write_event(writer, asked["model"], choices=[], usage=usage)
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()

    async def json(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        """A JSON answer."""
        await self.send(writer, status, json.dumps(value).encode(), "application/json")

    async def send(self, writer: asyncio.StreamWriter, status: int, body: bytes, kind: str) -> None:
        """A whole answer."""
        head = f"HTTP/1.1 {status} X\r\nserver: uvicorn\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()


def die() -> NoReturn:
    """The engine core died: vLLM's server ends with exit code 0."""
    print("ERROR: EngineCore encountered a fatal error.", flush=True)
    os._exit(0)


def fail(options: argparse.Namespace) -> NoReturn:
    """End as a failed start does."""
    print(options.fake_exit_text, file=sys.stderr, flush=True)
    os._exit(options.fake_exit_code)


def main() -> None:
    """Bind, load, listen."""
    options = parse()
    if options.fake_exit_at == "import":
        fail(options)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((options.host or "0.0.0.0", options.port))
    core = subprocess.Popen(["sleep", "100000"])  # VLLM::EngineCore: nothing tells it when its parent dies
    print("INFO: Initializing a V1 LLM engine", flush=True)
    time.sleep(options.fake_load_seconds)
    while options.fake_load_until and not os.path.exists(options.fake_load_until):  # noqa: PTH110 - imports nothing
        time.sleep(0.01)
    if options.fake_exit_at == "load":
        core.kill()
        core.wait()
        fail(options)
    asyncio.run(Fake(options, core).serve(listener))


if __name__ == "__main__":
    main()
