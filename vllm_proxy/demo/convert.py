"""Converts the GGUF file of a wheel into a folder that vLLM can serve. A program, run in a process of its own.

vLLM 0.32 for the CPU does not read GGUF. transformers takes seconds and a gigabyte to import, so the daemon must never
import this module; `prepare.py` runs it with `python -m vllm_proxy.demo.convert GGUF FOLDER`.
"""

import sys
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Write weights (bfloat16 safetensors), configuration and tokenizer of `gguf` into `folder`."""
    import torch  # noqa: PLC0415 - of the demo group, present only where the demo runs
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415 - as above

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
