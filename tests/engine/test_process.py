"""One engine's processes, with real ones: found, ended and reaped to the last.

An engine's output goes to a pipe here, where every line is an event and its end means that nobody lives who holds it.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from vllm_proxy.domain.diagnose import Exit
from vllm_proxy.engine import process
from vllm_proxy.engine.ownership import Identity, Owned
from vllm_proxy.engine.proc import KERNEL, Process, look_up
from vllm_proxy.engine.process import EngineProcess, end_processes, run_shielded
from vllm_proxy.engine.state import EngineRecord, StateDirectory
from vllm_proxy.fleet.orphans import end_orphans

LONG = 60.0  # a grace that no test waits out


@pytest.fixture(autouse=True, scope="module")
def subreaper() -> None:
    """As the daemon does at its start."""
    process.become_subreaper()


class Output:
    """The reading end of a named pipe that stands in for a log file."""

    def __init__(self, path: Path, reader: asyncio.StreamReader) -> None:
        self.path = path
        self._reader = reader

    async def line(self) -> str:
        """The next line, "" at the end."""
        return (await self._reader.readline()).decode().rstrip("\n")

    async def rest(self) -> str:
        """Everything up to the death of the last process that could write."""
        return (await self._reader.read()).decode()


@pytest.fixture
async def output(tmp_path: Path) -> AsyncIterator[Output]:
    """A pipe for one engine."""
    path = tmp_path / "output"
    os.mkfifo(path)
    reader = asyncio.StreamReader()
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), file
    )
    yield Output(path, reader)
    transport.close()


@contextlib.asynccontextmanager
async def engine(argv: Sequence[str], output: Path, folder: Path) -> AsyncIterator[EngineProcess]:
    """A spawned engine, still waiting for its release; whatever the test does, nothing of it stays."""
    spawned = EngineProcess.spawn(argv, dict(os.environ), folder, output)
    try:
        yield spawned
    finally:
        await run_shielded(spawned.end, 0)


@contextlib.contextmanager
def stranger(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that was not started by the code under test; it goes on at a line on its standard input."""
    pipe = subprocess.PIPE
    with subprocess.Popen(argv or ("cat",), start_new_session=True, stdin=pipe, stdout=pipe) as child:
        try:
            yield child
        finally:
            child.kill()


def started(pid: int) -> int:
    """When a process that is there was started."""
    found = look_up(pid)
    assert found is not None
    return found.started


def members(pid: int, start: int) -> list[Process]:
    """The processes of the engine whose first one this is."""
    return Owned(Identity(pid, start)).find()


def shell(script: str) -> list[str]:
    """A program in the shell's language."""
    return ["sh", "-c", script]


# What /proc says


def test_this_process_is_found() -> None:
    """Alive, in its session, started after boot."""
    found = look_up(os.getpid())
    assert found is not None
    assert (found.pid, found.alive, found.session) == (os.getpid(), True, os.getsid(0))
    assert found.started > 0


def test_a_process_that_is_not_there_is_none() -> None:
    """A pid beyond the kernel's maximum belongs to nobody."""
    assert look_up(2**22 + 1) is None


@pytest.mark.parametrize("name", ["with space", "a) R 1 1 (b", "((", "))) Z 0 0", "Z", "\u00e4\nb"])
def test_a_name_with_spaces_and_parentheses_is_parsed(tmp_path: Path, name: str) -> None:
    """A process cannot hide, nor seem dead, behind what it is called."""
    program = tmp_path / name
    program.write_text("#!/bin/sh\necho up\nread -r line\n")
    program.chmod(0o755)
    with stranger(str(program)) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        assert Path(f"/proc/{child.pid}/comm").read_text(encoding="utf-8", errors="replace").startswith(name[:8])
        assert look_up(child.pid) == Process(
            child.pid, alive=True, parent=os.getpid(), session=child.pid, started=started(child.pid)
        )
        assert [member.pid for member in members(child.pid, started(child.pid))] == [child.pid]


def test_a_zombie_is_not_alive() -> None:
    """It is found, since it must be reaped, but has ended."""
    with stranger("true") as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        found = look_up(child.pid)
        assert found is not None
        assert not found.alive
        assert [member.alive for member in members(child.pid, found.started)] == [False]


def test_a_process_whose_first_thread_alone_has_ended_is_alive() -> None:
    """The kernel shows such a process as a zombie, though its other threads run and hold its memory."""
    script = (
        "import ctypes, threading, sys\n"
        "main = threading.main_thread().native_id\n"
        "def rest():\n"
        "    while 'State:\\tZ' not in open(f'/proc/{main}/status').read(): pass\n"
        "    print(flush=True)\n"
        "    sys.stdin.read()\n"
        "threading.Thread(target=rest).start()\n"
        "ctypes.CDLL(None).syscall(60, 0)\n"  # exit, of this thread alone
    )
    with stranger(sys.executable, "-c", script) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        found = look_up(child.pid)
        assert found is not None
        assert found.alive
        child.kill()
        child.wait()
        assert look_up(child.pid) is None


# Sessions


async def test_members_are_found_also_when_the_leader_is_dead(output: Output, tmp_path: Path) -> None:
    """An API server that died leaves workers; until they are gone it is not reaped, and its session is its own."""
    script = "sleep 1000 & echo $!; sh -c 'sleep 1000 & echo $!'; kill -9 $$"
    async with engine(shell(script), output.path, tmp_path) as spawned:
        spawned.release()
        workers = {int(await output.line()), int(await output.line())}
        assert await spawned.exited == Exit(None, signal.SIGKILL)
        found = members(spawned.pid, spawned.started)
        assert {member.pid for member in found if member.alive} == workers
        assert await spawned.end(LONG)
        assert look_up(spawned.pid) is None
        assert await output.rest() == ""
        assert [look_up(worker) for worker in workers] == [None, None], "dead, and no zombie is left"


def test_members_of_a_later_session_with_the_same_pid_are_not_ours() -> None:
    """A leader that started at another time leads another session."""
    with stranger() as child:
        assert members(child.pid, started(child.pid) - 1) == []
        assert members(child.pid, started(child.pid) + 1) == []


async def test_grandchildren_are_reaped(output: Output, tmp_path: Path) -> None:
    """What an engine's own children started is dead and gone when it has ended, whoever was its parent."""
    script = "sh -c 'sh -c \"echo \\$\\$; exec sleep 1000\" & echo $$; wait' & echo $$; wait"
    async with engine(shell(script), output.path, tmp_path) as spawned:
        spawned.release()
        pids = {int(await output.line()) for _ in range(3)}
        assert spawned.pid in pids
        assert len(members(spawned.pid, spawned.started)) == 3
        assert await spawned.end(LONG)
        assert await output.rest() == ""
        assert [look_up(pid) for pid in pids] == [None] * 3
        assert members(spawned.pid, spawned.started) == []


async def test_only_the_leader_gets_sigterm_and_all_get_sigkill_after_the_grace(output: Output, tmp_path: Path) -> None:
    """Workers die at once of a SIGTERM of their own; a leader that does not end in time is killed with them."""
    worker = "trap 'echo worker got it' TERM; echo up; while :; do sleep 1000 & wait $!; done"
    leader = f'trap "echo leader got it" TERM; sh -c "{worker}" & echo up; while :; do wait; done'
    async with engine(shell(leader), output.path, tmp_path) as spawned:
        spawned.release()
        assert [await output.line(), await output.line()] == ["up", "up"]
        assert await spawned.end(0.2)
        assert await output.rest() == "leader got it\n"
        assert spawned.exited.result() == Exit(None, signal.SIGKILL)


async def test_a_leader_that_obeys_is_not_made_to_wait_for_the_grace(output: Output, tmp_path: Path) -> None:
    """It ends with its own exit code, at once, and its child, which ignores SIGTERM, after it."""
    script = "trap 'exit 7' TERM; sh -c \"trap '' TERM; echo up; while :; do sleep 1000; done\" & wait; wait"
    async with engine(shell(script), output.path, tmp_path) as spawned:
        spawned.release()
        assert await output.line() == "up"
        async with asyncio.timeout(LONG / 2):
            assert await spawned.end(LONG)
        assert await spawned.exited == Exit(7, None)
        assert await output.rest() == ""


async def test_another_process_with_the_recorded_pid_is_never_signalled() -> None:
    """The pid of a record may be anybody's by now; only with the recorded start time is it the engine."""
    with stranger() as child:
        for wrong in (started(child.pid) - 1, started(child.pid) + 1):
            assert await end_processes(Identity(child.pid, wrong), LONG)
        assert child.communicate(b"alive")[0] == b"alive"
        assert child.returncode == 0


async def test_a_recorded_pid_that_is_a_threads_number_now_is_nobodys() -> None:
    """Threads have numbers from the same row; the kernel then knows no process of that number."""
    numbers: list[int] = []
    done = threading.Event()
    up = threading.Barrier(2)

    def run() -> None:
        numbers.append(threading.get_native_id())
        up.wait()
        done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    up.wait()
    try:
        found = look_up(numbers[0])
        assert found is not None
        assert await end_processes(Identity(numbers[0], found.started), LONG)
        assert not KERNEL.send(numbers[0], signal.SIGKILL, lambda _: True)
    finally:
        done.set()
        thread.join()


async def test_orphans_of_an_earlier_daemon_are_ended_and_strangers_are_not(tmp_path: Path) -> None:
    """Every record is dealt with: one that runs, one whose pid is somebody else's, one that is gone."""
    with stranger("sleep", "1000") as left, stranger() as foreign, stranger("true") as gone:
        gone_started = started(gone.pid)
        gone.wait()
        records = [
            EngineRecord(f"chat/{index}", f"engine-{index}", pid, time, "127.0.0.1:8001", "secret", "/tmp/vp-none", "")
            for index, (pid, time) in enumerate([
                (left.pid, started(left.pid)), (foreign.pid, started(foreign.pid) - 1), (gone.pid, gone_started),
            ])
        ]  # fmt: skip
        with StateDirectory(tmp_path / "state") as state:
            for record in records:
                state.record(record)
            assert await end_orphans(records, state)
            assert state.orphans() == []
        assert left.wait() == -signal.SIGTERM
        assert foreign.communicate(b"alive")[0] == b"alive"


# The gate


async def test_a_spawned_engine_runs_nothing_before_its_release(output: Output, tmp_path: Path) -> None:
    """It is a shell that waits; released, it becomes the command with the same pid, in the folder, with the output."""
    async with engine(shell("echo $$ $PWD; cat; echo bad >&2"), output.path, tmp_path) as spawned:
        assert members(spawned.pid, spawned.started) == [look_up(spawned.pid)]
        assert not spawned.exited.done()
        spawned.release()
        assert await output.rest() == f"{spawned.pid} {tmp_path}\nbad\n"
        assert await spawned.exited == Exit(0, None)


async def test_an_engine_that_is_never_released_ends_by_itself(tmp_path: Path, output: Output) -> None:
    """A daemon that is killed before it let go closes the pipe; another running engine does not keep it open."""
    async with (
        engine(shell("echo ran"), output.path, tmp_path) as held,
        engine(["sleep", "1000"], tmp_path / "other.log", tmp_path) as other,
    ):
        other.release()
        assert held._child is not None
        assert held._child.stdin is not None
        held._child.stdin.close()
        assert (await held.exited).code
        assert await output.rest() == ""
        assert not other.exited.done()


async def test_an_engine_is_ended_before_its_release(output: Output, tmp_path: Path) -> None:
    """A stop before the release leaves nothing, and the command never ran."""
    async with engine(shell("echo ran"), output.path, tmp_path) as spawned:
        assert await spawned.end(LONG)
        assert await output.rest() == ""
        assert look_up(spawned.pid) is None


async def test_the_release_of_an_engine_that_died_before_it_is_no_error(tmp_path: Path) -> None:
    """The pipe has no other end then; its exit tells the rest."""
    async with engine(["true"], tmp_path / "log", tmp_path) as spawned:
        os.kill(spawned.pid, signal.SIGKILL)
        assert await spawned.exited == Exit(None, signal.SIGKILL)
        spawned.release()
        assert await spawned.end(LONG)


# Exits and output


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", Exit(0, None)),
        ("exit 3", Exit(3, None)),
        ("kill -9 $$", Exit(None, signal.SIGKILL)),
        ("kill -15 $$", Exit(None, signal.SIGTERM)),
        ("exit 137", Exit(137, None)),
    ],
)
async def test_exit_code_and_signal_are_told(tmp_path: Path, script: str, expected: Exit) -> None:
    """Either the one or the other, never mixed up."""
    async with engine(shell(script), tmp_path / "log", tmp_path) as spawned:
        spawned.release()
        assert await spawned.exited == expected


async def test_a_leader_that_was_killed_keeps_its_exit(output: Output, tmp_path: Path) -> None:
    """To end and reap a session does not swallow how its leader ended."""
    async with engine(shell("trap '' TERM; echo up; exec sleep 1000"), output.path, tmp_path) as spawned:
        spawned.release()
        assert await output.line() == "up"
        assert await spawned.end(0)
        assert spawned.exited.result() == Exit(None, signal.SIGKILL)


async def test_a_leader_that_is_a_zombie_already_is_left_to_who_started_it() -> None:
    """To sweep a session does not reap its leader: the exit code would be lost to the one that waits for it."""
    with stranger(*shell("exit 5")) as child:
        time = started(child.pid)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - at once
        assert await end_processes(Identity(child.pid, time), LONG)
        assert child.wait() == 5


@pytest.mark.parametrize("command", ["/nowhere/vllm", "no-such-program-anywhere"])
async def test_a_command_that_does_not_exist_ends_with_127(tmp_path: Path, command: str) -> None:
    """The shell's answer, with a line in the log that names it."""
    log = tmp_path / "log"
    async with engine([command, "serve"], log, tmp_path) as spawned:
        spawned.release()
        assert await spawned.exited == Exit(127, None)
        assert command in log.read_text()


async def test_a_command_that_may_not_run_ends_with_126(tmp_path: Path) -> None:
    """A file that is no program is told apart from one that is not there."""
    (tmp_path / "vllm").write_text("no program")
    async with engine([str(tmp_path / "vllm")], tmp_path / "log", tmp_path) as spawned:
        spawned.release()
        assert await spawned.exited == Exit(126, None)


async def test_output_lands_in_a_private_log_behind_what_is_there(tmp_path: Path) -> None:
    """Both streams, appended, in a file that only its owner may read, whatever the umask allows."""
    log = tmp_path / "log"
    before = os.umask(0)
    try:
        for words in ("one", "two"):
            async with engine(shell(f"echo {words}; echo {words} failed >&2"), log, tmp_path) as spawned:
                spawned.release()
                await spawned.exited
    finally:
        os.umask(before)
    assert log.read_text() == "one\none failed\ntwo\ntwo failed\n"
    assert log.stat().st_mode & 0o777 == 0o600


async def test_arguments_reach_the_engine_as_they_are(output: Output, tmp_path: Path) -> None:
    """The gate is a shell, but nothing of a command line is ever interpreted by it."""
    odd = ["a b", "$HOME", "`id`", "*", "'", '"', "", "-n", "a\nb", "\u00e4"]
    program = [sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *odd]
    async with engine(program, output.path, tmp_path) as spawned:
        spawned.release()
        assert await output.line() == ascii(odd)


async def test_an_engine_leads_a_session_and_holds_no_descriptor_of_ours(output: Output, tmp_path: Path) -> None:
    """No terminal's Ctrl-C reaches it; sockets and pipes of the daemon stay the daemon's."""
    async with engine(shell("ls -l /proc/self/fd | wc -l; cat"), output.path, tmp_path) as spawned:
        assert os.getsid(spawned.pid) == os.getpgid(spawned.pid) == spawned.pid
        spawned.release()
        assert int(await output.line()) == 5, "the total, 0, 1, 2, and the folder that ls reads"


async def test_what_cannot_be_started_is_an_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    """A folder that is gone, a log that cannot be opened: the caller hears it before any process is made."""
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for folder, log in ((tmp_path / "gone", tmp_path / "log"), (tmp_path, tmp_path / "gone" / "log")):
        with pytest.raises(FileNotFoundError):
            EngineProcess.spawn(["true"], {}, folder, log)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


# To the end


async def test_work_goes_to_its_end_though_it_is_cancelled_and_the_cancellation_follows() -> None:
    """Twice cancelled, once done: neither the work nor the cancellation is lost."""
    goes_on = asyncio.Event()
    done: list[str] = []

    async def work(name: str) -> None:
        await goes_on.wait()
        done.append(name)

    task = asyncio.create_task(run_shielded(work, "work"))
    for _ in range(2):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    goes_on.set()
    await asyncio.wait({task})
    assert (task.cancelled(), done) == (True, ["work"])


async def test_work_that_is_not_cancelled_gives_its_result_or_its_error() -> None:
    """Nothing is hidden."""

    async def half(number: int) -> float:
        return 1 / number

    assert await run_shielded(half, 2) == 0.5
    with pytest.raises(ZeroDivisionError):
        await run_shielded(half, 0)


def test_the_programs_that_these_tests_need_are_there() -> None:
    """Sh, cat, ls, sleep and wc: without them the tests above would prove nothing."""
    assert all(shutil.which(name) for name in ("sh", "cat", "ls", "sleep", "true", "wc"))
