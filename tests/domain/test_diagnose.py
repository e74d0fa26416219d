"""Why an engine ended."""

import pytest

from vllm_proxy.domain.diagnose import Exit, diagnose

ARGPARSE = [
    "usage: vllm serve [model_tag] [options]",
    "vllm serve: error: unrecognized arguments: --no-such-option",
    "",
]
TRACEBACK = [
    "INFO 07-01 Loading model weights",
    "ValueError: No available memory for the cache blocks.",
    "ERROR 07-01 EngineCore failed to start.",
]


def test_refused_options_are_invalid_arguments() -> None:
    """Exit 2 before it was ready is argparse's, and its last line says which option."""
    found = diagnose(Exit(2, None), ARGPARSE, was_ready=False)
    assert found.reason == "invalid_arguments"
    assert found.message.endswith("unrecognized arguments: --no-such-option")


@pytest.mark.parametrize("code", [126, 127])
def test_a_command_that_does_not_run_is_not_found(code: int) -> None:
    """What a shell or a wrapper answers for a command it cannot run."""
    found = diagnose(Exit(code, None), ["env: 'vllm': No such file or directory"], was_ready=False)
    assert found.reason == "command_not_found"
    assert "No such file" in found.message


@pytest.mark.parametrize("code", [2, 126, 127])
def test_an_engine_that_served_had_a_command_and_options(code: int) -> None:
    """The same exit codes mean a crash once it had been ready."""
    assert diagnose(Exit(code, None), [], was_ready=True).reason == "crashed"


def test_a_taken_port_is_told_from_a_crash() -> None:
    """The port may be lost to another program between its choice and vLLM's bind."""
    tail = ["OSError: [Errno 98] Address already in use", "ERROR: exiting"]
    assert diagnose(Exit(1, None), tail, was_ready=False).reason == "port_in_use"


@pytest.mark.parametrize(("was_ready", "when"), [(True, "while it served"), (False, "before it was ready")])
def test_sigkill_from_elsewhere_is_killed(was_ready: bool, when: str) -> None:  # noqa: FBT001 - a parameter of the test
    """Nobody but the kernel or a person sends SIGKILL to an engine; the message says where to look."""
    found = diagnose(Exit(None, 9), TRACEBACK, was_ready=was_ready)
    assert found.reason == "killed"
    assert when in found.message
    assert "dmesg" in found.message


@pytest.mark.parametrize(
    ("ended", "shown"),
    [
        (Exit(0, None), "exit code 0"),
        (Exit(1, None), "exit code 1"),
        (Exit(None, 11), "signal SIGSEGV"),
        (Exit(None, 99), "a signal"),
        (Exit(None, None), "exit code unknown"),
    ],
)
def test_any_other_end_is_a_crash(ended: Exit, shown: str) -> None:
    """Exit 0 too, since vLLM exits so when it dies, and an adopted engine whose code cannot be known."""
    found = diagnose(ended, [], was_ready=True)
    assert (found.reason, found.message) == ("crashed", f"the engine ended while it served ({shown})")


def test_a_crash_names_its_last_error() -> None:
    """The cause is the last line that speaks of an error, not merely the last line."""
    found = diagnose(Exit(1, None), [*TRACEBACK[:2], "bye"], was_ready=False)
    assert found.message.endswith("(exit code 1): ValueError: No available memory for the cache blocks.")


def test_a_crash_without_an_error_shows_its_last_line() -> None:
    """Blank lines at the end hide nothing."""
    found = diagnose(Exit(1, None), ["first", "  Segmentation fault  ", "", "  "], was_ready=False)
    assert found.message.endswith(": Segmentation fault")
