"""What engines that sleep may have of the machine's own memory, and which of them ends where that is too much.

vLLM moves weights there at level 1 and keeps it after the wake, so engines count from their first sleep to their end.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

GROWTH = 1.3  # times what an engine has that has not slept yet: what it takes
POOL_BYTES = 2**29  # of each device: what PyTorch's pool has beside the weights, and moves with them


@dataclass(frozen=True, slots=True)
class Sleeper:
    """An engine that sleeps, or has slept. `asleep_since`: of the loop's clock; None: it is awake."""

    bytes: int
    asleep_since: float | None = None


def estimate(takes: Mapping[str, int], weights: int = 0) -> int:
    """What an engine takes that has so much of each device, of which `weights` are moved; 0: nobody knows how much."""
    moved = weights + POOL_BYTES if weights else math.inf
    return int(sum(min(size, moved) for size in takes.values()) * GROWTH)


def fits(more: int, budget: int) -> bool:
    """Whether an engine may sleep at all."""
    return more <= budget


def to_end(sleepers: Mapping[str, Sleeper], budget: int) -> list[str]:
    """Who ends so that the others stay within the budget: those that have slept longest. Nobody who is awake."""
    asleep = sorted(
        (one.asleep_since, name) for name, one in sleepers.items() if one.asleep_since is not None and one.bytes
    )
    left = sum(one.bytes for one in sleepers.values())
    found = []
    for _, name in asleep:
        if left <= budget:
            break
        left -= sleepers[name].bytes
        found.append(name)
    return found
