"""Whose process it is: forged records against tables of processes that are not there, and real ones that are."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from vllm_proxy.domain.address import TcpAddress, UnixAddress
from vllm_proxy.domain.command import mark, marked
from vllm_proxy.engine import ownership, process
from vllm_proxy.engine.ownership import Identity, Owned
from vllm_proxy.engine.proc import KERNEL, Kernel, Process, look_up, pid_namespace
from vllm_proxy.engine.process import EngineProcess, end_processes, reap_orphans
from vllm_proxy.engine.sock_diag import TcpSocket

from .virtual import VirtualLoop

OWN = 900  # the daemon itself
MARK = mark("chat/0", "secret")
MINE = MARK.encode() + b"\0SPT_NOENV=1\0"


@pytest.fixture(autouse=True, scope="module")
def subreaper() -> None:
    """As the daemon does at its start."""
    process.become_subreaper()


# A kernel that is not there


@dataclass
class Row:
    """A process as the fake kernel has it; `engine`: it is the engine's, whatever can be proven."""

    process: Process
    environ: bytes = b"PATH=/bin\0"
    engine: bool = False


@dataclass
class FakeKernel(Kernel):
    """A table of processes. `swaps`: what has a number by the time that it is signalled, instead of who had it."""

    rows: dict[int, Row]
    group: frozenset[int] = frozenset()
    swaps: dict[int, Row] = field(default_factory=dict)
    signalled: list[Row] = field(default_factory=list)
    reaped: list[int] = field(default_factory=list)

    @property
    def own_pid(self) -> int:
        """The daemon's."""
        return OWN

    def processes(self) -> list[Process]:
        """All of them."""
        return [row.process for row in self.rows.values()]

    def look_up(self, pid: int) -> Process | None:
        """One of them."""
        row = self.rows.get(pid)
        return row.process if row else None

    def environment(self, pid: int) -> bytes:
        """What it was started with."""
        return self.rows[pid].environ

    def members(self, group: str) -> frozenset[int]:
        """Of the engine's cgroup."""
        return self.group if group else frozenset()

    def send(self, pid: int, number: signal.Signals, is_it: Callable[[Process], bool]) -> bool:
        """As the real one, with whoever has the number now."""
        if pid in self.swaps:
            self.rows[pid] = self.swaps.pop(pid)
            self.group -= {pid}
        row = self.rows.get(pid)
        if row is None or pid == OWN or not row.process.alive or not is_it(row.process):
            return False
        self.signalled.append(row)
        if number == signal.SIGKILL:
            self.rows[pid] = replace(row, process=replace(row.process, alive=False))
        return True

    def reap(self, pid: int) -> None:
        """Gone."""
        self.reaped.append(pid)
        del self.rows[pid]


def a_process(
    pid: int, *, parent: int = 1, session: int | None = None, started: int = 50, alive: bool = True
) -> Process:
    """One that leads a session, unless another one is named."""
    return Process(pid, alive, parent, pid if session is None else session, started)


PIDS = st.integers(2, 12)
TIMES = st.integers(1, 6)


@st.composite
def innocents(draw: st.DrawFn) -> dict[int, Row]:
    """A machine on which nothing is an engine's: any numbers, any sessions, any parents, any ages."""
    pids = draw(st.sets(PIDS, min_size=1))
    environs = st.sampled_from(
        [b"", b"PATH=/bin\0", b"ENGINE_INSTANCE=chat/0\0", MARK.encode()[:-1] + b"\0", b"X" + MINE]
    )
    return {
        pid: Row(
            Process(pid, draw(st.booleans()), draw(PIDS), draw(PIDS), draw(TIMES)),
            draw(environs),
        )
        for pid in pids
    } | {OWN: Row(a_process(OWN, started=1), MINE)}


class AtOnce(ThreadPoolExecutor):
    """No thread: virtual time does not wait for one."""

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Do it now."""
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def end_in_virtual_time(identity: Identity, kernel: FakeKernel) -> None:
    """Seconds of patience cost nothing."""
    with contextlib.closing(VirtualLoop()) as loop:
        loop.set_default_executor(AtOnce())
        loop.run_until_complete(end_processes(identity, 1.0, kernel))


@settings(deadline=None)
@given(innocents(), PIDS, TIMES, st.booleans())
def test_whatever_is_on_record_an_innocent_process_is_never_signalled(
    rows: dict[int, Row],
    pid: int,
    started: int,
    has_cgroup: bool,  # noqa: FBT001 - drawn
) -> None:
    """The number, the session, the parent, a name in the environment: none of them makes it the engine's."""
    found = rows.get(pid)
    if found is not None and found.process.started == started:
        started += 10  # that would be the engine itself
    kernel = FakeKernel(rows)
    with capture_logs():
        end_in_virtual_time(Identity(pid, started, MARK, "/group" if has_cgroup else ""), kernel)
    assert kernel.signalled == []
    assert kernel.reaped == []


@settings(deadline=None)
@given(innocents(), st.data())
def test_an_engines_processes_are_all_ended_and_nobody_else(rows: dict[int, Row], data: st.DataObject) -> None:
    """By mark, session, cgroup or parent; also where a number is another's by the time that it is signalled."""
    innocent = {pid: replace(row, process=replace(row.process, parent=1, session=1)) for pid, row in rows.items()}
    kernel = FakeKernel(dict(innocent), frozenset({103}))
    engine = {
        100: a_process(100, started=3, alive=data.draw(st.booleans())),
        101: a_process(101, session=100, started=4),
        102: a_process(102, started=4),
        103: a_process(103, session=7, started=5),
        104: a_process(104, parent=103, started=5),
        105: a_process(105, parent=104, started=6),
    }
    present = {100, *data.draw(st.sets(st.sampled_from([101, 102, 103])))}
    present |= {104, 105} if 103 in present else set()
    kernel.rows |= {pid: Row(engine[pid], MINE if pid == 102 else b"", engine=True) for pid in sorted(present)}
    stolen = data.draw(st.sets(st.sampled_from(sorted(present))))
    kernel.swaps = {pid: Row(a_process(pid, session=1, started=9)) for pid in stolen}
    with capture_logs() as logs:
        end_in_virtual_time(Identity(100, 3, MARK, "/group"), kernel)
    assert all(row.engine for row in kernel.signalled)
    left = {pid for pid, row in kernel.rows.items() if row.engine and row.process.alive}
    assert left == set()
    assert 100 not in kernel.reaped
    assert [entry for entry in logs if entry["log_level"] == "error"] == []


@settings(deadline=None)
@given(innocents(), PIDS, st.sampled_from(["", "/group"]), st.frozensets(PIDS, max_size=2), st.sets(PIDS, max_size=2))
def test_one_process_is_the_engines_if_it_is_found_among_all(
    rows: dict[int, Row], first: int, cgroup: str, group: frozenset[int], marked: set[int]
) -> None:
    """Whoever asks for one need not read the table of all; in any table, with parents in circles too."""
    rows |= {pid: replace(rows[pid], environ=MINE) for pid in marked & rows.keys()}
    identity = Identity(first, rows[first].process.started if first in rows else 3, MARK, cgroup)
    kernel = FakeKernel(rows, group)
    found = {process.pid for process in Owned(identity, kernel).find()}
    assert {pid for pid in rows if Owned(identity, kernel).owns(pid)} == found
    assert not Owned(identity, kernel).owns(77)


def test_a_session_proves_nothing_once_its_leader_is_another_or_gone() -> None:
    """Every classic daemon: it forks, its child leads a session, forks again, and ends."""
    for leader in (None, a_process(100, started=50)):
        rows = {101: Row(a_process(101, session=100, started=60))}
        if leader:
            rows[100] = Row(leader)
        assert Owned(Identity(100, 40, MARK), FakeKernel(rows)).find() == []


def test_a_leader_that_is_a_zombie_proves_its_session() -> None:
    """Its number is not given away before it is reaped."""
    rows = {100: Row(a_process(100, alive=False)), 101: Row(a_process(101, session=100, started=60))}
    assert {found.pid for found in Owned(Identity(100, 50), FakeKernel(rows)).find()} == {100, 101}


def test_what_was_proven_stays_proven_though_its_proof_is_gone() -> None:
    """A child whose parent dies moves to the daemon: by then pid and start name it."""
    kernel = FakeKernel({100: Row(a_process(100)), 101: Row(a_process(101, parent=100, started=60))})
    owned = Owned(Identity(100, 50, MARK), kernel)
    assert len(owned.find()) == 2
    del kernel.rows[100]
    kernel.rows[101] = Row(a_process(101, parent=OWN, started=60))
    assert [found.pid for found in owned.find()] == [101]
    kernel.rows[101] = Row(a_process(101, parent=OWN, started=61))
    assert owned.find() == [], "another one with its number"


def test_a_child_is_not_that_of_a_parent_who_is_younger() -> None:
    """The number of its parent has gone to the engine since."""
    kernel = FakeKernel({100: Row(a_process(100)), 101: Row(a_process(101, parent=102, started=60)),
                         102: Row(a_process(102, parent=100, started=70))})  # fmt: skip
    assert {found.pid for found in Owned(Identity(100, 50), kernel).find()} == {100, 102}


def test_a_mark_cannot_be_made_up_by_who_sees_the_command_line() -> None:
    """It holds a hash of the engine's credential, which stands in its environment alone."""
    assert mark("chat/0", "secret") != mark("chat/0", "another")
    assert mark("chat/0", "secret").startswith("ENGINE_INSTANCE=chat/0.")
    assert "secret" not in mark("chat/0", "secret")


# Real processes


def python(script: str) -> list[str]:
    """A program in Python."""
    return [sys.executable, "-S", "-c", script]


@contextlib.contextmanager
def running(argv: Sequence[str], env: dict[str, str] | None = None, lines: int = 1) -> Iterator[list[int]]:
    """A program that leads a session: its pid, then those that it prints. All of them are killed behind the block."""
    with subprocess.Popen(argv, env={**os.environ, **(env or {})}, start_new_session=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdout is not None
        pids = [child.pid]
        try:
            pids += [int(child.stdout.readline()) for _ in range(lines)]
            yield pids
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in pids[1:]:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)


def identity_of(pid: int) -> Identity:
    """What an engine whose first process this is would be known by."""
    found = look_up(pid)
    assert found is not None
    return Identity(pid, found.started, MARK)


def lives(pid: int) -> bool:
    """Whether there is such a process, and not as a zombie."""
    found = look_up(pid)
    return found is not None and found.alive


# Its second fork is in a session whose leader is gone: all that it shows are numbers.
DAEMON = """
import os, signal
reading, writing = os.pipe()
if os.fork() == 0:
    os.setsid()
    child = os.fork()
    if child == 0:
        signal.pause()
    os.write(writing, b"%d\\n" % child)
    os._exit(0)
os.wait()
os.write(1, os.read(reading, 100))
signal.pause()
"""


async def test_a_daemon_of_somebody_elses_whose_session_has_a_recorded_number_lives_on() -> None:
    """The record says that its number was the engine's first process; that one is gone, its session is another."""
    with running(python(DAEMON)) as (_, daemon):
        found = look_up(daemon)
        assert found is not None
        assert look_up(found.session) is None, "its leader is gone, as a recorded one would be"
        for started in (1, found.started - 1, found.started):
            assert await end_processes(Identity(found.session, started, MARK), 1.0)
        assert lives(daemon)


ESCAPE = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
        os.write(1, b"%d\\n" % os.getpid())
        signal.pause()
signal.pause()
"""
CLEAN_ESCAPE = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "1000"], env={}, start_new_session=True)
print(child.pid, flush=True)
sys.stdin.read()
"""


async def test_children_that_made_a_session_of_their_own_are_found_by_the_mark(tmp_path: Path) -> None:
    """Also when their parent is gone already, without a cgroup; they are ended and reaped."""
    env = {**os.environ, **marked("chat/0", "secret")}
    log = tmp_path / "log"
    spawned = EngineProcess.spawn(python(ESCAPE), env, tmp_path, log)
    spawned.owned = Owned(Identity(spawned.pid, spawned.started, MARK))
    spawned.release()
    while len(log.read_text().split()) < 2:
        await asyncio.sleep(0.01)
    children = [int(pid) for pid in log.read_text().split()]
    os.kill(spawned.pid, signal.SIGKILL)
    await spawned.exited
    assert [lives(pid) for pid in children] == [True, True]
    assert await spawned.end(0.0)
    assert [look_up(pid) for pid in (*children, spawned.pid)] == [None] * 3


async def test_a_child_without_mark_and_session_is_found_while_its_parent_lives() -> None:
    """An environment that was emptied, a session of its own: whose child it is, it cannot hide."""
    with running(python(CLEAN_ESCAPE)) as (first, child):
        assert await end_processes(identity_of(first), 0.0)
        assert look_up(child) is None


async def test_what_has_the_mark_of_another_engine_is_left_alone() -> None:
    """Two engines of one instance, the old and the new."""
    with (
        running(python(ESCAPE), marked("chat/0", "secret"), lines=2) as (first, *_),
        running(python(ESCAPE), marked("chat/0", "another"), lines=2) as others,
    ):
        assert await end_processes(identity_of(first), 0.0)
        assert [lives(pid) for pid in others] == [True] * 3


async def test_a_signal_is_sent_only_to_who_is_still_the_one_that_was_meant() -> None:
    """Asked once the kernel's descriptor names the process, just before it is sent; never of the daemon itself."""
    with running(python("import os; print(os.getpid(), flush=True); input()")) as (first, _):
        asked: list[Process] = []

        def is_it(found: Process) -> bool:
            asked.append(found)
            return False

        assert not KERNEL.send(first, signal.SIGKILL, is_it)
        assert asked == [look_up(first)]
        assert lives(first)
        assert KERNEL.send(first, signal.SIGKILL, lambda found: found == asked[0])
    assert not KERNEL.send(os.getpid(), signal.SIGKILL, lambda _: True)


@pytest.mark.parametrize("pid", [0, 1, -1, -5, 2**22 + 1, 2**31, 2**80])
async def test_a_number_that_names_no_engine_names_nobody(pid: int) -> None:
    """0 and negative ones would be whole groups; the first process is the system's."""
    assert await end_processes(Identity(pid, 1, MARK), 1.0)
    assert not KERNEL.send(pid, signal.SIGKILL, lambda _: True)


# What ends by itself


async def test_an_orphan_that_ends_by_itself_is_reaped_and_no_exit_is_stolen() -> None:
    """The daemon is its parent by then; a child that somebody waits for keeps its exit code."""
    script = "import os\nif os.fork() == 0:\n    print(os.getpid(), flush=True); input(); os._exit(0)\nos._exit(0)"
    own = subprocess.Popen(["sh", "-c", "exit 7"])  # noqa: ASYNC220 - waits for nothing
    kernel = Kernel()
    kernel.waited_for.add(own.pid)
    reaping = asyncio.create_task(reap_orphans(kernel, 0.01))
    try:
        with running(python(script)) as (_, orphan):
            os.kill(orphan, signal.SIGKILL)
            async with asyncio.timeout(30):
                while look_up(orphan) is not None:
                    await asyncio.sleep(0.01)
            found = look_up(own.pid)
            assert found is not None
            assert not found.alive
        assert own.wait() == 7
    finally:
        reaping.cancel()


# What cannot be looked at


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Every descriptor is taken inside the block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_without_a_descriptor_an_engine_is_killed_and_never_taken_for_gone(
    tmp_path: Path,
) -> None:
    """Its first process is signalled all the same; that nobody can look for others is a failure, to be tried again."""
    spawned = EngineProcess.spawn(["sleep", "1000"], dict(os.environ), tmp_path, tmp_path / "log")
    spawned.release()
    identity = Identity(spawned.pid, spawned.started)
    with no_descriptors():
        with pytest.raises(OSError, match="Too many open files"):
            await end_processes(identity, 0.0, patience=0.1)
        os.kill(spawned.pid, 0)
        with contextlib.suppress(OSError):
            await spawned.end(0.0, patience=0.1)
        assert spawned.exited.done()
    assert await end_processes(identity, 0.0)
    assert await spawned.end(0.0)
    assert look_up(spawned.pid) is None


# Run without root's rights, beside a process of another user's, where /proc hides other users' processes.
HIDDEN = """
import asyncio, os, signal, subprocess, sys
from pathlib import Path
from vllm_proxy.domain.command import mark, marked
from vllm_proxy.engine import process
from vllm_proxy.engine.ownership import Identity, Owned
from vllm_proxy.engine.proc import look_up
from vllm_proxy.engine.process import EngineProcess, end_processes

async def main():
    process.become_subreaper()
    folder = Path(sys.argv[1])
    env = {**os.environ, **marked("chat/0", "secret")}
    script = "import os, signal\\nif os.fork() == 0: os.setsid()\\nsignal.pause()"
    for is_own in (True, False):
        engine = EngineProcess.spawn([sys.executable, "-S", "-c", script], env, folder, folder / "log")
        engine.owned = Owned(Identity(engine.pid, engine.started, mark("chat/0", "secret")))
        engine.release()
        while len(engine.owned.find()) < 2:
            pass
        found = engine.owned.find()
        assert process.is_alive(engine.owned.identity)
        assert is_own or await end_processes(engine.owned.identity, 1.0)
        assert await engine.end(1.0)
        assert [look_up(one.pid) for one in found] == [None, None]
    other = int(sys.argv[2])
    os.getsid(other)  # it is there
    try:
        stat = open(f"/proc/{other}/stat")
    except (FileNotFoundError, PermissionError):
        assert await end_processes(Identity(other, 5, mark("chat/0", "secret")), 1.0)
        os.getsid(other)
        print("done")

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: mounts /proc anew; CI runs it")
@pytest.mark.parametrize("hidden", [1, 2])
def test_engines_end_where_proc_hides_other_users_processes(tmp_path: Path, hidden: int) -> None:
    """`hidepid=`: what cannot be seen is somebody else's, and no reason to take one's own for gone, or to give up."""
    (tmp_path / "script.py").write_text(HIDDEN)
    script = (
        f"mount -t proc -o hidepid={hidden} proc /proc || exit\n"
        "setpriv --reuid 65534 --clear-groups sleep 1000 >/dev/null 2>&1 &\n"
        "setpriv --regid 4711 --clear-groups --bounding-set=-all --inh-caps=-all "
        f"{sys.executable} script.py {tmp_path} $!"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path.cwd())}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr


# Whose socket it is


LISTEN = (
    "import socket, sys; s = socket.create_server(('{}', 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()"
)


@pytest.fixture(params=["netlink", "tables"])
def _asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the kernel is asked for who listens: where netlink is not allowed, its tables say the same."""

    def refused(_state: int, _port: int) -> list[TcpSocket]:
        raise OSError(93, "no such protocol")

    if request.param == "tables":
        monkeypatch.setattr(ownership, "tcp_sockets", refused)


@pytest.mark.usefixtures("_asked")
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_is_the_engines_when_one_of_its_processes_listens(address: str) -> None:
    """And only then: a port that nobody has is not, nor one of a later process with the number of the first."""
    with subprocess.Popen(python(LISTEN.format(address)), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        port = TcpAddress("127.0.0.1", int(child.stdout.readline()))
        assert Owned(identity_of(child.pid)).listens_on(port)
        assert not Owned(identity_of(os.getpid())).listens_on(port)
        assert not Owned(replace(identity_of(child.pid), started=1)).listens_on(port)
        child.kill()
        child.wait()
    with socket.socket() as bound:  # bound and silent, as a vLLM that loads
        bound.bind(("127.0.0.1", 0))
        assert not Owned(identity_of(os.getppid())).listens_on(TcpAddress(*bound.getsockname()))


@pytest.mark.usefixtures("_asked")
def test_a_port_of_another_program_is_not_the_engines() -> None:
    """On IPv6 with IPv4 in it, too, where a connection to 127.0.0.1 arrives as well."""
    with running(python("import os; print(os.getpid(), flush=True); input()")) as (first, _):
        for server in (
            socket.create_server(("127.0.0.1", 0)),
            socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True),
        ):
            with server:
                assert not Owned(identity_of(first)).listens_on(TcpAddress("127.0.0.1", server.getsockname()[1]))


def test_a_unix_socket_is_the_engines_when_one_of_its_processes_listens(tmp_path: Path) -> None:
    """Not when it is only bound, not when another one listens at a path that begins or ends alike."""
    path = tmp_path / "a b.sock"
    listens = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen(); print(flush=True)"
    address, other = UnixAddress(str(path)), UnixAddress(f"{tmp_path}/b.sock")
    with subprocess.Popen(python(f"{listens}; input()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert Owned(identity_of(child.pid)).listens_on(address)
        assert not Owned(identity_of(os.getpid())).listens_on(address)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(other.path)
            assert not Owned(identity_of(os.getpid())).listens_on(other)
        child.kill()
        child.wait()
    assert not Owned(identity_of(os.getpid())).listens_on(address)


def test_who_listens_at_a_name_cannot_be_told() -> None:
    """It may be several addresses, and others tomorrow: not for one moment is that taken for proof."""
    with pytest.raises(OSError, match="cannot tell who listens at a name"):
        Owned(identity_of(os.getpid())).listens_on(TcpAddress("localhost", 1))


def test_the_pid_namespace_has_a_name() -> None:
    """Another one for each container."""
    assert pid_namespace().startswith("pid:[")
