"""A command that only asks the daemon is not to wait for what the daemon is made of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import clean_environment
from vllm_proxy import arguments
from vllm_proxy.domain.keys import Scope

# Each takes longer to import than such a command may take in all.
HEAVY = {
    "aiohttp",
    "asyncio",
    "dotenv",
    "httptools",
    "markdown_it",
    "msgspec",
    "pydantic",
    "rich",
    "structlog",
    "uvloop",
}
SHOWS_IMPORTS = """
import json, sys
from vllm_proxy.cli import run
try:
    run(sys.argv[1:])
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
THIN = [
    *(
        "status",
        "status chat --watch",
        "events -f",
        "requests",
        "ids",
        "logs chat",
        "start chat",
        "stop chat",
        "reload",
    ),
    *("usage", "help 78", "completion bash", "schema", "--version"),
]


@pytest.mark.parametrize("command", THIN)
def test_a_command_that_only_asks_imports_little(command: str, tmp_path: Path) -> None:
    """Neither an event loop nor a validator, a logger or an HTTP server."""
    found = subprocess.run(
        [sys.executable, "-c", SHOWS_IMPORTS, *command.split()],
        cwd=tmp_path, env=clean_environment() | {"VLLM_PROXY_STATE_DIR": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    imported = set(json.loads(found.stdout.splitlines()[-1]))
    assert "argparse" in imported
    assert not imported & HEAVY, found.stderr


def test_the_scopes_of_the_command_line_are_those_of_keys() -> None:
    """They are written down twice, since the module of keys takes a while."""
    assert tuple(map(str, Scope)) == arguments.SCOPES
