"""The fake as a guard: its verdict is in the text that it is asked about, and so are its faults.

A text with "bad" in it is unsafe, one with "odd" controversial. `fault:NAME` is a fault: `garbage`, `mute` (no
probabilities), `long` (vLLM's refusal of a text that is too long), `broken` (500), `hold=FILE` (it answers once this
file exists), `die`, `once=FILE` (the engine ends without an answer if it is the first to create this file).
"""

import json
import math
import re
from typing import Any

KINDS = ("llama-guard", "qwen3guard", "json", "classifier")
LIKELY = 0.9  # how sure it is of its verdict
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}

_FAULT = re.compile(r"fault:(\w+)(?:=(\S+))?")


def text_of(asked: dict[str, Any]) -> str:
    """What it is asked about."""
    return str(asked["input"]) if "input" in asked else str(asked["messages"][-1]["content"])


def fault_of(text: str) -> tuple[str, str]:
    """The name of a fault and its value."""
    found = _FAULT.search(text)
    return (found[1], found[2] or "") if found else ("", "")


def refusal(fault: str) -> tuple[int, dict[str, Any]] | None:
    """An error of vLLM's, where that is the fault."""
    if fault == "long":
        message = "This model's maximum context length is 512 tokens. However, your request has 600 input tokens."
        error = {"message": message, "type": "BadRequestError", "param": "input_tokens", "code": 400}
        return 400, {"error": error}
    if fault == "broken":
        return 500, {"error": {"message": "", "type": "InternalServerError", "param": None, "code": 500}}
    return None


def verdict(kind: str, asked: dict[str, Any], path: str) -> dict[str, Any]:
    """The answer to a question."""
    text = text_of(asked)
    fault, _ = fault_of(text)
    if path == "/classify":
        return classification(asked["model"], bad="bad" in text, odd="odd" in text)
    if fault == "garbage":
        return completion(asked["model"], "I cannot help with that.", [("I", 0.5, {})])
    if kind == "json":
        return completion(asked["model"], judgement(asked, bad="bad" in text), [])
    said, tokens = (qwen if kind == "qwen3guard" else llama)(text)
    return completion(asked["model"], said, [] if fault == "mute" else tokens)


type Token = tuple[str, float, dict[str, float]]  # text, probability, alternatives


def llama(text: str) -> tuple[str, list[Token]]:
    """What Llama Guard 3 says, and its tokens."""
    word, other = ("unsafe", "safe") if "bad" in text else ("safe", "unsafe")
    rest = "\nS1,S10" if word == "unsafe" else ""
    return f"\n\n{word}{rest}", [("\n\n", 1.0, {}), (word, LIKELY, {other: 1 - LIKELY}), (rest, 1.0, {})]


def qwen(text: str) -> tuple[str, list[Token]]:
    """What Qwen3Guard-Gen says, and its tokens."""
    word = "Unsafe" if "bad" in text else "Controversial" if "odd" in text else "Safe"
    label = {"Unsafe": "Violent", "Controversial": "Politically Sensitive Topics", "Safe": "None"}[word]
    others = {f" {one[:4]}": (1 - LIKELY) / 2 for one in {"Safe", "Unsafe", "Controversial"} - {word}}
    tokens: list[Token] = [("Safety", 1.0, {}), (":", 1.0, {}), (f" {word[:4]}", LIKELY, others), (word[4:], 1.0, {})]
    return f"Safety: {word}\nCategories: {label}", tokens


def judgement(asked: dict[str, Any], *, bad: bool) -> str:
    """What a chat model says that the schema forces."""
    names = asked["response_format"]["json_schema"]["schema"]["required"]
    return json.dumps({name: 9 if bad and name == "violence" else 0 for name in names})


def classification(model: str, *, bad: bool, odd: bool) -> dict[str, Any]:
    """The probabilities of `safe`, `toxic` and `threat`, each for itself."""
    probs = [0.1, LIKELY, 0.2] if bad else [0.3, 0.2, LIKELY] if odd else [LIKELY, 0.1, 0.05]
    one = {"index": 0, "label": "LABEL", "probs": probs, "num_classes": len(probs)}
    usage = {"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": 0, "prompt_tokens_details": None}
    return {"id": "classify-fake", "object": "list", "created": 1, "model": model, "data": [one], "usage": usage}


def completion(model: str, text: str, tokens: list[Token]) -> dict[str, Any]:
    """A chat completion with the probabilities of its tokens."""
    content = [
        {**candidate(name, likely),
         "top_logprobs": [candidate(each, value) for each, value in {name: likely, **others}.items()]}
        for name, likely, others in tokens
    ]  # fmt: skip
    choice = {
        "index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop",
        "logprobs": {"content": content} if tokens else None,
    }  # fmt: skip
    return {
        "id": "chatcmpl-fake", "object": "chat.completion", "created": 1, "model": model, "choices": [choice],
        "usage": USAGE,
    }  # fmt: skip


def candidate(token: str, likely: float) -> dict[str, Any]:
    """A token and how likely it was."""
    return {"token": token, "logprob": math.log(likely), "bytes": list(token.encode())}
