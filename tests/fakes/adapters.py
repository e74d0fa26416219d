"""Adapters that the fake takes: folders as PEFT writes them, whose weights are but bytes."""

import hashlib
import json
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(folder: Path, rank: int = 8, weights: bytes = b"weights", **config: object) -> Path:
    """A folder, made or made anew. `config`: more of its configuration; `fake=...` a fault (`fake_lora`)."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    (folder / CONFIG).write_text(json.dumps(known | config))
    (folder / WEIGHTS).write_bytes(weights)
    return folder


def voice(name: str, folder: Path) -> str:
    """What the fake puts in front of each answer of an adapter that it was given with these files."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes() + (folder / WEIGHTS).read_bytes())
    return f"{name}@{digest.hexdigest()[:8]}: "
