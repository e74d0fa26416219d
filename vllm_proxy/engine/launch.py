"""One engine from its port to its last process. Its one rule: what was taken for it is given back in the same block."""

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from vllm_proxy.domain import command
from vllm_proxy.domain.command import Place
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.diagnose import Diagnosis, Exit
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.engine import logs
from vllm_proxy.engine.ports import NoPortError, Ports
from vllm_proxy.engine.process import EngineProcess, to_the_end
from vllm_proxy.engine.state import EngineRecord, StateDirectory
from vllm_proxy.errors import VllmProxyError

log = structlog.get_logger()


class LaunchError(VllmProxyError):
    """An engine could not even be started."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.diagnosis = Diagnosis(reason, message)


class Engine(Protocol):
    """A running engine, as its supervisor sees it."""

    @property
    def pid(self) -> int:
        """Of its first process."""

    @property
    def place(self) -> Place:
        """Where it runs."""

    @property
    def exited(self) -> asyncio.Future[Exit]:
        """How its first process ended, once it did."""

    def output_size(self) -> int:
        """Bytes it has written so far."""

    def tail(self, lines: int) -> tuple[str, ...]:
        """The last lines that it wrote."""


@dataclass(frozen=True, slots=True)
class LaunchedEngine:
    """A real one."""

    process: EngineProcess
    place: Place
    log_file: Path
    log_start: int  # where this engine's output begins in the file

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self.process.pid

    @property
    def exited(self) -> asyncio.Future[Exit]:
        """How its first process ended, once it did."""
        return self.process.exited

    def output_size(self) -> int:
        """Bytes it has written so far."""
        return logs.size_of(self.log_file)

    def tail(self, lines: int) -> tuple[str, ...]:
        """The last lines that it wrote."""
        return logs.last_lines(self.log_file, lines, self.log_start)


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts engines as processes of this machine."""

    folder: Path  # the configuration's: relative paths, and the engines' working directory
    inherited: Mapping[str, str]  # the environment that engines start from
    scratch: Path  # where their temporary folders go; short, since sockets lie there
    found_command: tuple[str, ...] | None  # vLLM, where no command is configured
    has_gpus: bool
    ports: Ports
    state: StateDirectory

    def devices(self, spec: EngineSpec) -> frozenset[str]:
        """The GPUs that an engine measures while it loads."""
        if not self.has_gpus and spec.devices is None:
            return frozenset()
        return command.devices_of(spec, self.inherited)

    @contextlib.asynccontextmanager
    async def running(self, model: ModelSpec, instance: str) -> AsyncIterator[Engine]:
        """An engine that runs inside the block; behind it nothing is left of it.

        Raises:
            LaunchError: when it cannot be started.

        """
        start = self._command(model.engine)
        async with contextlib.AsyncExitStack() as stack:
            place = self._take_place(instance, stack)
            argv = command.argv(model.id, model.engine, start, place)
            env = command.environment(self.inherited, model.engine, place)
            engine = self._spawn(argv, env, place)
            # A stop that comes while the engine is ended already must not leave the rest of it alive.
            stack.push_async_callback(to_the_end, self._end, engine, model.policy.stop_timeout)
            self.state.record(_record(engine))
            engine.process.release()
            log.info("engine started", instance=instance, pid=engine.pid, port=place.port, log=str(engine.log_file))
            yield engine

    def _command(self, spec: EngineSpec) -> Sequence[str]:
        start = spec.command or self.found_command
        if start is None:
            raise LaunchError(Reason.COMMAND_NOT_FOUND, "cannot find vLLM: install it, or set engine.command")
        path = spec.env.get("PATH", self.inherited.get("PATH"))
        program = os.path.join(self.folder, start[0]) if "/" in start[0] else start[0]  # noqa: PTH118 - keeps absolute ones
        if shutil.which(program, path=path) is None:
            msg = f"cannot run {start[0]}: there is no such program; set engine.command"
            raise LaunchError(Reason.COMMAND_NOT_FOUND, msg)
        return start

    def _take_place(self, instance: str, stack: contextlib.AsyncExitStack) -> Place:
        try:
            port = self.ports.take()
            stack.callback(self.ports.give_back, port)
            folder = tempfile.mkdtemp(prefix="vp-", dir=self.scratch)
        except (NoPortError, OSError) as error:
            raise LaunchError(Reason.CRASHED, f"cannot make room for an engine: {error}") from error
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return Place(instance, f"engine-{secrets.token_hex(8)}", port, secrets.token_urlsafe(24), folder)

    def _spawn(self, argv: Sequence[str], env: Mapping[str, str], place: Place) -> LaunchedEngine:
        log_file = self.state.log_file(place.instance)
        log_start = logs.size_of(log_file)
        try:
            process = EngineProcess.spawn(argv, env, self.folder, log_file)
        except OSError as error:
            raise LaunchError(Reason.CRASHED, f"cannot start a process: {error}") from error
        return LaunchedEngine(process, place, log_file, log_start)

    async def _end(self, engine: LaunchedEngine, grace_seconds: float) -> None:
        if await engine.process.end(grace_seconds):
            self.state.forget(engine.place.own_name)
            log.info("engine ended", instance=engine.place.instance, pid=engine.pid)


def _record(engine: LaunchedEngine) -> EngineRecord:
    place, process = engine.place, engine.process
    return EngineRecord(
        place.instance, place.own_name, process.pid, process.started, place.port, place.credential, place.folder,
        str(engine.log_file),
    )  # fmt: skip
