"""Allocations of GPUs: which devices an engine is given, and which allocations may overlap.

For `decide`, which admits starts, and for launchers. A device is named by its index or its UUID, as in
CUDA_VISIBLE_DEVICES. No device is queried here, so an index and a UUID count as the same device.
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
    if isinstance(visible, Mapping):  # it stands elsewhere, and is read when the engine starts
        return Allocation(frozenset({ANY_DEVICE}))
    if visible is None:
        return Allocation(frozenset(str(index) for index in range(count)))
    shown = [name.strip() for name in visible.split(",") if name.strip()]
    return Allocation(frozenset(shown[:count]))


NO_DEVICES = Allocation()


class DeviceMap[T]:
    """Who was the first to have each device; asking takes as long for one holder as for thousands.

    An index and a UUID may name the same device, and `ANY_DEVICE` may be each of them.
    """

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, T]] = {}  # by name, with its place in the order
        self._first_index: tuple[int, T] | None = None
        self._first_other: tuple[int, T] | None = None  # a UUID, or any
        self._count = 0

    def add(self, devices: Iterable[str], holder: T) -> None:
        """Let a holder have these, behind all that were added before."""
        entry = (self._count, holder)
        self._count += 1
        for device in devices:
            self._first.setdefault(device, entry)
            if device.isdigit():
                self._first_index = self._first_index or entry
            else:
                self._first_other = self._first_other or entry

    def holder(self, devices: Iterable[str]) -> T | None:
        """The first holder of what may be one of these; None: nobody has any of them."""
        found = [entry for device in devices for entry in self._may_be(device) if entry is not None]
        return min(found, key=lambda entry: entry[0])[1] if found else None

    def _may_be(self, device: str) -> tuple[tuple[int, T] | None, ...]:
        if device == ANY_DEVICE:
            return self._first_index, self._first_other
        if device.isdigit():
            return self._first.get(device), self._first_other
        return self._first.get(device), self._first_index, self._first.get(ANY_DEVICE)
