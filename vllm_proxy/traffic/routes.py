"""The inference routes, in one table, of which the router, the OpenAPI document and the error envelopes are made.

A route that vLLM has and this table has not is not served: add a line for it.
"""

from dataclasses import dataclass
from typing import Literal

from vllm_proxy.domain.keys import Scope

# Where a request says which model it is for; nowhere: it goes to every instance; guard: that of `[moderation]`.
type NamesModel = Literal["json", "form", "query", "nowhere", "session", "guard"]


@dataclass(frozen=True, slots=True)
class InferenceRoute:
    """A route that vLLM answers."""

    method: str
    path: str  # as the router takes it
    names_model: NamesModel
    summary: str  # for people
    anthropic: bool = False  # of Anthropic's API, whose errors have an envelope of their own
    salted: bool | None = None  # whether vLLM 0.32 takes a `cache_salt` here; None: no prompt is run
    scope: Scope = Scope.INFERENCE  # that callers need


def _json(path: str, summary: str, *, anthropic: bool = False, salted: bool | None = True) -> InferenceRoute:
    return InferenceRoute("POST", path, "json", summary, anthropic, salted)


TOKENIZER_INFO = "/tokenizer_info"  # engines have it where their `args` say so

INFERENCE = (
    _json("/v1/chat/completions", "Chat"),
    _json("/v1/chat/completions/batch", "Have several chats at once"),
    _json("/v1/completions", "Complete a text"),
    _json("/v1/embeddings", "Embed texts"),
    _json("/v1/responses", "Create a response"),
    _json("/v1/messages", "Chat as Anthropic's API does", anthropic=True),
    _json("/v1/messages/count_tokens", "Count the tokens of a chat", anthropic=True, salted=None),
    _json("/v1/rerank", "Rank documents by a query"),
    _json("/rerank", "Rank documents by a query"),
    _json("/v2/rerank", "Rank documents by a query"),
    _json("/v1/score", "Score pairs of texts"),
    _json("/score", "Score pairs of texts"),
    _json("/generative_scoring", "Score texts by how likely each label follows"),
    _json("/classify", "Classify texts"),
    _json("/pooling", "What a pooling model makes of texts"),
    _json("/tokenize", "Text to tokens", salted=None),
    _json("/detokenize", "Tokens to text", salted=None),
    _json("/v2/embed", "Embed as Cohere's API does", salted=False),
    InferenceRoute("POST", "/v1/moderations", "guard", "Classify texts as OpenAI's API does", salted=True),
    InferenceRoute("POST", "/v1/audio/transcriptions", "form", "Transcribe speech", salted=False),
    InferenceRoute("POST", "/v1/audio/translations", "form", "Translate speech", salted=False),
    InferenceRoute("GET", "/v1/responses/{id}", "nowhere", "Show a stored response"),
    InferenceRoute("POST", "/v1/responses/{id}/cancel", "nowhere", "Cancel a response"),
    InferenceRoute("GET", TOKENIZER_INFO, "query", "Show a model's tokenizer"),
    InferenceRoute("GET", "/v1/realtime", "session", "A realtime session", salted=False),
)

# Of the OpenAI API, and served neither by vLLM nor here; what lies below them is not either.
UNSUPPORTED = (
    "/v1/moderations",  # by other methods than POST
    "/v1/images",
    "/v1/audio/speech",
    "/v1/assistants",
    "/v1/threads",
    "/v1/fine_tuning",
    "/v1/files",
    "/v1/batches",
    "/v1/uploads",
    "/v1/vector_stores",
    "/v1/conversations",
    "/v1/containers",
    "/v1/videos",
)

_INFERENCE = frozenset(route.path for route in INFERENCE)
_ANTHROPIC = "/v1/messages"


def is_anthropic(path: str) -> bool:
    """Whether a path is of Anthropic's API, served or not."""
    return path.startswith(_ANTHROPIC) and path[len(_ANTHROPIC) :][:1] in {"", "/"}


def is_inference(path: str) -> bool:
    """Whether a path is of the routes for inference, the list of models included."""
    return path.startswith("/v1/") or path in _INFERENCE


def without_version(path: str) -> str | None:
    """The path of the inference route that a client means that left out the version; None: there is none."""
    return f"/v1{path}" if f"/v1{path}" in _INFERENCE or path == "/models" else None


def paths(names_model: NamesModel) -> list[str]:
    """Of the routes whose requests name their model so."""
    return [route.path for route in INFERENCE if route.names_model == names_model]
