"""What shells complete: as the parser has it, with ids of the running daemon."""

import subprocess
from pathlib import Path

import pytest

from tests import completions
from vllm_proxy.arguments import SHELLS
from vllm_proxy.cli import run
from vllm_proxy.commands.completion import FILES

COMPLETE = """
source "$0"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_shtab_vllm_proxy vllm-proxy "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD - 1))]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
IDS = """#!/bin/sh
case "$*" in
  ids) printf "chat\\norg/embed\\n" ;;
  "ids --state-dir "*) echo "of$3" ;;
esac
"""


@pytest.mark.parametrize("shell", SHELLS)
def test_completions_are_as_the_parser_is(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in the package, and what is printed; `python -m tests.pages` writes them anew."""
    file = completions.FOLDER / FILES[shell]
    assert file.read_text(encoding="utf-8") == completions.made()[file], "run `python -m tests.pages`"
    assert run(["completion", shell]) == 0
    assert capsys.readouterr().out.rstrip("\n") == file.read_text(encoding="utf-8").rstrip("\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vllm-proxy st", {"start", "stop", "status"}),
        ("vllm-proxy start ", {"chat", "org/embed"}),
        ("vllm-proxy start --state-dir /var/x ", {"of/var/x"}),
        ("vllm-proxy status --state-dir ~/x --json ", {"of/home/me/x"}),
        ("vllm-proxy status --w", {"--watch"}),
        ("vllm-proxy keys r", {"rotate", "revoke"}),
        ("vllm-proxy completion ", set(SHELLS)),
        ("vllm-proxy help op", {"operating"}),
        ("vllm-proxy id", set()),
    ],
)
def test_bash_completes(tmp_path: Path, line: str, expected: set[str]) -> None:
    """Commands, options, topics, and the ids that the daemon has, of the state directory that was typed before."""
    (tmp_path / "vllm-proxy").write_text(IDS)
    (tmp_path / "vllm-proxy").chmod(0o755)
    file = completions.FOLDER / FILES["bash"]
    done = subprocess.run(
        ["bash", "-c", COMPLETE, str(file), *line.split(" ")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "/home/me"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == expected
