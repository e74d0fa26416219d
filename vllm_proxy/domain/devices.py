"""GPUs by their names: which of them an engine is given, and whether two sets may name the same one.

A name is an index or a UUID, as CUDA takes them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm_proxy.domain.config import EngineSpec

ANY_DEVICE = "*"  # which GPUs it has is not known


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one instance is given. The spec says what it needs; where it runs is decided for each start."""

    devices: frozenset[str] = frozenset()  # empty: it uses none
    visible: tuple[str, ...] | None = None  # what CUDA_VISIBLE_DEVICES says; None: as the daemon has it


def allocation_for(spec: EngineSpec, inherited: Mapping[str, str]) -> Allocation:
    """What an engine uses on a machine that has GPUs, as long as nothing places it elsewhere.

    vLLM takes the first `tensor_parallel_size * pipeline_parallel_size` of the visible ones.
    """
    if spec.devices is not None:
        named = tuple(str(device) for device in spec.devices)
        return Allocation(frozenset(named), named)
    count = (spec.tensor_parallel_size or 1) * (spec.pipeline_parallel_size or 1)
    visible = spec.env.get("CUDA_VISIBLE_DEVICES", inherited.get("CUDA_VISIBLE_DEVICES"))
    if visible is None:
        return Allocation(frozenset(str(index) for index in range(count)))
    shown = [name.strip() for name in visible.split(",") if name.strip()]
    return Allocation(frozenset(shown[:count]))


NO_DEVICES = Allocation()


class DeviceSet:
    """Devices of many engines. `overlaps`: whether a set may name one of them; an index and a UUID may be the same."""

    def __init__(self, devices: Iterable[str] = ()) -> None:
        self._indices: set[str] = set()
        self._others: set[str] = set()  # UUIDs
        self._any = False
        self.add(devices)

    def add(self, devices: Iterable[str]) -> None:
        """These too."""
        for device in devices:
            self._any |= device == ANY_DEVICE
            (self._indices if device.isdigit() else self._others).add(device)

    def overlaps(self, devices: Iterable[str]) -> bool:
        """Whether one of these may be in the set."""
        return any(self._may_hold(device) for device in devices)

    def _may_hold(self, device: str) -> bool:
        if self._any or device == ANY_DEVICE:
            return bool(self._indices or self._others)
        same, other = (self._indices, self._others) if device.isdigit() else (self._others, self._indices)
        return bool(other) or device in same
