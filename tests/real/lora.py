"""Adapters for the demo's chat model, SmolLM2-135M: folders as PEFT writes them, with weights that nobody trained.

Written by hand, so that no test needs torch or numpy: a safetensors file is a length, a JSON header, and the numbers.
"""

import json
import random
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

_LAYERS, _HIDDEN, _VALUES = 30, 576, 192
_MODULES = {"q_proj": _HIDDEN, "v_proj": _VALUES}  # how many numbers come out of each
_SIZE = 0.1  # of the numbers at most: enough for another greedy answer, and not for nonsense alone


def make_adapter(folder: Path, rank: int = 8, seed: int = 1, **config: object) -> Path:
    """A folder, made or made anew. Each `seed` answers differently. `config`: more of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    text = json.dumps(known | {"target_modules": [*_MODULES]} | config)
    (folder / "adapter_config.json").write_text(text)
    (folder / "adapter_model.safetensors").write_bytes(b"".join(_safetensors(rank, random.Random(seed))))
    return folder


def _safetensors(rank: int, numbers: random.Random) -> Iterator[bytes]:
    """The file, in pieces."""
    shapes = {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{part}.weight": shape
        for layer in range(_LAYERS)
        for module, out in _MODULES.items()
        for part, shape in (("A", [rank, _HIDDEN]), ("B", [out, rank]))
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    yield struct.pack("<Q", len(text)) + text
    for shape in shapes.values():
        yield array("f", (numbers.uniform(-_SIZE, _SIZE) for _ in range(shape[0] * shape[1]))).tobytes()
