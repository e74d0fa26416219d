"""What the command line says to what it does not know."""

import re

import pytest

from vllm_proxy.arguments import _OTHERS_WORDS, parse, parser


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("first", ["--state-dir", "--state-dir=x", "-c", "--unknown"])
def test_an_option_before_the_command_is_told_where_it_belongs(capsys: pytest.CaptureFixture[str], first: str) -> None:
    """Not that its value is no command."""
    name = first.partition("=")[0]
    wanted = f"vllm-proxy: error: options follow the command: vllm-proxy COMMAND {name} ..."
    assert _refused(capsys, first, "x", "status") == wanted


@pytest.mark.parametrize("word", ["ps", "list", "pull", "run", "rm"])
def test_a_command_of_another_server_is_told_what_does_it_here(capsys: pytest.CaptureFixture[str], word: str) -> None:
    """`ollama ps` is `vllm-proxy status`, and so on."""
    assert _refused(capsys, word).startswith(f"vllm-proxy: error: there is no command {word}: ")


def test_no_command_has_the_name_of_what_there_is_not() -> None:
    """A hint would hide it."""
    commands = set(re.findall(r"^    (\w+) ", parser().format_help(), re.MULTILINE))
    assert "status" in commands
    assert not commands & _OTHERS_WORDS.keys()


@pytest.mark.parametrize("arguments", [["--version"], ["--vers"], ["-h"]])
def test_what_may_stand_alone_does(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """The version and the help, exit status 0."""
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 0
    assert "vllm-proxy" in capsys.readouterr().out
