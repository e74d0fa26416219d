"""What devices a machine has, as values: how much memory each has, and who holds it.

For `engine/devices`, which looks at them, and for those who place engines on them. A device has one name, the ledger's:
the index of a whole GPU, as CUDA counts them in the order of the PCI bus; the UUID of a MIG device; "cpu" for the
machine's own memory. People may use its UUID too: `resolve` tells whom they mean. Sizes are bytes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_proxy.domain.ledger import Device, Kind

_UUID_PREFIXES = ("GPU-", "MIG-")
_UNIFIED_RESERVE = 10  # one part of so many, where engines and everything else share one memory


@dataclass(frozen=True, slots=True)
class Foreign:
    """Another program on a device."""

    pid: int
    name: str  # of the program, never its arguments
    bytes: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One device, as it was last seen."""

    name: str  # in the ledger and in messages
    id: str  # its UUID; its name where it has none
    index: int | None  # None: it is not counted, as MIG devices and the machine's memory
    product: str  # "NVIDIA H100 80GB HBM3"
    kind: Kind
    unified: bool  # its memory is the machine's own
    total: int  # as vLLM counts it
    free: int | None  # None: it cannot be measured
    held: Mapping[str, int] = field(default_factory=dict)  # by instance of ours; empty where that cannot be known
    foreign: tuple[Foreign, ...] = ()  # by name; empty where they cannot be told from ours
    visible: str | None = None  # how CUDA_VISIBLE_DEVICES names it; None: it does not


def resolve(name: str, seen: Mapping[str, Seen]) -> str | None:
    """The ledger's name of a device that is named as CUDA names it: by index, UUID, or the only UUID that begins so."""
    if name in seen:
        return name
    if not name.startswith(_UUID_PREFIXES):
        return None
    exact = [one.name for one in seen.values() if one.id == name]
    found = exact or [one.name for one in seen.values() if one.id.startswith(name)]
    return found[0] if len(found) == 1 else None


def usable(visible_devices: str | None, seen: Mapping[str, Seen]) -> frozenset[str]:
    """The devices that CUDA_VISIBLE_DEVICES leaves to a process. None: it is not set.

    As CUDA reads it: what stands behind a name of no device does not count. The machine's memory is always there.
    """
    if visible_devices is None:
        return frozenset(seen)
    found = {name for name, one in seen.items() if one.visible is None}
    for entry in visible_devices.split(","):
        name = resolve(entry.strip(), seen)
        if name is None:
            break
        found.add(name)
    return frozenset(found)


def ledger_devices(
    seen: Mapping[str, Seen],
    *,
    reserve: int,
    limits: Mapping[str, int],
    held_by_ledger: Mapping[str, Mapping[str, int]],
) -> dict[str, Device]:
    """The devices as decisions count with them.

    `reserve`: of each device, kept from engines; of unified memory a tenth at least. `limits`: what engines may have
    together, by device as `resolve` reads it. `held_by_ledger`: what each instance of ours is booked with, by device.
    """
    at_most: dict[str | None, int] = {}
    for name, size in limits.items():  # of a device with two of them, the lower one
        device = resolve(name, seen)
        at_most[device] = min(size, at_most.get(device, size))
    return {
        name: Device(
            total=one.total,
            room=_room(one, reserve, at_most.get(name)),
            foreign=_foreign(one, held_by_ledger),
            free=math.inf if one.free is None else one.free,
            kind=one.kind,
            unified=one.unified,
        )
        for name, one in seen.items()
    }


def _room(one: Seen, reserve: int, limit: int | None) -> int:
    kept = max(reserve, math.ceil(one.total / _UNIFIED_RESERVE)) if one.unified else reserve
    room = max(0, one.total - kept)
    return room if limit is None else min(room, limit)


def _foreign(one: Seen, held_by_ledger: Mapping[str, Mapping[str, int]]) -> int:
    """What others have. An instance whose processes are not found there may be one of them, such as in a container.

    It is booked already, so it would count twice; what is free is measured as well, where this is too little.
    """
    others = sum(other.bytes for other in one.foreign)
    unfound = sum(takes.get(one.name, 0) for name, takes in held_by_ledger.items() if name not in one.held)
    return max(0, others - unfound)
