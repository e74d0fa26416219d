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
_IDS = {"bash": "_vllm_proxy_ids", "zsh": "_vllm_proxy_ids", "fish": "(_vllm_proxy_ids)"}
# Asks the daemon of the `--state-dir` that was typed before; a ~ in it stands there as it was typed. With
# `--state-dir=DIR` only fish comes here: for the others the id is complete by then.
_PREAMBLE = {
    "bash": r"""_vllm_proxy_ids() {
  local -a place
  local at value
  for ((at = 1; at < COMP_CWORD; at++)); do
    [[ ${COMP_WORDS[at]} == --state-dir ]] || continue
    value=${COMP_WORDS[at + 1]}
    [[ $value == "~/"* ]] && value=$HOME/${value#*/}
    place=(--state-dir "$value")
  done
  compgen -W "$(vllm-proxy ids "${place[@]}" 2>/dev/null)" -- "$1"
}""",
    "zsh": r"""_vllm_proxy_ids() {
  local -a ids place
  local -i at
  for ((at = 2; at < CURRENT; at++)); do
    [[ $words[at] == --state-dir ]] && place=(--state-dir "${(Q)words[at + 1]/#\~\//$HOME/}")
  done
  ids=(${(f)"$(vllm-proxy ids $place 2>/dev/null)"})
  compadd -a ids
}""",
    "fish": r"""function _vllm_proxy_ids
  set -l place
  set -l before ''
  for token in (commandline -opc)
    if test "$before" = --state-dir
      set place --state-dir (string replace -r '^~/' "$HOME/" -- $token)
    else if string match -q -- '--state-dir=*' $token
      set place --state-dir (string replace -- --state-dir= '' $token | string replace -r '^~/' "$HOME/")
    end
    set before $token
  end
  vllm-proxy ids $place 2>/dev/null
end""",
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
