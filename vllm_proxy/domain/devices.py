"""Allocations of GPUs: what one engine is given, and what it uses where nobody manages devices.

For `fleet`, which asks the room for them, and for launchers. A device is named by its index or its UUID, as in
CUDA_VISIBLE_DEVICES. Where nobody manages devices none is queried, so an index and a UUID may be the same device.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vllm_proxy.domain.config import EngineSpec

ANY_DEVICE = "*"  # which GPUs it has is not known


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one instance is given. The spec says what it needs; where it runs is decided for each start."""

    takes: Mapping[str, int] = field(default_factory=dict)  # bytes by device; 0: not managed; none: it uses none
    visible: tuple[str, ...] | None = None  # what CUDA_VISIBLE_DEVICES says; None: as the daemon has it
    share: float | None = None  # `gpu_memory_utilization`, in the place of `memory`
    gpus: bool = True  # whether its devices are GPUs; else they are the machine's memory
    unified: bool = False  # whether one of them has its memory in common with the machine

    @property
    def devices(self) -> frozenset[str]:
        """Those that it uses."""
        return frozenset(self.takes)


NO_DEVICES = Allocation()


def unmanaged(devices: Iterable[str], visible: tuple[str, ...] | None = None) -> Allocation:
    """These devices, of whose memory nothing is known."""
    return Allocation(dict.fromkeys(devices, 0), visible)


def allocation_for(spec: EngineSpec, inherited: Mapping[str, str]) -> Allocation:
    """What an engine uses on a machine that has GPUs, as long as nothing places it elsewhere.

    vLLM takes the first `tensor_parallel_size * pipeline_parallel_size` of the visible ones.
    """
    if spec.memory == 0:
        return Allocation(visible=())
    if spec.devices is not None:
        named = tuple(str(device) for device in spec.devices)
        return unmanaged(named, named)
    count = (spec.tensor_parallel_size or 1) * (spec.pipeline_parallel_size or 1)
    visible = spec.env.get("CUDA_VISIBLE_DEVICES", inherited.get("CUDA_VISIBLE_DEVICES"))
    if isinstance(visible, Mapping):  # it stands elsewhere, and is read when the engine starts
        return unmanaged([ANY_DEVICE])
    if visible is None:
        return unmanaged(str(index) for index in range(count))
    shown = [name.strip() for name in visible.split(",") if name.strip()]
    return unmanaged(shown[:count])


class Names:
    """What may be the same device under several names: an index and a UUID, and `ANY_DEVICE` and every other one.

    Made of all names that are in use. Each is given stand-ins, so that two of them may be one device where they have
    one in common.
    """

    def __init__(self, used: Iterable[str]) -> None:
        names = frozenset(used)
        self._indices = [name for name in names if name.isdigit()]
        self._others = [name for name in names if not name.isdigit() and name != ANY_DEVICE]
        pairs = [f"{index} or {other}" for index in self._indices for other in self._others]
        self._all = [*self._indices, *self._others, *pairs, ANY_DEVICE]

    def of(self, devices: Iterable[str]) -> tuple[str, ...]:
        """The stand-ins of these devices."""
        found: dict[str, None] = {}
        for device in devices:
            found |= dict.fromkeys(self._of_one(device))
        return tuple(found)

    def _of_one(self, device: str) -> Iterable[str]:
        if device == ANY_DEVICE:
            return self._all
        if device.isdigit():
            return [device, *(f"{device} or {other}" for other in self._others)]
        return [device, *(f"{index} or {device}" for index in self._indices)]

    def all(self) -> list[str]:
        """Every stand-in."""
        return self._all
