"""What the tests on GPUs need: GPUs, and a model of random weights that any number of them can share."""

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_proxy.demo.prepare import chat_model

# Small, and divisible by the sizes of tensor parallelism.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 49152,
    "max_position_embeddings": 2048, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@functools.cache
def gpu_count() -> int:
    """How many GPUs of NVIDIA's there are."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    found = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False)
    return found.stdout.count("GPU ") if found.returncode == 0 else 0


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Skips a test where there are fewer."""
    return pytest.mark.skipif(
        gpu_count() < count, reason=f"needs {count} of NVIDIA's GPUs, and there are {gpu_count()}"
    )


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and the tokenizer of the demo's chat model: for `load_format = "dummy"`."""
    chat = chat_model(os.environ)
    folder = tmp_path_factory.mktemp("model")
    for file in chat.iterdir():
        if file.suffix in {".json", ".jinja", ".txt"} and file.name != "config.json":
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder
