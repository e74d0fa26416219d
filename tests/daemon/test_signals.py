"""Signals to a daemon that only begins, and from a parent that has blocked or ignored them."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import clean_environment, daemon, fake_engines, free_port, running_command

MODEL = '[models.chat]\nmodel = "org/chat"\n'
# `vllm-proxy` that sends itself a signal once, where Python says first that it does what is named.
SENDS = """
import os, sys
number, event, what = int(sys.argv.pop(1)), sys.argv.pop(1), sys.argv.pop(1)
def hook(now, about):
    global number
    if number and now == event and what in str(about):
        sent, number = number, 0
        os.kill(os.getpid(), sent)
sys.addaudithook(hook)
from vllm_proxy.__main__ import main
main()
"""
MOMENTS = [
    ("import", "vllm_proxy.cli"),
    ("import", "vllm_proxy.daemon"),
    ("open", "models.toml"),
    ("fcntl.flock", ""),  # of the state directory
    ("socket.bind", "control.sock"),
]
BLOCKS = """
import os, signal, sys
numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
for number in numbers:
    signal.signal(number, signal.SIG_IGN)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", MOMENTS, ids=" ".join)
def test_a_signal_ends_a_daemon_that_only_begins(tmp_path: Path, moment: tuple[str, str], number: int) -> None:
    """With status 0 and without a word: no engine was touched yet."""
    (tmp_path / "models.toml").write_text(MODEL)
    command = ("serve", "--port", str(free_port()), "--state-dir", "state")
    done = subprocess.run(
        [sys.executable, "-c", SENDS, str(number), *moment, *command],
        cwd=tmp_path, env=clean_environment(), check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list((tmp_path / "state").glob("**/*.sock"))


@pytest.mark.parametrize("moment", MOMENTS, ids=" ".join)
async def test_a_sighup_to_a_daemon_that_only_begins_changes_nothing(tmp_path: Path, moment: tuple[str, str]) -> None:
    """It reads the file anyway."""
    (tmp_path / "models.toml").write_text("# no models\n")
    program = (sys.executable, "-c", SENDS, str(int(signal.SIGHUP)), *moment)
    async with running_command(tmp_path, "serve", program=program) as running:
        assert await running.stop() == 0


async def test_what_a_parent_has_blocked_or_ignored_is_neither(tmp_path: Path, port_start: int) -> None:
    """Not for the daemon, which follows its engines and stops, nor for engines, which get each signal as it is."""
    async with daemon(fake_engines(port_start) + MODEL, tmp_path, below=(sys.executable, "-c", BLOCKS)) as running:
        await running.all_ready()
        instance = (await running.get("/models/chat"))["status"]["instances"][0]
        status = Path(f"/proc/{instance['pid']}/status").read_text()
        blocked, ignored = (int(re.findall(rf"{name}:\t(\w+)", status)[0], 16) for name in ("SigBlk", "SigIgn"))
        bits = sum(1 << (number - 1) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD))
        assert (blocked, ignored & bits) == (0, 0)
        running.process.send_signal(signal.SIGHUP)
        await running.until(lambda _: running.notes.messages.count("READY=1") == 2)
        assert await running.stop() == 0
