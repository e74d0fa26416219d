"""NVIDIA's GPUs and MIG devices, as the driver's own library NVML reports them.

The library and its bindings are loaded when they are first needed: where there is no driver, nothing is found. A GPU
that is lost, or may not be used, is left out; the others are then named to CUDA by UUID, since it counts without it.
"""

import contextlib
import ctypes
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_proxy.domain.inventory import Seen
from vllm_proxy.domain.ledger import Kind
from vllm_proxy.engine.device_source import Sight, SourceError
from vllm_proxy.engine.holders import Holders, Programs
from vllm_proxy.engine.machine_memory import ROOT, Memory, machine_memory
from vllm_proxy.engine.ownership import Owned

_LIBRARIES = ("libnvidia-ml.so.1", "/run/opengl-driver/lib/libnvidia-ml.so.1")  # the latter: NixOS
_MOST_FAILURES = 2  # of one GPU in a row: with another one it is left out, and the others are looked at without it
_NO_DRIVER = ("LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED")
_ANEW = ("UNINITIALIZED", "DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH")  # the driver was loaded anew
_LOST = ("GPU_IS_LOST", "RESET_REQUIRED", "NO_PERMISSION")
_NOT_HERE = ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "ARGUMENT_VERSION_MISMATCH", "INVALID_ARGUMENT")
_UNTOLD = (*_NOT_HERE, "NO_PERMISSION")
_PROCESS_LISTS = ("Compute", "Graphics", "MPSCompute")


@dataclass(frozen=True, slots=True)
class _Card:
    """A GPU, or a MIG device of one."""

    name: str
    uuid: str
    index: int | None
    product: str
    memory: Memory | None  # None: it has none of its own
    sizes: Mapping[int, int]  # by pid


class Nvml:
    """The source for NVIDIA's GPUs, a part of "auto"."""

    def __init__(self, programs: Programs, root: Path = ROOT) -> None:
        self._programs = programs
        self._root = root
        self._nvml: Any = None  # the bindings, which have no types; None: not initialised
        self._failures: dict[int, int] = {}  # in a row, by index

    def look(self, engines: Mapping[str, Owned], /) -> Sight:
        """Every GPU that answers, or its MIG devices; none where there is no driver.

        Raises:
            SourceError: NVML cannot be used, or a GPU does not answer for now.
            OSError: the kernel does not tell what memory the machine has.

        """
        if self._nvml is None and not self._initialise():
            return Sight()
        nvml = self._nvml
        try:
            cards, lost = self._cards()
        except nvml.NVMLError as error:
            if _is(nvml, error, _ANEW):
                self._nvml = None
            raise SourceError(f"NVML answers: {error}") from None
        holders = self._programs.holders({card.name: card.sizes for card in cards}, engines)
        by_uuid = bool(lost) or any(card.index is None for card in cards)
        seen = tuple(self._seen(card, holders[card.name], by_uuid=by_uuid) for card in cards)
        return Sight(seen, "; ".join(lost) or None)

    def close(self) -> None:
        """Let go of the driver, which can then be unloaded."""
        if self._nvml is not None:
            nvml, self._nvml = self._nvml, None
            with contextlib.suppress(nvml.NVMLError):  # it is gone already
                nvml.nvmlShutdown()

    def _initialise(self) -> bool:
        """Whether there is a driver."""
        if not _has_library():
            return False
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return False
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            if _is(nvml, error, _NO_DRIVER):
                return False
            raise SourceError(f"NVML cannot be used: {error}") from None
        self._nvml = nvml
        return True

    def _cards(self) -> tuple[list[_Card], list[str]]:
        """All that answer; and what is wrong with the others."""
        nvml = self._nvml
        cards: list[_Card] = []
        lost: list[str] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                cards += list(self._of_gpu(index))
            except nvml.NVMLError as error:
                if _is(nvml, error, _ANEW):
                    raise
                failures = self._failures.get(index, 0)
                if failures < _MOST_FAILURES and not _is(nvml, error, _LOST):
                    self._failures[index] = failures + 1
                    raise SourceError(f"GPU {index} does not answer: {error}") from None
                lost.append(f"GPU {index} is left out: {error}")
            else:
                self._failures.pop(index, None)
        return cards, lost

    def _of_gpu(self, index: int) -> Iterator[_Card]:
        nvml = self._nvml
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        if not self._is_divided(gpu):
            yield self._card(gpu, str(index), index)
            return
        for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
            try:
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, place)
            except nvml.NVMLError as error:
                if not _is(nvml, error, ("NOT_FOUND",)):
                    raise
                continue
            yield self._card(part, nvml.nvmlDeviceGetUUID(part), None)

    def _is_divided(self, gpu: object) -> bool:
        """Whether it is in MIG mode, where nothing runs on the whole of it."""
        nvml = self._nvml
        try:
            current, _ = nvml.nvmlDeviceGetMigMode(gpu)
        except nvml.NVMLError as error:
            if _is(nvml, error, _NOT_HERE):
                return False
            raise
        return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)

    def _card(self, handle: object, name: str, index: int | None) -> _Card:
        nvml = self._nvml
        uuid, product = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
        return _Card(name, uuid, index, product, self._memory(handle), self._sizes(handle))

    def _memory(self, handle: object) -> Memory | None:
        """As CUDA counts it, which has no part in what the driver reserves."""
        nvml = self._nvml
        for version in (nvml.nvmlMemory_v2, None):
            try:
                info = nvml.nvmlDeviceGetMemoryInfo(handle, version=version)
            except nvml.NVMLError as error:
                if not _is(nvml, error, _NOT_HERE):
                    raise
                continue
            return Memory(info.total - (info.reserved if version else 0), info.free)
        return None

    def _sizes(self, handle: object) -> dict[int, int]:
        """Bytes by pid, of all kinds of processes; one that computes and draws is listed twice with the same size."""
        nvml = self._nvml
        found: dict[int, int] = {}
        for kind in _PROCESS_LISTS:
            try:
                processes = getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v3")(handle)
            except nvml.NVMLError as error:
                if not _is(nvml, error, _UNTOLD):
                    raise
                continue
            for process in processes:
                if process.usedGpuMemory:  # else it is not known: in WSL, say
                    found[process.pid] = max(found.get(process.pid, 0), process.usedGpuMemory)
        return found

    def _seen(self, card: _Card, holders: Holders, *, by_uuid: bool) -> Seen:
        memory = card.memory or machine_memory(self._root)
        if memory.total <= 0:
            raise SourceError(f"GPU {card.name} reports no memory")
        return Seen(
            card.name, card.uuid, card.index, card.product,
            Kind.MIG if card.index is None else Kind.GPU,
            unified=card.memory is None,
            total=memory.total,
            free=min(memory.available, memory.total),
            held=holders.held,
            foreign=holders.foreign,
            visible=card.uuid if by_uuid else card.name,
        )  # fmt: skip


def _has_library() -> bool:
    """Load it; the bindings, which take 16 MiB, then find it by its name."""
    for name in _LIBRARIES:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            return True
    return False


def _is(nvml: Any, error: Any, codes: tuple[str, ...]) -> bool:  # noqa: ANN401 - the bindings have no types
    return error.value in {getattr(nvml, f"NVML_ERROR_{code}", None) for code in codes}
