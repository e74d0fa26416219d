"""Whose the processes on a device are, with real processes: the engine's of ours, or another program's."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_proxy.domain.inventory import Foreign
from vllm_proxy.engine.holders import Holders, Programs, name_of
from vllm_proxy.engine.ownership import Identity, Owned
from vllm_proxy.engine.proc import KERNEL, PID_LIMIT, Kernel, Process, is_first_pid_namespace, look_up

SLEEP = "import sys; sys.stdin.read()"
NOBODY = PID_LIMIT + 1  # no process has this number


@contextlib.contextmanager
def start() -> Iterator[subprocess.Popen[bytes]]:
    """A program that waits, in a session of its own, once it runs: until then it is called as who started it.

    Its arguments hold a secret.
    """
    command = [sys.executable, "-c", f"print(flush=True); {SLEEP}", "--api-key", "sk-verysecret"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


@pytest.fixture
def engine() -> Iterator[subprocess.Popen[bytes]]:
    """One that counts as an engine."""
    with start() as process:
        yield process
        process.kill()


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """One that does not."""
    with start() as process:
        yield process
        process.kill()


def owned(process: subprocess.Popen[bytes], kernel: Kernel = KERNEL) -> Owned:
    """As the daemon knows an engine."""
    found = look_up(process.pid)
    assert found is not None
    return Owned(Identity(process.pid, found.started), kernel)


def test_each_process_is_an_engines_or_another_programs(
    engine: subprocess.Popen[bytes], other: subprocess.Popen[bytes]
) -> None:
    """On each device apart. A process that is gone has nothing."""
    listed = {"0": {engine.pid: 30, other.pid: 7, NOBODY: 1, 0: 1}, "1": {engine.pid: 5}, "2": {}}
    found = Programs(pids_are_ours=True).holders(listed, {"chat/0": owned(engine)})
    foreign = (Foreign(other.pid, name_of(other.pid), 7),)
    assert found == {"0": Holders({"chat/0": 30}, foreign), "1": Holders({"chat/0": 5}), "2": Holders()}


def test_what_an_engines_processes_have_adds_up() -> None:
    """Those of vLLM's workers, on one device or on several."""
    fork = "import os, sys; child = os.fork(); child and print(child, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", fork]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as first:
        assert first.stdout is not None
        child = int(first.stdout.readline())
        listed = {"0": {first.pid: 30, child: 12}, "1": {child: 5}}
        found = Programs(pids_are_ours=True).holders(listed, {"chat/0": owned(first)})
        assert {device: holders.held for device, holders in found.items()} == {"0": {"chat/0": 42}, "1": {"chat/0": 5}}
        os.killpg(first.pid, signal.SIGKILL)


def test_a_program_is_named_and_its_arguments_are_not(other: subprocess.Popen[bytes]) -> None:
    """They may hold secrets; one that is gone has a name all the same."""
    assert name_of(other.pid).startswith("python")
    assert name_of(NOBODY) == "another program"


def test_a_name_is_printable() -> None:
    """A program may call itself what it likes."""
    rename = "import pathlib, sys; pathlib.Path('/proc/self/comm').write_bytes(b'a\\n\\x1b[2J\\xff'); print(); "
    with subprocess.Popen(
        [sys.executable, "-c", rename + "sys.stdout.flush();" + SLEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert name_of(process.pid) == "a??[2J\N{REPLACEMENT CHARACTER}"
        process.kill()


def test_in_a_container_no_process_is_foreign_before_one_of_ours_was_found(
    engine: subprocess.Popen[bytes], other: subprocess.Popen[bytes]
) -> None:
    """The driver may report pids of the machine there, and that of an engine may be another's here."""
    programs = Programs(pids_are_ours=False)
    engines = {"chat/0": owned(engine)}
    assert programs.holders({"0": {other.pid: 7}}, engines) == {"0": Holders()}
    listed = {"0": {other.pid: 7}, "1": {engine.pid: 5}}
    foreign = (Foreign(other.pid, name_of(other.pid), 7),)
    assert programs.holders(listed, engines) == {"0": Holders({}, foreign), "1": Holders({"chat/0": 5})}
    assert programs.holders({"0": {other.pid: 7}}, {}) == {"0": Holders({}, foreign)}


class CountingKernel(Kernel):
    """Counts what is read of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_up: list[int] = []
        self.error: OSError | None = None

    def look_up(self, pid: int) -> Process | None:
        """By an engine, to learn whether it is its."""
        self.looked_up.append(pid)
        if self.error:
            raise self.error
        return super().look_up(pid)


def test_whose_a_process_is_is_found_out_once(engine: subprocess.Popen[bytes], other: subprocess.Popen[bytes]) -> None:
    """Only of those that are listed, and anew when other engines run."""
    kernel = CountingKernel()
    programs, engines = Programs(pids_are_ours=True), {"chat/0": owned(engine, kernel)}
    listed = {"0": {engine.pid: 30, other.pid: 7}}
    first = programs.holders(listed, engines)
    asked = len(kernel.looked_up)
    assert {engine.pid, other.pid} <= set(kernel.looked_up) <= {engine.pid, other.pid, os.getpid(), os.getppid(), 1, 0}
    assert programs.holders(listed, engines) == first
    assert len(kernel.looked_up) == asked
    assert programs.holders(listed, {**engines, "code/0": owned(other, kernel)})["0"].held == {
        "chat/0": 30,
        "code/0": 7,
    }


def test_a_process_of_which_it_cannot_be_told_whose_it_is_counts_for_nobody(engine: subprocess.Popen[bytes]) -> None:
    """An engine of ours must not be called foreign because /proc could not be read for a moment."""
    kernel = CountingKernel()
    kernel.error = OSError("too many open files")
    programs, engines = Programs(pids_are_ours=True), {"chat/0": owned(engine, kernel)}
    assert programs.holders({"0": {engine.pid: 30}}, engines) == {"0": Holders()}
    kernel.error = None
    assert programs.holders({"0": {engine.pid: 30}}, engines) == {"0": Holders({"chat/0": 30})}


def test_the_first_namespace_of_a_machine_is_known() -> None:
    """A new one is not it."""
    script = "from vllm_proxy.engine.proc import is_first_pid_namespace as first; print(first())"
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c", script]
    inside = subprocess.run(command, capture_output=True, text=True, check=False)
    if inside.returncode:
        pytest.skip("no namespace can be made here")
    assert inside.stdout == "False\n"
    assert is_first_pid_namespace() == (Path("/proc/self/ns/pid").stat().st_ino == 4026531836)
