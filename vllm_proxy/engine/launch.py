"""Starts or adopts one engine, and ends it. Owns its address, folder, processes, log and record meanwhile.

All of that is released when the block ends, so nothing leaks: but for an engine that is kept for the next daemon, or
that a stopping daemon could not end. When an engine starts is decided in `fleet`.
"""

import asyncio
import contextlib
import secrets
from asyncio import Task
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import structlog

from vllm_proxy.domain import command
from vllm_proxy.domain.address import TcpAddress, UnixAddress
from vllm_proxy.domain.canary import Canary, parse_canary
from vllm_proxy.domain.command import Place
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.devices import NO_DEVICES, Allocation, allocation_for
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.engine import cgroup, logs, scratch, vitals
from vllm_proxy.engine.cgroup import Cgroups
from vllm_proxy.engine.check import OptionCheck
from vllm_proxy.engine.ending import End, Owner, end_engine, until_ended
from vllm_proxy.engine.log_file import LogFile
from vllm_proxy.engine.output import Output, PassOn
from vllm_proxy.engine.ownership import Owned
from vllm_proxy.engine.ports import HOST, NoPortError, Ports
from vllm_proxy.engine.process import EngineProcess, end_processes, run_shielded
from vllm_proxy.engine.program import LaunchError, Programs
from vllm_proxy.engine.state import SOCKET, EngineRecord, StateDirectory, file_name, given
from vllm_proxy.engine.variables import Variables
from vllm_proxy.runtime import clock, descriptors, files
from vllm_proxy.runtime.background import keep_running

log = structlog.get_logger()

_MEMORY_SECONDS = 30.0
_MUCH_MORE_MEMORY = 1.5  # times what it was


class LaunchedEngine:
    """An engine that runs as processes of this machine."""

    def __init__(
        self, process: EngineProcess, record: EngineRecord, output: Output, log_file: LogFile, state: StateDirectory
    ) -> None:
        self.process = process
        self.output = output
        self.log = log_file
        self.place = record.place
        self.started_at = datetime.fromisoformat(record.started_at)
        self.was_ready = record.ready
        self.pid = process.pid
        self.exited = process.exited
        self.record = record
        self._state = state
        self.memory_bytes = 0  # of its processes, 0 until it was looked at
        self._serving = asyncio.Event()
        self.kept = self._lost_address = False

    async def holds_address(self) -> bool:
        """Whether all that listens at its address is provably its own; that it is not is logged once."""
        why = "another program has it, or the engine's processes cannot be looked at"
        try:
            holds = await asyncio.to_thread(self.process.owned.listens_on, self.place.address)
        except OSError as error:
            holds, why = False, str(error)
        if not holds and not self._lost_address:
            log.error("what answers on an engine's port is not provably the engine: it gets no credential and no "
                      "request", instance=self.place.instance, pid=self.pid,
                      address=self.record.address, why=why)  # fmt: skip
        self._lost_address = not holds
        return holds

    def mark_ready(self) -> None:
        """It is ready: record that."""
        self.output.loaded()
        self._serving.set()

    @property
    def asleep(self) -> int:
        """The level that it was to sleep at last, by whichever daemon; 0: it was to serve."""
        return self.record.asleep

    @property
    def canary(self) -> Canary | None:
        """What it answered before it slept; None: it has no route to be asked on."""
        return parse_canary(self.record.canary) if self.record.canary else None

    @property
    def before_sleep(self) -> int | None:
        """Bytes of its processes before it first slept at level 1, 0 where that is not known; None: it never has."""
        was_asleep = self.record.asleep == 1  # of a daemon that kept no more than that
        return 0 if self.record.before_sleep is None and was_asleep else self.record.before_sleep

    def note_sleep(self, level: int, canary: Canary | None) -> None:
        """Record that it is to sleep at this level, before it does, with what it answers awake; 0: that it serves."""
        before = self.before_sleep
        if level == 1 and before is None:
            before = self.memory_bytes
        shown = "" if canary is None else str(canary)
        self.record = replace(self.record, asleep=level, before_sleep=before, canary=shown)
        save_record(self._state, self.record)

    async def monitor(self) -> None:
        """Once it serves, record that, with the shared memory a kill would leak; then monitor its memory."""
        await self._serving.wait()
        found = await asyncio.to_thread(vitals.shared_segments, self.process.owned)
        self.record = replace(self.record, ready=True, segments=tuple(sorted(found)), weights=self.output.weights_bytes)
        save_record(self._state, self.record)
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
        self.log.check()
        return cgroup.memory_bytes(self.record.cgroup) or vitals.memory_bytes(self.process.owned)

    def age_seconds(self) -> float:
        """Since its first process started."""
        return clock.seconds_since_ticks(self.process.started)

    def keep(self) -> None:
        """Leave it to the next daemon where the block ends."""
        self.kept = True


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts engines as processes of this machine."""

    programs: Programs
    check: OptionCheck
    variables: Variables
    scratch: Path  # where their temporary folders go; short: sockets are in them
    has_gpus: bool
    ports: Ports
    state: StateDirectory
    pass_on: PassOn
    cgroups: Cgroups
    open_files: int  # the soft limit that engines get
    stopping: asyncio.Event  # set: the daemon stops
    running_now: dict[str, EngineProcess] = field(default_factory=dict)  # by instance

    def owned(self) -> dict[str, Owned]:
        """The processes of each engine that runs, by instance."""
        return {instance: process.owned for instance, process in self.running_now.items()}

    def allocation(self, spec: EngineSpec) -> Allocation:
        """What an engine of this spec needs, as long as nothing places it elsewhere."""
        if not self.has_gpus and spec.devices is None:
            return NO_DEVICES
        return allocation_for(spec, self.programs.inherited)

    def fingerprint(self, spec: EngineSpec) -> str:
        """Identifies the spec that an engine was started for."""
        return command.fingerprint(spec, str(self.programs.folder))

    async def objection(self, model: ModelSpec) -> Diagnosis | None:
        """Why no engine would start for a model; waits for its vLLM's options where they are being read."""
        try:
            self.programs.command(model.engine)
            self.programs.check_model(model.engine)
            await self.check.names(model.engine)
            _refuse(await self.check.problems(model))
            await self.variables.read(model.engine)
        except LaunchError as error:
            return error.diagnosis
        return None

    async def option_names(self, spec: EngineSpec) -> frozenset[str]:
        """The options that the vLLM of a spec takes, without dashes; none where they are not known."""
        return await self.check.names(spec)

    @contextlib.asynccontextmanager
    async def running(
        self, model: ModelSpec, instance: str, allocation: Allocation, owner: Owner
    ) -> AsyncIterator[LaunchedEngine]:
        """An engine that runs inside the block; after it nothing is left, unless its owner was notified otherwise.

        Raises:
            LaunchError: when it cannot be started.

        """
        start = self.programs.command(model.engine)
        self.programs.check_model(model.engine)
        _refuse(await self.check.problems(model))
        variables = await self.variables.read(model.engine)
        async with contextlib.AsyncExitStack() as stack:
            taken = stack.enter_context(contextlib.ExitStack())
            place = await self._allocate_place(model.engine, instance, allocation, owner, taken)
            argv = command.argv(model.id, model.engine, start, place)
            await stack.enter_async_context(self.variables.hidden(variables, place.credential))
            env = command.environment(
                self.programs.inherited, variables, place, takes_adapters=model.engine.lora is not None
            )
            with descriptors.spare():
                engine = self._spawn(argv, env, place, model.engine, stack)
                await stack.enter_async_context(self._lifetime(engine, owner, taken))
                self._put_on_record(engine)
                engine.process.release()
            log.info("engine started", instance=instance, pid=engine.pid, address=str(place.address),
                     log=str(self.state.log_file(instance)))  # fmt: skip
            yield engine

    @contextlib.asynccontextmanager
    async def adopted(self, record: EngineRecord, spec: EngineSpec, owner: Owner) -> AsyncIterator[LaunchedEngine]:
        """An engine that an earlier daemon started for this spec, as if it were ours.

        Raises:
            LaunchError: when it is gone.

        """
        async with contextlib.AsyncExitStack() as stack:
            taken = stack.enter_context(contextlib.ExitStack())
            self._reserve_address(record.place, taken)
            if record.folder:
                taken.callback(files.remove_tree, Path(record.folder))
            engine, why = None, "the engine ended while no daemon watched it"
            try:
                variables = await asyncio.to_thread(self.variables.of_running, record.pid, spec)
                await stack.enter_async_context(self.variables.hidden(variables, record.credential))
                engine = self._adopt(record, stack)
            except OSError as error:
                why = f"cannot adopt the engine, so it was ended: {error}"
            if engine is None:
                await run_shielded(self._end, record, partial(end_processes, record.identity), owner, taken)
                raise LaunchError(Reason.CRASHED, why)
            await stack.enter_async_context(self._lifetime(engine, owner, taken))
            log.info("engine adopted", instance=record.instance, pid=engine.pid, address=record.address)
            yield engine

    def _adopt(self, record: EngineRecord, stack: contextlib.AsyncExitStack) -> LaunchedEngine | None:
        process = EngineProcess.adopt(record.identity)
        if process is None:
            return None
        try:
            log_file = LogFile.of_running(record.pid, record.log)
        except OSError:
            process.detach()
            raise
        stack.callback(log_file.close)
        start = (record.instance, log_file.path, record.log_start, logs.size_of(log_file.path))
        output = Output(*start, self.pass_on, most_bytes=log_file.most_bytes, weights_bytes=record.weights)
        return LaunchedEngine(process, record, output, log_file, self.state)

    async def end_orphan(self, record: EngineRecord, owner: Owner) -> None:
        """End an engine that an earlier daemon left. Its address stays taken until that is done."""
        log.warning("ending an engine that an earlier daemon left", instance=record.instance, pid=record.pid)
        with contextlib.ExitStack() as taken:
            self._reserve_address(record.place, taken)
            await self._end(record, partial(end_processes, record.identity), owner, taken)

    def _reserve_address(self, place: Place, taken: contextlib.ExitStack) -> None:
        """Keep the address of an engine that an earlier daemon started from being allocated."""
        if (port := place.address.port) is not None:
            self.ports.reserve(port)
            taken.callback(self.ports.release, port)

    async def _allocate_place(
        self, spec: EngineSpec, instance: str, allocation: Allocation, owner: Owner, taken: contextlib.ExitStack
    ) -> Place:
        may_sleep = command.may_sleep(spec, allocation)
        port = None if may_sleep else await self._allocate_port(owner, taken)
        try:
            folder = scratch.make(self.scratch, self.state.path)
        except OSError as error:
            raise LaunchError.of(error, "make a temporary folder for an engine") from error
        taken.callback(files.remove_tree, Path(folder))
        address = UnixAddress(f"{folder}/{SOCKET}") if port is None else TcpAddress(HOST, port)
        own_name, credential = f"engine-{secrets.token_hex(8)}", secrets.token_urlsafe(24)
        return Place(instance, own_name, address, credential, folder, allocation, may_sleep)

    async def _allocate_port(self, owner: Owner, taken: contextlib.ExitStack) -> int:
        try:
            port = await self.ports.take_or_wait(owner.waits_for_port)
        except NoPortError as error:
            raise LaunchError(Reason.PORT_IN_USE, str(error)) from error
        except OSError as error:
            raise LaunchError.of(error, "look for a port for an engine") from error
        taken.callback(self.ports.release, port)
        return port

    def _spawn(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        place: Place,
        spec: EngineSpec,
        stack: contextlib.AsyncExitStack,
    ) -> LaunchedEngine:
        """A process that waits to be released, not on record yet."""
        try:
            log_file = LogFile.make(self.state.log_file(place.instance))
            stack.callback(log_file.close)
            log_start = logs.size_of(log_file.path)
            process = EngineProcess.spawn(argv, env, self.programs.folder, log_file.path)
        except OSError as error:
            raise LaunchError.of(error, "start a process") from error
        if log_file.problem:
            log.warning("an engine's output is passed on alone", instance=place.instance, why=log_file.problem)
        record = EngineRecord(
            place.instance, place.own_name, process.pid, process.started, str(place.address), place.credential,
            place.folder, log_file.recorded(process.pid), self.fingerprint(spec), log_start,
            datetime.now(UTC).isoformat(), **given(place.allocation), lora=spec.lora,
        )  # fmt: skip
        start = (place.instance, log_file.path, log_start, log_start)
        output = Output(*start, self.pass_on, most_bytes=log_file.most_bytes)
        return LaunchedEngine(process, record, output, log_file, self.state)

    def _put_on_record(self, engine: LaunchedEngine) -> None:
        descriptors.set_soft_limit(engine.pid, self.open_files)
        name = cgroup.name_of(file_name(engine.place.instance), engine.place.own_name)
        engine.record = replace(engine.record, cgroup=self.cgroups.create_group(name, engine.pid))
        engine.process.owned = Owned(engine.record.identity)
        save_record(self.state, engine.record)

    @contextlib.asynccontextmanager
    async def _lifetime(self, engine: LaunchedEngine, owner: Owner, taken: contextlib.ExitStack) -> AsyncIterator[None]:
        process, output, name = engine.process, engine.output, engine.place.instance
        pump = keep_running(partial(output.pump, lambda: vitals.work(process.owned)), f"output of {name}")
        monitoring = keep_running(engine.monitor, f"monitor of {name}")
        self.running_now[name] = process
        try:
            yield
        finally:
            monitoring.cancel()
            self.running_now.pop(name, None)
            # Shielded: a cancellation must leak neither processes nor who follows their output by a number soon reused.
            await run_shielded(self._leave, engine, pump, owner, taken)

    async def _leave(self, engine: LaunchedEngine, pump: Task[None], owner: Owner, taken: contextlib.ExitStack) -> None:
        """End it, or let it live on where it is kept; its last lines are passed on."""
        try:
            if engine.kept and not engine.exited.done() and _is_found(self.state, engine.record):
                engine.process.detach()
                taken.pop_all()  # address and folder stay its own
                owner.ended()
                log.info("engine kept", instance=engine.place.instance, pid=engine.pid, address=engine.record.address)
            else:
                await self._end(engine.record, engine.process.end, owner, taken)
        finally:
            pump.cancel()
            await asyncio.wait({pump})
            await engine.output.finish()

    async def _end(self, record: EngineRecord, end: End, owner: Owner, taken: contextlib.ExitStack) -> None:
        """End an engine; where that was given up, what was taken for it stays taken."""
        attempt = partial(end_engine, record, end, self.state, gone=owner.gone)
        if await until_ended(record, attempt, owner, self.stopping):
            log.info("engine ended", instance=record.instance, pid=record.pid)
        else:
            taken.pop_all()


def save_record(state: StateDirectory, record: EngineRecord) -> None:
    """Put an engine on record. Where that cannot be done, it runs all the same, and is ended as any other."""
    try:
        state.record(record)
    except OSError as error:
        log.error("an engine is not on record: a later daemon would not know of it",
                  instance=record.instance, error=str(error))  # fmt: skip


def _is_found(state: StateDirectory, record: EngineRecord) -> bool:
    """Whether the next daemon would find an engine that is kept; what could not be written is tried once more."""
    if _is_on_disk(state, record):
        return True
    save_record(state, record)
    if _is_on_disk(state, record):
        return True
    log.error("an engine is ended and not kept: no daemon would find it again", instance=record.instance,
              file=str(state.file))  # fmt: skip
    return False


def _is_on_disk(state: StateDirectory, record: EngineRecord) -> bool:
    try:
        return record.own_name.encode() in files.read_file(state.file)
    except OSError:
        return False


def _refuse(problems: Sequence[tuple[str, str]]) -> None:
    if problems:
        listed = "; ".join(f"{path}: {message}" for path, message in problems)
        raise LaunchError(Reason.INVALID_ARGUMENTS, f"vLLM would refuse its options: {listed}")
