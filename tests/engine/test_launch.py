"""One engine from port to last process, with real processes and a real state directory."""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from vllm_proxy.domain.address import UnixAddress
from vllm_proxy.domain.canary import COMPLETIONS, Canary
from vllm_proxy.domain.config import EngineSpec, ModelSpec, Policy
from vllm_proxy.domain.devices import NO_DEVICES
from vllm_proxy.domain.diagnose import Exit
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.engine import process, vitals
from vllm_proxy.engine.cgroup import Cgroups
from vllm_proxy.engine.check import OptionCheck
from vllm_proxy.engine.ending import end_engine
from vllm_proxy.engine.interface import Engine
from vllm_proxy.engine.launch import LaunchedEngine, Launcher
from vllm_proxy.engine.options import OptionTables
from vllm_proxy.engine.ports import Ports
from vllm_proxy.engine.proc import look_up
from vllm_proxy.engine.process import end_processes
from vllm_proxy.engine.program import LaunchError, Programs
from vllm_proxy.engine.state import EngineRecord, StateDirectory
from vllm_proxy.engine.variables import Variables
from vllm_proxy.runtime.masking import Masking
from vllm_proxy.runtime.referenced import ReferencedFiles

SPEC = EngineSpec(model="m")


@pytest.fixture(autouse=True, scope="module")
def subreaper() -> None:
    """As the daemon does at its start."""
    process.become_subreaper()


class Place:
    """A launcher with a state directory, and what was passed on of the engines' output."""

    def __init__(self, folder: Path, state: StateDirectory, ports: Ports) -> None:
        self.state = state
        self.ports = ports
        self.passed_on: list[str] = []
        self.stopping = asyncio.Event()
        programs = Programs(folder, dict(os.environ), None)
        self.check = OptionCheck(programs, OptionTables(folder / "options"))
        self.launcher = Launcher(
            programs,
            self.check,
            Variables(ReferencedFiles(folder, None), Masking(), {}),
            folder,
            has_gpus=False,
            ports=ports,
            state=state,
            pass_on=self._pass_on,
            cgroups=Cgroups(None),
            open_files=1024,
            stopping=self.stopping,
        )

    def _pass_on(self, instance: str, lines: object) -> None:
        assert isinstance(lines, list)
        self.passed_on += [f"{instance} {line}" for line in lines]


@contextlib.contextmanager
def place(folder: Path, port_start: int) -> Iterator[Place]:
    """What one daemon has; one after another in the same folder."""
    with StateDirectory(folder / "state", folder) as state:
        ports = Ports(port_start, port_start + 100, [])
        yield Place(folder, state, ports)
        ports.close()


class Event:
    """A named pipe into which a program writes a line."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._writer = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # never at its end

    async def happened(self) -> str:
        """The next line."""
        loop = asyncio.get_running_loop()
        there: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._reader, there.set_result, None)
        try:
            await there
        finally:
            loop.remove_reader(self._reader)
        return os.read(self._reader, 4096).decode().strip()

    def close(self) -> None:
        """No more."""
        os.close(self._reader)
        os.close(self._writer)


@pytest.fixture
def event(tmp_path: Path) -> Iterator[Event]:
    """One that a program can write into."""
    made = Event(tmp_path / "event")
    yield made
    made.close()


def model(folder: Path, script: str) -> ModelSpec:
    """A model whose engine is a shell script."""
    program = folder / "engine"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return ModelSpec("chat", EngineSpec(model="m", command=(str(program),)), Policy(), {})


class Owner:
    """Who runs an engine, and what it heard of its end."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.is_told = asyncio.Event()

    def stop_timeout(self) -> float:
        """Seconds between SIGTERM and SIGKILL."""
        return 0.2

    def waits_for_port(self, why: str | None) -> None:
        """The start waits."""
        self._hear(f"waits: {why}")

    def not_ended(self, why: str) -> None:
        """The engine could not be ended."""
        self._hear(why)

    def gone(self) -> None:
        """None of its processes lives."""

    def ended(self) -> None:
        """Nothing is left of it."""
        self._hear("ended")

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        self.is_told.set()


@contextlib.asynccontextmanager
async def left_running(
    folder: Path, port_start: int, event: Event, before: str = "true", behind: str = "exec sleep 1000"
) -> AsyncIterator[EngineRecord]:
    """An engine that a daemon which is no more has left; ended behind the block, whatever the test does."""
    script = f"{before}; echo up > {event.path}; {behind}"
    with place(folder, port_start) as first:
        async with first.launcher.running(model(folder, script), "chat/0", NO_DEVICES, Owner()) as engine:
            await event.happened()
            engine.mark_ready()
            while not engine.record.ready:
                await asyncio.sleep(0)
            engine.keep()
        record = engine.record
    try:
        yield record
    finally:
        await end_processes(record.identity, 0)


async def test_a_stop_while_a_crashed_engine_is_cleaned_up_leaves_no_process(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """The launcher's block ends to the last process, cancelled in the middle or not, and takes it off the record.

    Nobody follows its output any more: the number of its descriptor is soon another file's.
    """
    leaving = asyncio.Event()
    running: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()
    spec = model(tmp_path, f"trap '' TERM\necho up > {event.path}\nexec sleep 1000")
    with place(tmp_path, port_start) as here:

        async def live() -> None:
            async with here.launcher.running(spec, "chat/0", NO_DEVICES, Owner()) as engine:
                running.set_result(engine)
                await leaving.wait()

        task = asyncio.create_task(live())
        engine = await running
        await event.happened()
        assert [record.pid for record in here.state.orphans()] == [engine.pid]
        leaving.set()
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert not [one for one in asyncio.all_tasks() if one.get_name() == "output of chat/0"]
        assert look_up(engine.pid) is None
        assert here.state.orphans() == []
        assert not Path(engine.place.folder).exists()
        assert here.ports.take() == engine.place.address.port


async def test_every_line_that_an_engine_wrote_is_passed_on_when_it_has_ended(tmp_path: Path, port_start: int) -> None:
    """Its last words too, those without an end of line included."""
    with place(tmp_path, port_start) as here:
        async with here.launcher.running(model(tmp_path, "seq 3; printf bye"), "chat/0", NO_DEVICES, Owner()) as engine:
            assert await engine.exited == Exit(0, None)
        assert here.passed_on == ["chat/0 1", "chat/0 2", "chat/0 3", "chat/0 bye"]


async def test_an_engines_output_begins_where_its_predecessors_ended(tmp_path: Path, port_start: int) -> None:
    """The last lines of a start are never those of the one before."""
    with place(tmp_path, port_start) as here:
        for word in ("one", "two"):
            async with here.launcher.running(model(tmp_path, f"echo {word}"), "chat/0", NO_DEVICES, Owner()) as engine:
                await engine.exited
                assert engine.output.tail(10) == (word,)


async def test_a_kept_engine_lives_on_and_is_on_record_as_it_was(tmp_path: Path, port_start: int, event: Event) -> None:
    """Its process, its folder and its port are left alone; its record says that it has served."""
    async with left_running(tmp_path, port_start, event) as record:
        assert process.is_alive(record.identity)
        assert Path(record.folder).is_dir()
        assert record.ready
        with place(tmp_path, port_start) as second:
            assert second.state.orphans() == [record]


async def test_an_adopted_engine_is_as_one_of_our_own(tmp_path: Path, port_start: int, event: Event) -> None:
    """Its port is held, new output is passed on, old output is known, and it ends to the last process."""
    go = Event(tmp_path / "go")
    script = f"read -r word < {go.path}; echo $word; echo said > {event.path}; exec sleep 1000"
    async with left_running(tmp_path, port_start, event, "echo before", script) as record:
        with place(tmp_path, port_start) as second:
            spec = model(tmp_path, "true").engine
            assert second.launcher.fingerprint(spec) == record.spec
            (found,) = second.state.orphans()
            async with second.launcher.adopted(found, SPEC, Owner()) as engine:
                assert (engine.pid, engine.place, engine.was_ready) == (record.pid, record.place, True)
                assert second.ports.take() != record.place.address.port
                go.path.write_text("hello\n")
                await event.happened()
            assert not process.is_alive(record.identity)
            assert second.state.orphans() == []
            assert not Path(record.folder).exists()
            assert second.passed_on == ["chat/0 hello"], "what an earlier daemon passed on is not said twice"
    go.close()


async def test_an_engine_that_an_older_daemon_put_on_record_is_adopted(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """Such a record has a port and no address, and does not say how the engine was launched."""
    async with left_running(tmp_path, port_start, event) as record:
        file = tmp_path / "state" / "engines.toml"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if not line.startswith(("address = ", "launched = "))))
        with place(tmp_path, port_start) as second:
            (found,) = second.state.orphans()
            assert found == record
            async with second.launcher.adopted(found, SPEC, Owner()) as engine:
                assert (engine.pid, engine.place) == (record.pid, record.place)
                assert second.ports.take() != record.place.address.port


async def test_the_death_of_an_adopted_engine_is_seen_at_once_and_its_code_is_unknown(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """Only a parent learns how its child ended; here the parent is this process, as an older one."""
    async with left_running(tmp_path, port_start, event) as record:
        with place(tmp_path, port_start) as second:
            async with second.launcher.adopted(second.state.orphans()[0], SPEC, Owner()) as engine:
                os.kill(record.pid, signal.SIGKILL)
                assert await engine.exited == Exit(None, None)


async def test_what_is_left_of_an_engine_that_died_unwatched_is_ended_before_its_successor_starts(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """Its core lives on in its session: gone, and off the record, when the adoption is refused."""
    core = tmp_path / "core"
    async with left_running(tmp_path, port_start, event, f"sleep 1000 & echo $! > {core}", "wait") as record:
        os.kill(record.pid, signal.SIGKILL)
        os.waitpid(record.pid, 0)  # noqa: ASYNC222 - it is dead already
        pid = int(core.read_text())
        assert look_up(pid) is not None
        with place(tmp_path, port_start) as second:
            with pytest.raises(LaunchError, match="while no daemon watched"):
                async with second.launcher.adopted(second.state.orphans()[0], SPEC, Owner()):
                    pass
            found = look_up(pid)
            assert found is None or not found.alive
            assert second.state.orphans() == []
            assert second.ports.take() == record.place.address.port


# Listens at the socket that it is told, as vLLM does, and says so.
LISTENING = """
import os, socket, sys, signal
path = next(word.partition('=')[2] for word in sys.argv if word.startswith('--uds='))
assert not [word for word in sys.argv if word.startswith(('--host', '--port'))]
at = socket.socket(socket.AF_UNIX)
at.bind(path)
at.listen()
open(sys.argv[1], 'w').write(os.environ['VLLM_SERVER_DEV_MODE'])
signal.pause()
"""


async def test_an_engine_that_may_sleep_listens_where_nobody_else_comes(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """In its own folder, which is its owner's alone; no port is taken for it. It is adopted as it was, asleep too."""
    spec = model(tmp_path, f'exec {sys.executable} -S -c "{LISTENING}" {event.path} "$@"')
    spec = replace(spec, engine=spec.engine.model_copy(update={"sleep": 1}))
    with place(tmp_path, port_start) as first:
        async with first.launcher.running(spec, "chat/0", NO_DEVICES, Owner()) as engine:
            assert await event.happened() == "1"
            where = engine.place
            assert (where.may_sleep, where.address) == (True, UnixAddress(f"{where.folder}/http.sock"))
            assert Path(where.folder).stat().st_mode & 0o777 == 0o700
            assert await engine.holds_address()
            assert first.ports.take() == port_start
            assert (engine.asleep, engine.before_sleep, engine.canary) == (0, None, None)
            engine.note_sleep(1, Canary(COMPLETIONS, " G"))
            engine.keep()
    with place(tmp_path, port_start) as second:
        (found,) = second.state.orphans()
        async with second.launcher.adopted(found, spec.engine, Owner()) as engine:
            assert (engine.place, engine.place.may_sleep) == (where, True)
            assert await engine.holds_address()
            assert (engine.asleep, engine.canary) == (1, Canary(COMPLETIONS, " G"))
            engine.note_sleep(0, None)
            assert (engine.asleep, engine.canary) == (0, None)
            assert engine.before_sleep is not None  # what it took of the machine's memory it has until it ends
        assert not Path(where.folder).exists()


async def test_who_takes_an_engines_socket_is_not_the_engine(tmp_path: Path, port_start: int, event: Event) -> None:
    """A program of the same user, which alone may come there: it gets neither the credential nor a request."""
    spec = model(tmp_path, f"echo up > {event.path}; exec sleep 1000")
    spec = replace(spec, engine=spec.engine.model_copy(update={"sleep": 2}))
    with place(tmp_path, port_start) as here:
        async with here.launcher.running(spec, "chat/0", NO_DEVICES, Owner()) as engine:
            await event.happened()
            assert not await engine.holds_address()
            assert isinstance(engine.place.address, UnixAddress)
            with socket.socket(socket.AF_UNIX) as other:
                other.bind(engine.place.address.path)
                other.listen()
                assert not await engine.holds_address()


# Opens or makes the files that it is told, maps them, says so, and waits.
MAPPING = """
import mmap, os, sys, signal
def mapped(name):
    file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(file, 4096)
    return mmap.mmap(file, 4096)
maps = [mapped(name) for name in sys.argv[2:]]
open(sys.argv[1], 'w').write('up')
signal.pause()
"""


@contextlib.contextmanager
def shared_memory(*names: str) -> Iterator[list[Path]]:
    """Paths in /dev/shm; what is there is removed behind the block."""
    paths = [Path("/dev/shm", name) for name in names]
    try:
        yield paths
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def number(index: int) -> str:
    """Eight digits that no other test uses."""
    return f"{os.getpid() * 16 + index:08x}"


async def test_shared_memory_that_a_killed_engine_leaves_is_removed(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """The segments that it had mapped when it was ready; a file that a live process maps as well is left alone."""
    loky = f"sem.loky-{os.getpid()}-{number(6)}"
    names = f"psm_{number(0)}", f"torch_{os.getpid()}_1_1", f"nccl-{number(1)[-6:]}", loky, f"psm_{number(2)}"
    other, mapping = Event(tmp_path / "other"), tmp_path / "mapping.py"
    mapping.write_text(MAPPING)
    with shared_memory(*names) as segments, contextlib.ExitStack() as stack:
        script = f"exec python3 {mapping} {event.path} {' '.join(map(str, segments))}"
        with place(tmp_path, port_start) as here:
            async with here.launcher.running(model(tmp_path, script), "chat/0", NO_DEVICES, Owner()) as engine:
                await event.happened()
                arguments = ["python3", str(mapping), str(other.path), str(segments[-1])]
                bystander = stack.enter_context(subprocess.Popen(arguments))  # noqa: ASYNC220 - waits for nothing
                stack.callback(bystander.kill)
                await other.happened()
                engine.mark_ready()
                while not engine.record.ready:
                    await asyncio.sleep(0)
                assert engine.record.segments == tuple(sorted(map(str, segments)))
                os.kill(engine.pid, signal.SIGKILL)
                await engine.exited
        assert [segment.exists() for segment in segments] == [False, False, False, False, True]
    other.close()


async def test_weights_in_shared_memory_survive_a_stop_in_the_middle_of_their_load(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """Only what is called as vLLM's segments are, lies directly in /dev/shm and is younger than the engine goes."""
    folder = Path(f"/dev/shm/models-{os.getpid()}/x")
    folder.mkdir(parents=True)
    mapping = tmp_path / "mapping.py"
    mapping.write_text(MAPPING)
    names = "model.safetensors", f"psm_{number(3)}", f"psm_{number(4)}", "vllm_offload_models"
    try:
        with shared_memory(*names) as (weights, older, segment, data):
            nested = [folder / name for name in ("model.safetensors", segment.name)]
            for file in (weights, older, data, *nested):
                file.write_bytes(bytes(4096))
            used = " ".join(map(str, (weights, older, segment, data, *nested)))
            with place(tmp_path, port_start) as here:
                script = f"exec python3 {mapping} {event.path} {used}"
                async with here.launcher.running(model(tmp_path, script), "chat/0", NO_DEVICES, Owner()):
                    await event.happened()
                    assert segment.exists()
            assert [file.exists() for file in (weights, older, data, *nested)] == [True] * 5
            assert not segment.exists()
    finally:
        shutil.rmtree(folder.parent)


async def test_nothing_is_removed_from_shared_memory_while_nobody_can_tell_who_uses_it() -> None:
    """With every descriptor taken it is not known what is mapped: it is left, and that is logged."""
    with shared_memory(f"psm_{number(5)}") as (segment,), capture_logs() as logs:
        segment.touch()
        taken = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)]
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 2, limits[1]))  # one is left: for /dev/shm itself
        try:
            assert vitals.remove_segments([str(segment)], 0.0) == []
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            os.close(taken[0])
        assert segment.exists()
    assert [entry["event"] for entry in logs] == ["shared memory of a dead engine may be left"]


class Stubborn:
    """An engine that is ended at the last of some tries."""

    def __init__(self, *outcomes: bool | Exception) -> None:
        self.outcomes = list(outcomes)
        self.graces: list[float] = []

    async def end(self, grace: float) -> bool:
        """One try."""
        self.graces.append(grace)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def nobody(folder: Path) -> EngineRecord:
    """An engine on record whose processes are gone."""
    folder.mkdir()
    return EngineRecord(
        "chat/0", "engine-1", 2**22 - 1, 1, "127.0.0.1:8001", "secret", str(folder),
        str(folder.parent / "state/logs/chat%2F0.log"),
    )  # fmt: skip


async def test_what_cannot_be_ended_stays_on_record(tmp_path: Path, port_start: int) -> None:
    """The next daemon tries again; nothing of it is removed meanwhile."""
    record = nobody(tmp_path / "vp-folder")
    with place(tmp_path, port_start) as here:
        here.state.record(record)
        for outcome in (False, PermissionError(1, "not ours"), OSError(24, "too many"), RuntimeError("no thread")):
            assert await end_engine(record, Stubborn(outcome).end, here.state, 0)
        assert here.state.orphans() == [record]
    assert Path(record.folder).is_dir()


async def test_the_record_of_a_dead_engine_that_cannot_be_written_is_told_and_holds_nothing_up(
    tmp_path: Path, port_start: int
) -> None:
    """Leftovers are looked for behind the end, each on its own: shared memory that cannot be seen hides nothing."""
    record, outcome = nobody(tmp_path / "vp-folder"), True
    with place(tmp_path, port_start) as here, capture_logs() as logs:
        forgetting = RefusingState(here.state.path)
        assert await end_engine(record, Stubborn(outcome).end, forgetting, 0) is None
    assert not Path(record.folder).exists()
    assert [entry["failed"] for entry in logs if "failed" in entry] == ["take it off the record"]


class RefusingState(StateDirectory):
    """One that nothing can be written to."""

    def forget(self, own_name: str) -> None:
        """Nothing of the engine is left."""
        raise OSError(30, f"read-only: {own_name}")


async def test_an_engine_that_was_not_ended_keeps_its_port_its_folder_and_its_record(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """A daemon that gave up leaves all of it to the next one, which ends it."""
    owner = Owner()
    spec = model(tmp_path, f"echo up > {event.path}; exec sleep 1000")
    with place(tmp_path, port_start) as here:
        async with here.launcher.running(spec, "chat/0", NO_DEVICES, owner) as engine:
            await event.happened()
            assert isinstance(engine, LaunchedEngine)
            end, lives = engine.process.end, False
            engine.process.end = Stubborn(lives).end  # type: ignore[method-assign,assignment]
            here.stopping.set()
        assert "ended" not in owner.heard
        assert here.ports.take() != engine.place.address.port
        assert Path(engine.place.folder).is_dir()
        (record,) = here.state.orphans()
        assert process.is_alive(record.identity)
        await end(0)
    with place(tmp_path, port_start) as second:
        await second.launcher.end_orphan(record, again := Owner())
        assert again.heard == ["ended"]
        assert second.state.orphans() == []
        assert not Path(record.folder).exists()


async def test_an_engine_gets_the_soft_limit_that_the_daemon_was_given(tmp_path: Path, port_start: int) -> None:
    """Before its program begins."""
    with place(tmp_path, port_start) as here:
        async with here.launcher.running(model(tmp_path, "ulimit -Sn"), "chat/0", NO_DEVICES, Owner()) as engine:
            await engine.exited
            assert engine.output.tail(1) == ("1024",)


# Where its output goes


async def test_a_logs_folder_that_is_gone_is_made_anew(tmp_path: Path, port_start: int) -> None:
    """Whoever removed it wanted the old output away."""
    with place(tmp_path, port_start) as here:
        (here.state.path / "logs").rmdir()
        async with here.launcher.running(model(tmp_path, "echo hello"), "chat/0", NO_DEVICES, Owner()) as engine:
            await engine.exited
            assert engine.log.problem is None
        assert here.state.log_file("chat/0").read_text() == "hello\n"


async def test_a_log_that_is_removed_while_its_engine_writes_is_followed_on(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """The file lives as long as somebody writes it; that it has no name any more is said."""
    go = Event(tmp_path / "go")
    script = f"echo one; echo up > {event.path}; read -r word < {go.path}; echo two"
    with place(tmp_path, port_start) as here:
        async with here.launcher.running(model(tmp_path, script), "chat/0", NO_DEVICES, Owner()) as engine:
            await event.happened()
            shutil.rmtree(here.state.path / "logs")
            go.path.write_text("on\n")
            await engine.exited
            assert engine.output.tail(5) == ("one", "two")
            assert "was removed" in (engine.log.check() or "")
        assert here.passed_on == ["chat/0 one", "chat/0 two"]
    go.close()


async def test_output_that_no_file_takes_goes_on_in_memory_and_is_adopted(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """The next daemon finds it through the engine's own descriptor."""
    go = Event(tmp_path / "go")
    script = f"read -r word < {go.path}; echo $word; echo said > {event.path}; exec sleep 1000"
    with place(tmp_path, port_start) as first:
        (tmp_path / "state" / "logs").rmdir()
        (tmp_path / "state" / "logs").write_text("in the way of a folder")
        with capture_logs() as logs:
            spec = model(tmp_path, f"echo before; (echo up > {event.path}); {script}")  # its own output stays open
            async with first.launcher.running(spec, "chat/0", NO_DEVICES, Owner()) as engine:
                await event.happened()
                assert "File exists" in (engine.log.problem or "")
                engine.keep()
        assert any(entry["event"] == "an engine's output is passed on alone" for entry in logs)
        (record,) = first.state.orphans()
    (tmp_path / "state" / "logs").unlink()
    with place(tmp_path, port_start) as second:
        async with second.launcher.adopted(record, SPEC, Owner()) as adopted:
            go.path.write_text("hello\n")
            await event.happened()
            assert adopted.output.tail(5) == ("before", "hello")
        assert second.passed_on == ["chat/0 hello"]
    go.close()


async def test_a_fault_while_an_engines_output_is_read_does_not_end_the_reading(
    tmp_path: Path, port_start: int, event: Event
) -> None:
    """What it writes later is passed on, and its activity is seen."""
    faults = [ValueError("a bug")]

    def pass_on(instance: str, lines: Sequence[str]) -> None:
        if faults:
            raise faults.pop()
        here._pass_on(instance, lines)

    with place(tmp_path, port_start) as here, capture_logs() as logs:
        launcher = replace(here.launcher, pass_on=pass_on)
        spec = model(tmp_path, f"echo one; read x < {event.path}; echo two; exec sleep 1000")
        async with launcher.running(spec, "chat/0", NO_DEVICES, Owner()) as engine:
            async with asyncio.timeout(20):
                while faults:
                    await asyncio.sleep(0.01)
                event.path.write_text("go\n")
                while "chat/0 two" not in here.passed_on:
                    await asyncio.sleep(0.01)
            assert engine.output.activity >= 1
    assert [entry["task"] for entry in logs if entry["event"].startswith("a background")] == ["output of chat/0"]


async def test_a_folder_of_thousands_of_files_is_removed_beside_everything_else(
    tmp_path: Path, port_start: int
) -> None:
    """What torch compiles fills it; removing it takes a second, and nobody waits for that."""
    record = nobody(tmp_path / "folder")
    for number in range(2000):
        (tmp_path / "folder" / f"compiled-{number}").touch()
    with place(tmp_path, port_start) as here:
        outcome, there = True, list[bool]()

        def gone() -> None:
            there.append(Path(record.folder).exists())

        ending = asyncio.create_task(end_engine(record, Stubborn(outcome).end, here.state, 0, gone=gone))
        turns = 0
        while not ending.done():
            turns += 1
            await asyncio.sleep(0)
    assert await ending is None
    assert turns > 10
    assert there == [True], "that no process is left is told before what they left is removed"
    assert not Path(record.folder).exists()


async def test_a_start_without_a_free_port_says_so_and_leaves_nothing(tmp_path: Path, port_start: int) -> None:
    """It is a failure by chance, which says nothing about the spec: a later try may find one."""
    with place(tmp_path, port_start) as here:
        here.ports.set_range(port_start, port_start)
        here.ports.reserve(port_start)
        with pytest.raises(LaunchError) as failed:
            async with here.launcher.running(model(tmp_path, "true"), "chat/0", NO_DEVICES, Owner()):
                pass
        assert failed.value.diagnosis.reason is Reason.PORT_IN_USE
        assert "set engine.port_end" in failed.value.diagnosis.message
        assert here.state.orphans() == []
