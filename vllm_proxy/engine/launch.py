"""One engine from its port to its last process. Its one rule: what was taken for it is given back in the same block.

The exception is an engine that is kept for the next daemon, which adopts it.
"""

import asyncio
import contextlib
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from vllm_proxy.domain import command
from vllm_proxy.domain.command import Place
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.diagnose import Diagnosis, Exit
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.domain.progress import Progress
from vllm_proxy.engine import cgroup, logs, vitals
from vllm_proxy.engine.cgroup import Cgroups
from vllm_proxy.engine.check import OptionCheck
from vllm_proxy.engine.output import Output, PassOn
from vllm_proxy.engine.ports import NoPortError, Ports
from vllm_proxy.engine.process import EngineProcess, end_session, to_the_end
from vllm_proxy.engine.program import LaunchError, Programs
from vllm_proxy.engine.state import EngineRecord, StateDirectory, file_name

log = structlog.get_logger()

_MEMORY_SECONDS = 30.0
_MUCH_MORE_MEMORY = 1.5  # times what it was


class Writing(Protocol):
    """What an engine writes, as far as others look at it."""

    @property
    def activity(self) -> int:
        """Grows whenever the engine does something that can be seen."""

    @property
    def progress(self) -> Progress:
        """How far its start is."""

    def tail(self, lines: int) -> tuple[str, ...]:
        """The last lines that it wrote."""


class Engine(Protocol):
    """A running engine, as its supervisor sees it."""

    @property
    def started_at(self) -> datetime:
        """UTC."""

    @property
    def was_ready(self) -> bool:
        """Whether an earlier daemon has seen it serve."""

    @property
    def memory_bytes(self) -> int:
        """Of its processes; 0: not known."""

    @property
    def pid(self) -> int:
        """Of its first process."""

    @property
    def place(self) -> Place:
        """Where it runs."""

    @property
    def exited(self) -> asyncio.Future[Exit]:
        """How its first process ended, once it did."""

    @property
    def output(self) -> Writing:
        """What it writes."""

    def serves(self) -> None:
        """It is ready: put that on record."""

    def keep(self) -> None:
        """Leave it to the next daemon where the block ends."""


class LaunchedEngine:
    """A real one."""

    def __init__(self, process: EngineProcess, record: EngineRecord, output: Output, state: StateDirectory) -> None:
        self.process = process
        self.output = output
        self.place = Place(record.instance, record.own_name, record.port, record.credential, record.folder)
        self.started_at = datetime.fromisoformat(record.started_at)
        self.was_ready = record.ready
        self.kept = False
        self.pid = process.pid
        self.exited = process.exited
        self._state = state
        self._cgroup = record.cgroup
        self.memory_bytes = 0  # of its processes, 0 until it was looked at
        self._serving = asyncio.Event()

    def serves(self) -> None:
        """It is ready: put that on record."""
        self.output.loading = False
        self._serving.set()

    async def look_after(self) -> None:
        """Once it serves, put that on record, with what would be left of it if it were killed; then report on it."""
        await self._serving.wait()
        found = await asyncio.to_thread(vitals.shared_segments, self.pid, self.process.started)
        self._state.amend(self.place.own_name, ready=True, segments=tuple(sorted(found)))
        noted = 0
        while True:
            self.memory_bytes = await asyncio.to_thread(self._memory)
            noted = noted or self.memory_bytes
            if self.memory_bytes > noted * _MUCH_MORE_MEMORY:
                log.warning("an engine takes far more memory than before", instance=self.place.instance,
                            mebibytes=self.memory_bytes // 2**20, before=noted // 2**20)  # fmt: skip
                noted = self.memory_bytes
            await asyncio.sleep(_MEMORY_SECONDS)

    def _memory(self) -> int:
        return cgroup.memory_bytes(self._cgroup) or vitals.memory_bytes(self.pid, self.process.started)

    def keep(self) -> None:
        """Leave it to the next daemon where the block ends."""
        self.kept = True


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts engines as processes of this machine."""

    programs: Programs
    check: OptionCheck
    scratch: Path  # where their temporary folders go; short, since sockets lie there
    has_gpus: bool
    ports: Ports
    state: StateDirectory
    pass_on: PassOn
    cgroups: Cgroups

    def devices(self, spec: EngineSpec) -> frozenset[str]:
        """The GPUs that an engine measures while it loads."""
        if not self.has_gpus and spec.devices is None:
            return frozenset()
        return command.devices_of(spec, self.programs.inherited)

    def fingerprint(self, spec: EngineSpec) -> str:
        """What an engine is known by to be the one that a spec asks for."""
        return command.fingerprint(spec, str(self.programs.folder))

    async def objection(self, model: ModelSpec) -> Diagnosis | None:
        """Why no engine would start for a model; waits for its vLLM's options where they are being read."""
        try:
            self.programs.command(model.engine)
            await self.check.names(model.engine)
            _refuse(await self.check.problems(model))
        except LaunchError as error:
            return error.diagnosis
        return None

    async def option_names(self, spec: EngineSpec) -> frozenset[str]:
        """The options that the vLLM of a spec takes, without dashes; none where they are not known."""
        return await self.check.names(spec)

    @contextlib.asynccontextmanager
    async def running(
        self, model: ModelSpec, instance: str, stop_timeout: Callable[[], float]
    ) -> AsyncIterator[LaunchedEngine]:
        """An engine that runs inside the block; behind it nothing is left of it, unless it was kept.

        Raises:
            LaunchError: when it cannot be started.

        """
        start = self.programs.command(model.engine)
        _refuse(await self.check.problems(model))
        async with contextlib.AsyncExitStack() as stack:
            place = self._take_place(instance, stack)
            argv = command.argv(model.id, model.engine, start, place)
            env = command.environment(self.programs.inherited, model.engine, place)
            engine = self._spawn(argv, env, place, self.fingerprint(model.engine))
            await stack.enter_async_context(self._living(engine, stop_timeout, stack))
            engine.process.release()
            log.info(
                "engine started",
                instance=instance,
                pid=engine.pid,
                port=place.port,
                log=str(self.state.log_file(instance)),
            )
            yield engine

    @contextlib.asynccontextmanager
    async def adopted(self, record: EngineRecord, stop_timeout: Callable[[], float]) -> AsyncIterator[LaunchedEngine]:
        """An engine that an earlier daemon started, as if it were ours.

        Raises:
            LaunchError: when it is gone.

        """
        async with contextlib.AsyncExitStack() as stack:
            self.ports.hold(record.port)
            stack.callback(self.ports.give_back, record.port)
            stack.callback(shutil.rmtree, record.folder, ignore_errors=True)
            process = EngineProcess.adopt(record.pid, record.started)
            if process is None:
                await bury(record, partial(end_session, record.pid, record.started, 0), self.state)
                raise LaunchError(Reason.CRASHED, "the engine ended while no daemon watched it")
            file = Path(record.log)
            output = Output(record.instance, file, record.log_start, logs.size_of(file), self.pass_on)
            output.catch_up()
            engine = LaunchedEngine(process, record, output, self.state)
            await stack.enter_async_context(self._living(engine, stop_timeout, stack))
            log.info("engine adopted", instance=record.instance, pid=engine.pid, port=record.port)
            yield engine

    def _take_place(self, instance: str, stack: contextlib.AsyncExitStack) -> Place:
        try:
            port = self.ports.take()
            stack.callback(self.ports.give_back, port)
            folder = tempfile.mkdtemp(prefix="vp-", dir=self.scratch)
        except (NoPortError, OSError) as error:
            raise LaunchError(Reason.CRASHED, f"cannot make room for an engine: {error}") from error
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return Place(instance, f"engine-{secrets.token_hex(8)}", port, secrets.token_urlsafe(24), folder)

    def _spawn(self, argv: Sequence[str], env: Mapping[str, str], place: Place, spec: str) -> LaunchedEngine:
        log_file = self.state.log_file(place.instance)
        log_start = logs.size_of(log_file)
        try:
            process = EngineProcess.spawn(argv, env, self.programs.folder, log_file)
        except OSError as error:
            raise LaunchError(Reason.CRASHED, f"cannot start a process: {error}") from error
        group = self.cgroups.take_in(f"{file_name(place.instance)}.{place.own_name[-8:]}", process.pid)
        record = EngineRecord(
            place.instance, place.own_name, process.pid, process.started, place.port, place.credential, place.folder,
            str(log_file), spec, log_start, datetime.now(UTC).isoformat(), cgroup=group,
        )  # fmt: skip
        self.state.record(record)
        output = Output(place.instance, log_file, log_start, log_start, self.pass_on)
        return LaunchedEngine(process, record, output, self.state)

    @contextlib.asynccontextmanager
    async def _living(
        self, engine: LaunchedEngine, stop_timeout: Callable[[], float], taken: contextlib.AsyncExitStack
    ) -> AsyncIterator[None]:
        process, output = engine.process, engine.output
        pump = asyncio.create_task(output.pump(partial(vitals.work, engine.pid, process.started)))
        note = asyncio.create_task(engine.look_after())
        try:
            yield
        finally:
            note.cancel()
            if engine.kept and not engine.exited.done():
                process.leave()
                taken.pop_all()  # port and folder stay its own
                log.info("engine kept", instance=engine.place.instance, pid=engine.pid, port=engine.place.port)
            else:
                # A stop that comes while the engine is ended already must not leave the rest of it alive.
                await to_the_end(self._end, engine, stop_timeout())
            pump.cancel()
            await asyncio.wait({pump})
            output.read(last=True)

    async def _end(self, engine: LaunchedEngine, grace_seconds: float) -> None:
        record = self.state.on_record(engine.place.own_name)
        if await bury(record, partial(engine.process.end, grace_seconds), self.state):
            log.info("engine ended", instance=record.instance, pid=engine.pid)


def _refuse(problems: Sequence[tuple[str, str]]) -> None:
    if problems:
        listed = "; ".join(f"{path}: {message}" for path, message in problems)
        raise LaunchError(Reason.INVALID_ARGUMENTS, f"vLLM would refuse its options: {listed}")


async def bury(record: EngineRecord, end: Callable[[], Awaitable[bool]], state: StateDirectory) -> bool:
    """`end` every process of an engine, then remove what they leave behind.

    True when nothing is left. What could not be ended stays on record for the next daemon.
    """
    mapped = await asyncio.to_thread(vitals.shared_segments, record.pid, record.started)
    try:
        if not (await end() and await cgroup.end(record.cgroup)):
            return False
    except OSError as error:  # not ours to signal
        log.error("the engine cannot be ended", instance=record.instance, pid=record.pid, error=str(error))
        return False
    if removed := await asyncio.to_thread(vitals.remove_segments, {*mapped, *record.segments}):
        log.info("shared memory of a dead engine removed", instance=record.instance, names=removed)
    shutil.rmtree(record.folder, ignore_errors=True)
    state.forget(record.own_name)
    return True
