"""One OpenAI-compatible address in front of many vLLM processes.

Start with ARCHITECTURE.md beside this file; HACKING.md says where a change goes.
"""

__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: most commands do without, and it takes as long as they do."""
    if name != "__version__":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib.metadata import version  # noqa: PLC0415 - see above

    return version("vllm-proxy")
