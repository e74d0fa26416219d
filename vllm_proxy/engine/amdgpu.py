"""AMD GPUs, as the kernel's driver amdgpu shows them in /sys: no library is needed.

The driver does not say there who holds what. An APU computes in the machine's memory, of which it may map a part (GTT).
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

from vllm_proxy.domain.inventory import Seen
from vllm_proxy.domain.ledger import Kind
from vllm_proxy.engine.device_source import Sight, SourceError
from vllm_proxy.engine.machine_memory import ROOT, machine_memory
from vllm_proxy.engine.ownership import Owned

_CARD = re.compile(r"card(\d+)")
_NO_VENDOR = {"", "unknown"}


class AmdGpu:
    """The source for AMD's GPUs, a part of "auto"."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    def look(self, _: Mapping[str, Owned], /) -> Sight:
        """Every card of the driver, counted as ROCm counts them; none where there is no such driver.

        Raises:
            SourceError: what stands there makes no sense.
            OSError: a card does not answer.

        """
        return Sight(tuple(self._card(index, card) for index, card in enumerate(self._cards())))

    def close(self) -> None:
        """Nothing is open."""

    def _cards(self) -> list[Path]:
        """The folders of the cards, in the order in which the driver found them."""
        folder = self._root / "sys/class/drm"
        try:
            numbers = sorted(int(match[1]) for entry in folder.iterdir() if (match := _CARD.fullmatch(entry.name)))
        except FileNotFoundError:
            return []
        cards = (folder / f"card{number}" / "device" for number in numbers)
        return [card for card in cards if (card / "mem_info_vram_total").exists()]

    def _card(self, index: int, card: Path) -> Seen:
        unique = _text(card / "unique_id")
        pool = "vram"
        if unified := not unique and _text(card / "mem_info_vram_vendor").lower() in _NO_VENDOR:
            pool = _larger_pool(card)
            unified = pool == "gtt"
        total = _number(card / f"mem_info_{pool}_total")
        free = max(0, total - _number(card / f"mem_info_{pool}_used"))
        if total <= 0:
            raise SourceError(f"GPU {index} reports no memory")
        if unified:  # its pages are the machine's, which others use as well
            free = min(free, machine_memory(self._root).available)
        name = str(index)
        product = _text(card / "product_name") or f"AMD GPU {_text(card / 'device')}".strip()
        uuid = f"GPU-{unique}" if unique else name
        return Seen(name, uuid, index, product, Kind.GPU, unified=unified, total=total, free=free, visible=name)


def _larger_pool(card: Path) -> str:
    """Of a card that looks like an APU: what is carved out for it, or what it may map, whichever ROCm computes in."""
    with contextlib.suppress(FileNotFoundError):
        if _number(card / "mem_info_gtt_total") > _number(card / "mem_info_vram_total"):
            return "gtt"
    return "vram"


def _number(path: Path) -> int:
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not (text.isascii() and text.isdecimal()):
        raise SourceError(f"{path} holds no number")
    return int(text)


def _text(path: Path) -> str:
    """Empty where the driver has no such file."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""
