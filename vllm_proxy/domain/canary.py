"""One small question to an engine, whose answer says whether its weights are right: before it sleeps and after it woke.

vLLM answers 200 with nonsense when its weights are gone, so nothing but an answer proves that they are there. For
`engine/nap`, which asks, and for the record of an engine, which keeps the answer for a later daemon.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

COMPLETIONS, EMBEDDINGS = "/v1/completions", "/v1/embeddings"
# Whose continuation is one token for any tokenizer and beyond doubt, so that rounding changes nothing; too short for a
# block of the prefix cache, so that nothing of an earlier answer is used.
_PROMPT = "A B C D E F"
_MOST_COMPONENTS = 64  # of an embedding that are kept
_MOST_TEXT = 200
_LENGTHS = (1e-9, 1e9)  # outside of which an embedding is none
_LEAST_COSINE = 0.99


@dataclass(frozen=True, slots=True)
class Canary:
    """What an engine has answered on one of two routes: a token, or the beginning of an embedding."""

    route: str
    text: str = ""
    vector: tuple[float, ...] = ()

    def is_like(self, other: "Canary") -> bool:
        """Whether the same weights answered: the same token, or the same direction but for rounding."""
        if (self.route, self.text, len(self.vector)) != (other.route, other.text, len(other.vector)):
            return False
        return not self.vector or _cosine(self.vector, other.vector) >= _LEAST_COSINE

    def __str__(self) -> str:
        """For the record: as `parse_canary` reads it."""
        return json.dumps({"route": self.route, "text": self.text, "vector": self.vector})

    @property
    def shown(self) -> str:
        """For a message."""
        return json.dumps(self.text) if self.route == COMPLETIONS else "an embedding"


def question(route: str, model: str) -> dict[str, object]:
    """The body of a request. `model`: a name that the engine serves."""
    if route == EMBEDDINGS:
        return {"model": model, "input": _PROMPT, "encoding_format": "float"}
    return {"model": model, "prompt": _PROMPT, "max_tokens": 1, "temperature": 0}


def read_answer(route: str, answer: Any) -> Canary:  # noqa: ANN401 - JSON of an engine
    """What a route has answered.

    Raises:
        ValueError: it is no answer to the question.

    """
    try:
        if route == COMPLETIONS:
            return _valid(Canary(route, answer["choices"][0]["text"][:_MOST_TEXT]))
        components = answer["data"][0]["embedding"][:_MOST_COMPONENTS]
        return _valid(Canary(route, vector=tuple(_rounded(one) for one in components)))
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("it answers something else") from error


def parse_canary(text: str) -> Canary:
    """A canary from what `str` makes of it.

    Raises:
        ValueError: it is none.

    """
    try:
        found = json.loads(text)
        return _valid(Canary(found["route"], found["text"], tuple(_rounded(one) for one in found["vector"])))
    except (KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError("no answer of an engine") from error


def _valid(canary: Canary) -> Canary:
    is_one = canary.route in {COMPLETIONS, EMBEDDINGS} and isinstance(canary.text, str)
    if not is_one or len(canary.text) > _MOST_TEXT or len(canary.vector) > _MOST_COMPONENTS:
        raise ValueError("it answers something else")
    if (canary.route == EMBEDDINGS) != (_LENGTHS[0] < math.hypot(*canary.vector) < _LENGTHS[1]):
        raise ValueError("it answers numbers that are none")
    return canary


def _rounded(component: Any) -> float:  # noqa: ANN401 - JSON of an engine
    if isinstance(component, bool) or not isinstance(component, int | float):
        raise TypeError("no number")
    return float(f"{component:.5g}")


def _cosine(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return math.sumprod(one, other) / (math.hypot(*one) * math.hypot(*other))
