"""The exposition of vLLM 0.32, as a real engine on a processor gave it (vllm-0.32-metrics.txt), with own numbers.

Nothing has been counted of a new engine; what the recorded one had counted is left out, and what it was is kept.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

RECORDED = Path(__file__).with_name("vllm-0.32-metrics.txt")
_COUNTED = re.compile(r"vllm:\w+_(total|bucket|count|sum)|http_\w+")
_FAMILY = re.compile(r"(?:# (?:HELP|TYPE) )?([\w:]+)")
_PROCESS = re.compile(r"python_|process_")


class Exposition:
    """Of one engine. `name`: the model's."""

    def __init__(self, name: str, *, of_vllm: bool) -> None:
        created = os.environ.get("PROMETHEUS_DISABLE_CREATED_SERIES", "").lower() not in {"true", "1", "t"}
        escaped = name.replace("\\", r"\\").replace('"', r"\"")
        self._lines: list[tuple[str, str, str]] = []  # a series, its name, its value; or a comment and nothing
        for line in RECORDED.read_text(encoding="utf-8").splitlines():
            family = _FAMILY.match(line)[1]  # type: ignore[index] # each line has one
            if (family.endswith("_created") and not created) or not (of_vllm or _PROCESS.match(family)):
                continue
            if line.startswith("#"):
                self._lines.append((line, "", ""))
                continue
            series, _, value = line.replace('model_name="chat"', f'model_name="{escaped}"').rpartition(" ")
            self._lines.append((f"{series} ", family, "0.0" if _COUNTED.fullmatch(family) else value))

    def text(self, numbers: Mapping[str, float]) -> str:
        """With these numbers, by the names of their series without the prefix."""
        own = {f"vllm:{name}": str(float(value)) for name, value in numbers.items()}
        return "".join(f"{series}{own.get(name, value)}\n" for series, name, value in self._lines)
