"""LoRA adapters of a model: what the file asks for, and what an engine has to be able to for them.

An adapter is an id of its own, served by the engines of its base. An engine that holds what is needed loads it while it
runs; else it is replaced.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, as the file has it."""

    id: str
    path: str  # a folder as PEFT writes it, a relative one from the file's; or a hub id
    description: str = ""
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Lora:
    """What an engine is started with for adapters: vLLM's `max-lora-rank`, `max-loras` and `max-cpu-loras`."""

    rank: int
    loras: int  # different ones in one batch
    cpu_loras: int  # that it holds in memory
