"""`vllm_proxy/completions`: what makes bash, zsh and fish complete our commands; `python -m tests.pages` writes them.

Made of the parser by shtab. Ids are asked of the running daemon (`vllm-proxy ids`), topics are those of the manual.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import shtab

from vllm_proxy.arguments import SHELLS, parser
from vllm_proxy.commands.completion import FILES
from vllm_proxy.help import TOPICS

FOLDER = Path(__file__).parent.parent / "vllm_proxy/completions"
_IDS = {"bash": "_vllm_proxy_ids", "zsh": "_vllm_proxy_ids", "fish": "(vllm-proxy ids 2>/dev/null)"}
_PREAMBLE = {
    "bash": '_vllm_proxy_ids() {\n  compgen -W "$(vllm-proxy ids 2>/dev/null)" -- "$1"\n}',
    "zsh": '_vllm_proxy_ids() {\n  local -a ids\n  ids=(${(f)"$(vllm-proxy ids 2>/dev/null)"})\n  compadd -a ids\n}',
    "fish": "",
}
_COMPLETED: Mapping[str, Any] = {
    "FILE": shtab.FILE,
    "OUT": shtab.FILE,
    "DIR": shtab.DIRECTORY,
    "ID": _IDS,
}


def made() -> dict[Path, str]:
    """The text of each file."""
    return {FOLDER / FILES[shell]: _of(shell) for shell in SHELLS}


def _of(shell: str) -> str:
    whole = parser()
    for command in _commands(whole):
        for action in command._actions:
            if action.metavar == "TOPIC":
                action.choices = TOPICS
            elif completed := _COMPLETED.get(str(action.metavar)):
                action.complete = completed  # type: ignore[attr-defined]
    text = str(shtab.complete(whole, shell, preamble=_PREAMBLE))
    return _sourced(text) if shell == "zsh" else text


def _sourced(text: str) -> str:
    """What registers itself where it is evaluated does so too where a file is read: `source <(vllm-proxy …)`."""
    before = "[[ $zsh_eval_context[-1] == eval ]]"
    assert before in text
    return text.replace(before, "[[ $zsh_eval_context[-1] == (eval|file) ]]")


def _commands(outer: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """It, and all below it."""
    found = [outer]
    for action in outer._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found += _commands(inner)
    return found
