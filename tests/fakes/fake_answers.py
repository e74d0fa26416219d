"""What the fake reads and says, as values: forms in, completions, vectors and events out."""

import asyncio
import json
import re
from typing import Any

GARBAGE = "!!!!"  # of weights that hold nothing: always the first token

# Routes that only a model with this task has, as far as the fake answers them.
TASKS = {
    "generate": ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
    "embed": ("/v1/embeddings", "/v2/embed"),
}
_COMPACT = (",", ":")  # as vLLM writes JSON


def asks_for_tasks(method: str, path: str) -> bool:
    """Whether this is the daemon's question which routes there are."""
    return method == "GET" and path in {"/v1/completions", "/v1/embeddings", "/classify", "/v1/score",
                                        "/v1/audio/transcriptions"}  # fmt: skip


def status_of(tasks: list[str] | None, method: str, path: str) -> int:
    """What a model with these tasks says before it looks at the body: 404 without such a route. None: of all tasks."""
    path = path.partition("?")[0]
    if tasks is None:
        return 200
    if any(path in routes for task, routes in TASKS.items() if task in tasks):
        return 405 if method == "GET" else 200
    return 404 if asks_for_tasks(method, path) or any(path in routes for routes in TASKS.values()) else 200


def form(body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    """The fields of a multipart form, the last of a name, as Starlette reads them; `fake` holds JSON."""
    boundary = headers["content-type"].split("boundary=")[1].strip('"').encode()
    fields: dict[str, Any] = {}
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        if name := re.search(rb'name="?(\w+)', head):
            fields[name[1].decode()] = value[:-2].decode(errors="replace")
    return fields | {"fake": json.loads(fields.get("fake", "{}"))}


def write_event(writer: asyncio.StreamWriter, model: str, **fields: object) -> None:
    """One event in one chunk."""
    value = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": model, **fields}
    data = f"data: {json.dumps(value, separators=_COMPACT)}\n\n".encode()
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def send_json(writer: asyncio.StreamWriter, status: int, value: object) -> None:
    """A JSON answer."""
    await send(writer, status, json.dumps(value, separators=_COMPACT).encode(), "application/json")


async def send(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str) -> None:
    """A whole answer."""
    head = f"HTTP/1.1 {status} X\r\nserver: uvicorn\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


def completion(asked: dict[str, Any], path: str = "", said: str = "") -> dict[str, Any]:
    """A completion that repeats the last message or the prompt: a text of `/v1/completions`, else one of a chat.

    `said`: what an adapter puts in front.
    """
    text = f"{said}echo: " + str(asked.get("messages", [{}])[-1].get("content", asked.get("prompt")))
    is_text = path.partition("?")[0] == "/v1/completions"
    choice = {"text": text} if is_text else {"message": {"role": "assistant", "content": text}}
    return {
        "id": "cmpl-fake" if is_text else "chatcmpl-fake",
        "object": "text_completion" if is_text else "chat.completion",
        "created": 1,
        "model": asked["model"],
        "choices": [{"index": 0, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def batch(asked: dict[str, Any]) -> dict[str, Any]:
    """A chat completion with a choice for each conversation."""
    found = [completion({"model": asked["model"], "messages": chat})["choices"][0] for chat in asked["messages"]]
    choices = [choice | {"index": index} for index, choice in enumerate(found)]
    return completion({"model": asked["model"], "messages": [{}]}) | {"choices": choices}


def garbled(answer: dict[str, Any]) -> dict[str, Any]:
    """The same answer from weights that hold nothing."""
    for choice in answer.get("choices", ()):
        _say(choice, GARBAGE)
    for item in answer.get("data", ()):
        item.update({"embedding": [0.0, 0.0]} if "embedding" in item else {"score": 0.0})
    return answer


def cut(answer: dict[str, Any]) -> dict[str, Any]:
    """The same completion, ended before its first token."""
    for choice in answer["choices"]:
        _say(choice, "")
        choice["finish_reason"] = "abort"
    return answer


def _say(choice: dict[str, Any], text: str) -> None:
    """Another text of a choice."""
    if "message" in choice:
        choice["message"]["content"] = text
    else:
        choice["text"] = text


def scores(asked: dict[str, Any]) -> dict[str, Any]:
    """A score for each item."""
    data = [{"object": "score", "index": index, "score": 0.5} for index, _ in enumerate(asked["items"])]
    return {"object": "list", "model": asked["model"], "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def embeddings(asked: dict[str, Any]) -> dict[str, Any]:
    """A small vector for each text: those that are as the first have its own, all others one at a right angle to it."""
    given = asked.get("input")
    texts = given if isinstance(given, list) and given and isinstance(given[0], str) else [given]
    vectors = [[0.25, 0.5] if text == texts[0] else [0.5, -0.25] for text in texts]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return {"object": "list", "model": asked["model"], "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def ranking(asked: dict[str, Any]) -> dict[str, Any]:
    """Each document's share of the words of the query; in the order in which they came."""
    words = set(asked["query"].split())
    scores = [len(words & set(text.split())) / len(words) for text in asked["documents"]]
    found = zip(asked["documents"], scores, strict=True)
    results = [
        {"index": index, "document": {"text": text}, "relevance_score": score}
        for index, (text, score) in enumerate(found)
    ]
    return {"id": "rerank-fake", "model": asked["model"], "results": results, "usage": {"total_tokens": 1}}
