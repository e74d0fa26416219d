"""What the fake reads and says, as values: forms in, completions, vectors and events out."""

import asyncio
import json
import re
from typing import Any


def form(body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    """The fields of a multipart form, the last of a name, as Starlette reads them; `fake` holds JSON."""
    boundary = headers["content-type"].split("boundary=")[1].strip('"').encode()
    fields: dict[str, Any] = {}
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        if name := re.search(rb'name="?(\w+)', head):
            fields[name[1].decode()] = value[:-2].decode(errors="replace")
    return fields | {"fake": json.loads(fields.get("fake", "{}"))}


def as_json(value: object) -> bytes:
    """As vLLM writes it, without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()


def write_event(writer: asyncio.StreamWriter, model: str, **fields: object) -> None:
    """One event in one chunk."""
    value = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": model, **fields}
    data = b"data: " + as_json(value) + b"\n\n"
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


def batch(asked: dict[str, Any]) -> dict[str, Any]:
    """A chat completion with a choice for each conversation."""
    found = [completion({"model": asked["model"], "messages": chat})["choices"][0] for chat in asked["messages"]]
    choices = [choice | {"index": index} for index, choice in enumerate(found)]
    return completion({"model": asked["model"], "messages": [{}]}) | {"choices": choices}


def scores(asked: dict[str, Any]) -> dict[str, Any]:
    """A score for each item."""
    data = [{"object": "score", "index": index, "score": 0.5} for index, _ in enumerate(asked["items"])]
    return {"object": "list", "model": asked["model"], "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def embeddings(asked: dict[str, Any]) -> dict[str, Any]:
    """One small vector."""
    data = [{"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}]
    return {"object": "list", "model": asked["model"], "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
