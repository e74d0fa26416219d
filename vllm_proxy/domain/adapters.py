"""LoRA adapters of a model: what the file asks for, and what an engine has to be able to for them.

An adapter is an id of its own, served by the engines of its base. Engines are started with room for some adapters up to
a rank (`Lora`); those that hold what is needed load an adapter while they run, else they are replaced (`shortfall`).
What vLLM refuses, and its limits: `lora/peft_helper.py` and `config/lora.py` of vLLM 0.32.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_proxy.domain.toml import dotted

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` may be
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_UNKNOWN_RANK = 16  # of a hub id: vLLM's own default
_MOST_LORAS, _LEAST_CPU_LORAS = 4, 16  # of those that are derived
_KEYS = ("rank", "loras", "cpu_loras")
_HEADS = frozenset({"classifier", "score"})  # which vLLM takes from `modules_to_save`
_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})  # which leave the weights of the base alone
_REFUSED = {  # keys of an adapter that are given, and what they stand for
    "use_dora": "DoRA",
    "lora_bias": "a LoRA bias",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layer replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, as the file has it, and what is known of its folder."""

    id: str
    path: str  # a folder as PEFT writes it, a relative one from the file's; or a hub id
    description: str = ""
    enabled: bool = True
    is_hub_id: bool = False
    rank: int | None = None  # the largest of its matrices'; None: not known
    revision: str = ""  # another one: its files have changed; "": there are none here


@dataclass(frozen=True, slots=True)
class Lora:
    """What an engine is started with for adapters: vLLM's `max-lora-rank`, `max-loras` and `max-cpu-loras`."""

    rank: int
    loras: int  # different ones in one batch
    cpu_loras: int  # that it holds in memory


@dataclass(frozen=True, slots=True)
class Most:
    """What the file says of `Lora` itself; None: it is derived."""

    rank: int | None = None
    loras: int | None = None
    cpu_loras: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What an `adapter_config.json` says."""

    rank: int  # the largest


def describe(adapter_config: bytes) -> Facts:
    """What is known of an adapter by its `adapter_config.json`.

    Raises:
        ValueError: vLLM would refuse it, with everything that it would refuse.

    """
    try:
        found = json.loads(adapter_config)
    except (ValueError, RecursionError):
        raise ValueError(f"its {CONFIG} is no JSON") from None
    known: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if key not in known]:
        raise ValueError(f"its {CONFIG} lacks {', '.join(missing)}: expected the one of a LoRA adapter")
    rank = _rank(known)
    if problems := list(_unsupported(known, rank)):
        raise ValueError(f"vLLM cannot load it: {'; '.join(problems)}")
    return Facts(rank)


def _rank(found: Mapping[str, Any]) -> int:
    pattern = found.get("rank_pattern") or {}
    ranks: list[int] = [found["r"], *(pattern.values() if isinstance(pattern, Mapping) else [pattern])]
    if not all(type(rank) is int and rank > 0 for rank in ranks):
        raise ValueError(f"its {CONFIG} has ranks (r, rank_pattern) that are no whole numbers above 0")
    return max(ranks)


def _unsupported(found: Mapping[str, Any], rank: int) -> Iterator[str]:
    yield from (f"{what} ({key}) is not supported" for key, what in _REFUSED.items() if found.get(key))
    if found.get("bias", "none") != "none":
        yield "a bias is not supported: train it with bias none"
    saved = found.get("modules_to_save") or []
    if not isinstance(saved, list) or not _HEADS.issuperset(map(str, saved)):
        yield "modules_to_save is not supported, but for classifier and score"
    init = found.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS:
        yield "its init_lora_weights (as PiSSA, OLoRA) changes the base's weights: let PEFT convert it to a plain LoRA"
    if rank > RANKS[-1]:
        yield f"its rank {rank} is more than {RANKS[-1]}"


def needed(adapters: Iterable[Adapter], most: Most) -> Lora | None:
    """What new engines are started with, with headroom so that most additions are live; None: for no adapters."""
    enabled = [adapter for adapter in adapters if adapter.enabled]
    if not enabled:
        return None
    largest = max(_rank_of(one, most) for one in enabled) or _UNKNOWN_RANK
    rank = most.rank or next(size for size in RANKS if size >= largest)
    cpu_loras = most.cpu_loras or max(_LEAST_CPU_LORAS, _power(2 * len(enabled)), most.loras or 0)
    loras = most.loras or min(_MOST_LORAS, _power(len(enabled)), cpu_loras)
    return Lora(rank, loras, cpu_loras)


def shortfall(running: Lora | None, adapters: Iterable[Adapter], most: Most) -> str | None:
    """Why engines that were started with `running` are not enough, as a plan says it; None: they are.

    They are where less would be derived now, too, and whatever `loras` would be.
    """
    enabled = [adapter for adapter in adapters if adapter.enabled]
    if not enabled:
        return None
    if running is None:
        return f"{dotted(('adapters', enabled[0].id))} is the first: engines were started without room for adapters"
    for key in _KEYS:
        if (given := getattr(most, key)) not in (None, now := getattr(running, key)):
            return f"adapters_max.{key} {now} -> {given}"
    largest = max(enabled, key=lambda one: _rank_of(one, most))
    if (rank := _rank_of(largest, most)) > running.rank:
        return f"{dotted(('adapters', largest.id))}: its rank {rank} is more than the {running.rank} that engines hold"
    if most.cpu_loras is None and len(enabled) > running.cpu_loras:
        return f"adapters: {len(enabled)} are more than the {running.cpu_loras} that engines hold"
    return None


def _rank_of(adapter: Adapter, most: Most) -> int:
    """0: its folder cannot be read, which is to cost no engine its place."""
    if adapter.rank is None and adapter.is_hub_id:
        return most.rank or _UNKNOWN_RANK
    return adapter.rank or 0


def _power(least: int) -> int:
    """The smallest power of two that is at least so much."""
    return 1 << (least - 1).bit_length()


def looks_like_hub_id(path: str) -> bool:
    """Whether a path where there is no folder is meant for the hub: `org/name`."""
    return path.count("/") == 1 and path[0] not in "./~" and not path.endswith("/")


def changes(old: Mapping[str, Adapter], new: Mapping[str, Adapter]) -> Iterator[str]:
    """What is live about another set of adapters, as a plan says it."""
    for name in dict.fromkeys([*old, *new]):
        before, after, key = old.get(name), new.get(name), dotted(("adapters", name))
        if before is None:
            assert after is not None, "it is in one of both"
            yield f"{key} new" if after.enabled else f"{key} new, disabled"
        elif after is None:
            yield f"{key} removed"
        elif before.enabled != after.enabled:
            yield f"{key} {'enabled' if after.enabled else 'disabled'}"
        elif before.path != after.path:
            yield f"{key}.path {before.path} -> {after.path}"
        elif before.revision != after.revision:
            yield f"{key}: its files changed"
        elif before != after:
            yield f"{key}.description changed" if before.description != after.description else f"{key} changed"
