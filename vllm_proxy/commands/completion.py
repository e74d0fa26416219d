"""`completion`: prints the file that makes a shell complete commands, options and ids; they are part of the package.

vllm-proxy completion bash > ~/.local/share/bash-completion/completions/vllm-proxy
"""

import argparse
from importlib.resources import files

from vllm_proxy.commands.outcome import OK
from vllm_proxy.commands.output import write

FILES = {"bash": "vllm-proxy.bash", "zsh": "_vllm-proxy", "fish": "vllm-proxy.fish"}


def run(options: argparse.Namespace) -> int:
    """Nothing is written anywhere."""
    write(files("vllm_proxy").joinpath("completions", FILES[options.shell]).read_text(encoding="utf-8").rstrip("\n"))
    return OK
