"""A program that behaves as `vllm serve` 0.32 does towards a supervisor and a proxy, without a model.

Kept from the real one: it binds at once and listens late; its engine core is a process of its own that survives a
SIGKILL of the server; `/health` says little; `/v1` wants the key of VLLM_API_KEY; SIGTERM freezes streams and then
waits without limit for open connections; exit codes (0 when its engine dies, 1 on a failed start, 2 on bad options).
Faults: by `--fake-...` options at start, and by a `"fake"` object in a request's body.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NoReturn

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


class Fake:
    """The server."""

    def __init__(self, options: argparse.Namespace, core: "subprocess.Popen[bytes]") -> None:
        self.options = options
        self.core = core
        self.frozen = asyncio.Event()
        self.stopping = asyncio.Event()
        self.connections: set[asyncio.StreamWriter] = set()
        self.key = os.environ.get("VLLM_API_KEY")

    async def serve(self, listener: socket.socket) -> None:
        """Listen until SIGTERM, then wait for every connection, without limit, as uvicorn does."""
        loop = asyncio.get_running_loop()
        if not self.options.fake_ignore_sigterm:
            loop.add_signal_handler(signal.SIGTERM, self.stopping.set)
        server = await asyncio.start_server(self.connection, sock=listener, limit=2**26)
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
        self.connections.add(writer)
        try:
            while not self.stopping.is_set():
                writer.idle = True  # type: ignore[attr-defined]
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), KEEPALIVE)
                writer.idle = False  # type: ignore[attr-defined]
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = [tuple(line.split(": ", 1)) for line in lines[1:] if line]
                found = {name.lower(): value for name, value in headers}
                body = await self.body(reader, found)
                await self.answer(writer, method, path, headers, found, body)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.connections.discard(writer)
            writer.close()

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
        names = ["somebody-else"] if self.options.fake_foreign else self.options.served_model_name
        if path == "/health":
            return await self.send(writer, 503 if self.options.fake_unhealthy else 200, b"", "text/plain")
        if path.startswith("/v1") and self.key and found.get("authorization") != f"Bearer {self.key}":
            return await self.json(writer, 401, {"error": "Unauthorized"})
        if path == "/v1/models":
            length = self.options.max_model_len
            cards = [{"id": name, "object": "model", "owned_by": "vllm", "max_model_len": length} for name in names]
            return await self.json(writer, 200, {"object": "list", "data": cards})
        if path == "/secret":
            return await self.json(writer, 200, {"secret": True})
        try:
            asked = json.loads(body)
        except ValueError:
            return await self.json(writer, 400, {"error": {"message": "bad json"}})
        if asked.get("model") not in names:
            message = f"The model `{asked.get('model')}` does not exist."
            error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
            return await self.json(writer, 404, {"error": error})
        fault = asked.get("fake") or {}
        if fault.get("echo"):
            seen = {"method": method, "path": path, "headers": headers, "body": body.decode(), "pid": os.getpid()}
            return await self.json(writer, 200, seen)
        if path == "/v1/embeddings":
            return await self.json(writer, 200, embeddings(asked))
        if asked.get("stream"):
            return await self.stream(writer, asked, fault)
        await self.pause(fault)
        return await self.json(writer, fault.get("status", 200), completion(asked))

    async def pause(self, fault: dict[str, Any]) -> None:
        """Hang or die before the first byte, where asked to."""
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
            write_event(writer, asked["model"], choices=[{"index": 0, "delta": {"content": f"t{number} "}}])
            await writer.drain()
            await asyncio.sleep(fault.get("interval", 0))
        usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
        write_event(writer, asked["model"], choices=[], usage=usage)
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


def write_event(writer: asyncio.StreamWriter, model: str, **fields: object) -> None:
    """One event in one chunk."""
    value = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": model, **fields}
    data = f"data: {json.dumps(value)}\n\n".encode()
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def completion(asked: dict[str, Any]) -> dict[str, Any]:
    """A chat or text completion that says how many messages there were."""
    text = "echo: " + str(asked.get("messages", [{}])[-1].get("content", asked.get("prompt")))
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 1,
        "model": asked["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def embeddings(asked: dict[str, Any]) -> dict[str, Any]:
    """One small vector."""
    data = [{"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}]
    return {"object": "list", "model": asked["model"], "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


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
