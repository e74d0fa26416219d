"""What a model can do, by the routes that its engine has. The names are vLLM's.

vLLM registers a route only where the model has the task; for any other it answers a bare 404.
"""

from collections.abc import Mapping
from types import MappingProxyType

# Of each task the routes that only it brings, for people; the first tells whether the model has it.
ROUTES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "generate": ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
        "embed": ("/v1/embeddings", "/v2/embed"),
        "classify": ("/classify",),
        "score": ("/v1/score", "/v1/rerank"),
        "transcription": ("/v1/audio/transcriptions", "/v1/audio/translations"),
    }
)


def lacks(what: str, model: str, tasks: tuple[str, ...]) -> str:
    """A sentence for who asked a model for `what` ("POST /v1/embeddings"), which its engine has not. () : not known."""
    offered = "; ".join(f"{task} ({', '.join(ROUTES[task])})" for task in tasks)
    can = f"its tasks are {offered}" if tasks else "GET /v1/models may say what it can"
    return f"cannot {what}: {model} is a model of another kind, whose engine has no such route; {can}"
