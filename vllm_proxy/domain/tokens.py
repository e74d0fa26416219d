"""How many tokens a request took, as its answer says; and how many it will take, as earlier answers let one guess.

Counting never decodes an answer: where the usage stands in it is known for each route, and only that object is read.
`traffic/sieve.py` keeps the bytes that are needed for that. Pure: nothing here waits or looks at a clock.
"""

from bisect import bisect_left, insort
from collections import deque
from typing import Annotated

import msgspec

KEPT = 1024  # bytes of an answer's beginning, of its end and from a mark on: more than any usage takes


class Tokens(msgspec.Struct, frozen=True):  # made for every answer: a dataclass takes five times as long
    """What an answer took. Prompt tokens include cached ones."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def plus(self, other: "Tokens") -> "Tokens":
        """Both together."""
        return Tokens(self.prompt + other.prompt, self.completion + other.completion, self.cached + other.cached)


NO_TOKENS = Tokens()

_USAGE = b'"usage":'
_BILLED = b'"billed_units":'
# Of streams; not in a text, whose quotes are escaped.
_LAST_CHUNK = b'"choices":[],"usage":'  # chat's and completions': the event behind all choices
_MESSAGE_DELTA = b'},"usage":'  # Anthropic's: in the last but one event; not in the first, which has usage too

_MARKS = {"/v2/embed": _BILLED}
_STREAM_MARKS = {
    "/v1/chat/completions": _LAST_CHUNK,
    "/v1/completions": _LAST_CHUNK,
    "/v1/messages": _MESSAGE_DELTA,
}
_CHUNK_STREAMS = frozenset({"/v1/chat/completions", "/v1/completions"})
_RERANK = frozenset({"/rerank", "/v1/rerank", "/v2/rerank"})  # whose usage comes before the results
# What runs no prompt, what audio takes (seconds), and stored responses, which were counted when they were made.
_WITHOUT_TOKENS = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/v1/messages/count_tokens",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/responses/{id}",
        "/v1/responses/{id}/cancel",
    }
)


# More is no answer, and sums of it would fit into no column of the ledger.
type _Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    """All names that vLLM's APIs have for tokens."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: _Count | None = None  # Anthropic's: beside the input, and not in it
    cache_creation_input_tokens: _Count | None = None
    image_tokens: _Count | None = None  # Cohere's


_usage = msgspec.json.Decoder(_Usage)


def asks_for_usage(path: str) -> bool:
    """Whether a stream of this route tells its usage only to who asks for it (`stream_options.include_usage`)."""
    return path in _CHUNK_STREAMS


def mark(path: str, *, stream: bool) -> bytes:
    """What stands in front of the usage in an answer of this route; of several places, the last one counts."""
    return (_STREAM_MARKS if stream else _MARKS).get(path, _USAGE)


def of_json(path: str, first: bytes, last: bytes) -> Tokens | None:
    """What an answer that is no stream took; None where it does not tell, as an error does not.

    `first`: its first KiB. `last`: its last one, or a KiB from the last `mark` on, where more follows that.
    """
    if path in _WITHOUT_TOKENS:
        return NO_TOKENS
    name = _MARKS.get(path, _USAGE)
    return _behind(first, first.find(name), name) if path in _RERANK else _behind(last, last.rfind(name), name)


def of_stream(path: str, last: bytes) -> Tokens | None:
    """What an event stream took; None while it has not come to tell. `last` as in `of_json`, without chunk framing."""
    if path in _WITHOUT_TOKENS:
        return NO_TOKENS
    name = mark(path, stream=True)
    return _behind(last, last.rfind(name), name)


def of_event(data: bytes) -> Tokens | None:
    """What the data of one event tells, of a realtime session's messages too."""
    return _behind(data, data.rfind(_USAGE), _USAGE)


def of_head(head: bytes) -> Tokens | None:
    """What the head of an answer tells: of embeddings as bytes, it has the usage in `metadata`."""
    return _behind(head, head.find(_USAGE), _USAGE)


def _behind(text: bytes, at: int, name: bytes) -> Tokens | None:
    """The tokens of the object behind the mark `name` at `at`."""
    if at < 0:
        return None
    begin = end = at + len(name)
    depth = 0
    while True:  # to the brace that closes it: usage has no braces in strings
        close = text.find(b"}", end, at + KEPT) + 1
        if not close:  # it has been cut off, or is none
            return None
        depth += text.count(b"{", end, close) - 1
        end = close
        if depth <= 0:
            break
    try:
        usage = _usage.decode(text[begin:end])
    except (msgspec.DecodeError, RecursionError):
        return None
    return _of_usage(usage)


def _of_usage(usage: _Usage) -> Tokens | None:
    if usage.prompt_tokens is not None:
        details = usage.prompt_tokens_details
        cached = details.cached_tokens if details is not None else None
        return Tokens(usage.prompt_tokens, usage.completion_tokens or 0, cached or 0)
    if usage.input_tokens is None:
        return None
    prompt = usage.input_tokens + (usage.image_tokens or 0)
    details = usage.input_tokens_details
    if details is not None:
        return Tokens(prompt, usage.output_tokens or 0, details.cached_tokens or 0)
    cached = usage.cache_read_input_tokens or 0
    prompt += cached + (usage.cache_creation_input_tokens or 0)
    return Tokens(prompt, usage.output_tokens or 0, cached)


_BYTES_PER_TOKEN = 4  # before a model's first answer
_FORGETS = 1_000_000  # tokens: what was learned before so many counts half
_FIRST_BINARY = 4096  # tokens at most of a body with images or audio, before the first one was answered
_FIRST_OUTPUT = 256  # tokens of an answer, before the first one
_REMEMBERED = 64  # outputs
_SAMPLED = 8  # of so many answers one is learned from, once so many outputs are known


class Estimate:
    """What requests of one key to one model will take, learned from their answers: nobody's guesses are others'."""

    __slots__ = ("_binary", "_bytes", "_files", "_recent", "_seen", "_sorted", "_sum", "_tokens", "bytes_per_token",
                 "mean_output", "output")  # fmt: skip

    def __init__(self) -> None:
        self.bytes_per_token: float = _BYTES_PER_TOKEN  # of prompts
        self.output = _FIRST_OUTPUT  # tokens that nine of ten answers do not exceed
        self.mean_output = _FIRST_OUTPUT  # tokens of an answer
        self._bytes = self._tokens = 0.0
        self._binary = self._files = 0.0  # tokens and number of bodies with files
        self._seen = 0  # answers
        self._recent: deque[int] = deque()  # the tokens of the last ones
        self._sorted: list[int] = []
        self._sum = 0  # of the last ones

    @property
    def has_learned(self) -> bool:
        """Whether there was an answer."""
        return self._seen > 0

    def prompt(self, length: int, most: int | None = None, *, binary: bool) -> int:
        """Tokens of the prompt in a body of `length` bytes. `binary`: it has files in it. `most`: `max_model_len`."""
        found = self._of_binary(length) if binary else int(length / self.bytes_per_token) + 1
        return found if most is None or found < most else most

    def learn(self, tokens: Tokens, length: int, *, binary: bool) -> None:
        """From an answer's own usage; `length` and `binary` of its request's body as in `prompt`."""
        if not tokens.prompt:  # nothing was run
            return
        self._seen += 1
        if self._seen > _REMEMBERED and self._seen % _SAMPLED:
            return  # enough is known, and to learn costs as much as all other counting
        self._learn_output(tokens.completion)
        self._learn_prompt(tokens.prompt, length, binary=binary)

    def _of_binary(self, length: int) -> int:
        if not self._files:
            return min(length // _BYTES_PER_TOKEN + 1, _FIRST_BINARY)
        return int(self._binary / self._files) + 1

    def _learn_prompt(self, tokens: int, length: int, *, binary: bool) -> None:
        if binary:
            if self._binary > _FORGETS:
                self._binary, self._files = self._binary / 2, self._files / 2
            self._binary += tokens
            self._files += 1
            return
        if self._tokens > _FORGETS:
            self._bytes, self._tokens = self._bytes / 2, self._tokens / 2
        self._bytes += length
        self._tokens += tokens
        self.bytes_per_token = max(self._bytes / self._tokens, 0.1)

    def _learn_output(self, tokens: int) -> None:
        recent, ordered = self._recent, self._sorted
        if len(recent) == _REMEMBERED:
            oldest = recent.popleft()
            del ordered[bisect_left(ordered, oldest)]
            self._sum -= oldest
        recent.append(tokens)
        self._sum += tokens
        self.mean_output = self._sum // len(recent)
        insort(ordered, tokens)
        self.output = ordered[(len(ordered) * 9 + 9) // 10 - 1]
