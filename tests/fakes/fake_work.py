"""How the fake answers a request that is in its engine: whole or as a stream, with the faults that it asks for."""

import asyncio
import os
import socket
import struct
from typing import Any, NoReturn

import fake_answers  # type: ignore[import-not-found] # beside this script
import fake_engine  # type: ignore[import-not-found] # as above
import fake_guard  # type: ignore[import-not-found] # as above
import fake_log  # type: ignore[import-not-found] # as above
import fake_lora  # type: ignore[import-not-found] # as above
import fake_options  # type: ignore[import-not-found] # as above
import fake_sleep  # type: ignore[import-not-found] # as above

_ANSWERS = {
    "/v1/embeddings": fake_answers.embeddings,
    "/v1/rerank": fake_answers.ranking,
    "/v1/chat/completions/batch": fake_answers.batch,
    "/generative_scoring": fake_answers.scores,
}


class Work:
    """The answers of one engine."""

    def __init__(
        self,
        engine: fake_engine.Engine,
        sleep: fake_sleep.Sleep,
        lora: fake_lora.Lora,
        log: fake_log.Log,
        guard: str | None,
    ) -> None:
        """`guard`: which kind of guard it is, if any."""
        self.engine, self.sleep, self.lora, self.log, self.guard = engine, sleep, lora, log, guard
        self.responses: list[str] = []  # ids

    async def answer(
        self,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        headers: list[Any],
        body: bytes,
        asked: dict[str, Any],
        adapter: fake_lora.Adapter | None = None,
    ) -> None:
        """A request that is in the engine. `adapter`: the one that answers it."""
        fault = asked.get("fake") or {}
        if "once" in fault and not fake_options.first(fault["once"]):
            fault = {}
        if fault.get("echo"):
            text = body.decode(errors="replace")
            seen = {"method": method, "path": path, "headers": headers, "body": text, "pid": os.getpid()}
            return await self.json(writer, 200, seen)
        if self.guard:
            return await self.judge(writer, asked, path)
        if "raw" in fault:
            return await self.raw(writer, fault)
        if path == "/v1/responses":
            self.responses.append(f"resp_{os.getpid()}_{len(self.responses)}")
            return await self.json(writer, 200, {"id": self.responses[-1], "object": "response"})
        if answer := _ANSWERS.get(path):
            return await self.json(writer, 200, self.told(answer(asked)))
        if asked.get("stream"):
            return await self.stream(writer, asked, fault, adapter)
        await self.pause(fault)
        await self.step(adapter)
        answer = fake_answers.completion(asked, path, self.lora.said(adapter))
        return await self.json(writer, fault.get("status", 200), self.told(answer))

    async def judge(self, writer: asyncio.StreamWriter, asked: dict[str, Any], path: str) -> None:
        """The verdict of a guard."""
        fault, value = fake_guard.fault_of(fake_guard.text_of(asked))
        if fault == "hold":
            await self.hold({"hold": value})
        if fault == "die" or (fault == "once" and fake_options.first(value)):
            self.die()
        await self.step()
        status, answer = fake_guard.refusal(fault) or (200, fake_guard.verdict(self.guard, asked, path))
        return await self.json(writer, status, answer)

    def told(self, answer: dict[str, Any]) -> dict[str, Any]:
        """What its weights make of an answer."""
        return fake_answers.garbled(answer) if self.sleep.lost else answer

    async def raw(self, writer: asyncio.StreamWriter, fault: dict[str, Any]) -> None:
        """The very bytes in `raw`, null standing for a wait until the file `hold` exists; `flood` bytes in chunks.

        Then `end`: "keep" the connection, "close" it, "reset" it or "hang".
        """
        for piece in fault["raw"]:
            if piece is None:
                await self.hold(fault)
            else:
                await self.step()
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

    async def step(self, adapter: fake_lora.Adapter | None = None) -> None:
        """One token. Without its memory, or its adapter's files, it is the end of the engine."""
        await self.engine.turn(generated=1)
        if not self.sleep.usable or not (adapter is None or self.lora.use(adapter)):
            self.engine.control("die")

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
        if "hold" in fault and "hold_at" not in fault:
            await self.hold(fault)
        if fault.get("die") == "before":
            self.die()
        if fault.get("hang") == "before":
            await asyncio.Event().wait()

    async def stream(
        self,
        writer: asyncio.StreamWriter,
        asked: dict[str, Any],
        fault: dict[str, Any],
        adapter: fake_lora.Adapter | None = None,
    ) -> None:
        """Server-sent events: `chunks` of them, `interval` seconds apart; `die`, `hang` or `hold` after that many."""
        await self.pause(fault)
        self.begin(writer)
        count = fault.get("chunks", 5)
        for number in range(count):
            if fault.get("hang") == number:
                await writer.drain()
                await asyncio.Event().wait()
            if fault.get("hold_at") == number:
                await writer.drain()
                await self.hold(fault)
            if fault.get("die") == number:
                await writer.drain()
                self.die()
            await self.step(adapter)
            text = fake_answers.GARBAGE if self.sleep.lost else f"{self.lora.said(adapter)}t{number} "
            fake_answers.write_event(writer, asked["model"], choices=[{"index": 0, "delta": {"content": text}}])
            await writer.drain()
            await asyncio.sleep(fault.get("interval", 0))
        if (asked.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
            fake_answers.write_event(writer, asked["model"], choices=[], usage=usage)
        await self.end(writer)

    def begin(self, writer: asyncio.StreamWriter) -> None:
        """The head of a stream."""
        writer.begun = True  # type: ignore[attr-defined]
        head = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())

    async def end(self, writer: asyncio.StreamWriter) -> None:
        """The end of a stream."""
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()

    def die(self) -> NoReturn:
        """The engine says that it is dead, though its process is still there: exit code 0."""
        self.log.core_died()
        os._exit(0)

    async def abort(self, writer: asyncio.StreamWriter, asked: dict[str, Any], path: str) -> None:
        """End an answer where it is, as whole as vLLM makes it."""
        if "raw" in (asked.get("fake") or {}):
            return writer.close()
        if not asked.get("stream"):
            return await self.json(writer, 200, fake_answers.cut(fake_answers.completion(asked, path)))
        if writer.begun:  # type: ignore[attr-defined]
            choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "abort"}
        else:  # before its first token no end is told
            choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            self.begin(writer)
        fake_answers.write_event(writer, asked["model"], choices=[choice])
        return await self.end(writer)

    async def json(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        """A JSON answer."""
        await fake_answers.send_json(writer, status, value)
