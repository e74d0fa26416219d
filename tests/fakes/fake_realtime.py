"""The WebSocket `/v1/realtime` of the fake: greets, checks the model, transcribes every appended piece as a word.

Kept from vLLM 0.32: it greets before it knows the model, answers a `session.update` only when it refuses it, and ends a
session that sends bytes. Faults: an event of type "fake" with `close` (a code), `binary` (text) or `die`.
"""

import asyncio
import base64
import hashlib
import json
import os
import struct
from collections.abc import Awaitable, Callable
from typing import Any

_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TEXT, _BINARY, _CLOSE, _PING = 1, 2, 8, 9


async def serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    headers: dict[str, str],
    names: list[str],
    messages: list[str],
    turn: Callable[[], Awaitable[None]],
) -> None:
    """One session, to its end. `messages`: where received ones are noted; `turn`: waits for the engine to work."""
    proof = base64.b64encode(hashlib.sha1((headers["sec-websocket-key"] + _MAGIC).encode()).digest()).decode()
    writer.write(
        f"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: {proof}\r\n\r\n".encode()
    )
    say(writer, type="session.created", id="sess-fake")
    session = Session(writer, names)
    while True:
        kind, data = await frame(reader)
        if kind == _CLOSE:
            messages.append(f"close {struct.unpack('!H', data[:2])[0] if data else None}")
            return send(writer, _CLOSE, data)
        if kind == _BINARY:
            messages.append(f"binary {data.decode()}")
            return send(writer, _CLOSE, struct.pack("!H", 1000))
        if kind == _TEXT:
            messages.append(data.decode())
            event = json.loads(data)
            if event["type"] == "fake" and fault(writer, event):
                return None
            await turn()
            session.handle(event)


class Session:
    """What vLLM knows of a session."""

    def __init__(self, writer: asyncio.StreamWriter, names: list[str]) -> None:
        self.writer = writer
        self.names = names
        self.checked = False
        self.words = 0

    def handle(self, event: dict[str, Any]) -> None:
        """One event of the client."""
        kind = event["type"]
        if kind == "session.update":
            self.checked = event.get("model") in self.names
            if not self.checked:
                say(self.writer, type="error", error="no such model", code="model_not_found")
        elif kind == "input_audio_buffer.append":
            self.words += 1
        elif kind == "input_audio_buffer.commit" and self.checked:
            for _ in range(self.words):
                say(self.writer, type="transcription.delta", delta="word ")
            usage = {"prompt_tokens": 10 * self.words, "completion_tokens": self.words, "prompt_tokens_details": None}
            usage["total_tokens"] = 11 * self.words
            say(self.writer, type="transcription.done", text="word " * self.words, usage=usage)
        elif kind != "fake":
            say(self.writer, type="error", error="no", code="unknown_event" if self.checked else "model_not_validated")


def fault(writer: asyncio.StreamWriter, event: dict[str, Any]) -> bool:
    """Do what a "fake" event asks for; whether the session is over."""
    if event.get("die"):
        os._exit(0)
    if "binary" in event:
        send(writer, _BINARY, event["binary"].encode())
    if "close" in event:
        send(writer, _CLOSE, struct.pack("!H", event["close"]))
    if event.get("cut"):
        writer.transport.abort()
    return "close" in event or "cut" in event


def say(writer: asyncio.StreamWriter, **event: object) -> None:
    """One event."""
    send(writer, _TEXT, json.dumps(event).encode())


def send(writer: asyncio.StreamWriter, kind: int, data: bytes) -> None:
    """One frame, unmasked as servers' are."""
    size = bytes([len(data)]) if len(data) < 126 else b"\x7e" + struct.pack("!H", len(data))
    writer.write(bytes([0x80 | kind]) + size + data)


async def frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One frame, masked as clients' are."""
    first, second = await reader.readexactly(2)
    size = second & 0x7F
    if size == 126:
        (size,) = struct.unpack("!H", await reader.readexactly(2))
    elif size == 127:
        (size,) = struct.unpack("!Q", await reader.readexactly(8))
    mask = await reader.readexactly(4)
    data = await reader.readexactly(size)
    return first & 0x0F, bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
