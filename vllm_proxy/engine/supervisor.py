"""One instance of a model: started, watched, started again after a failure, stopped. One task each.

Its one rule: an engine's death is a value here, never an exception that could reach another model.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from vllm_proxy.domain import lifecycle
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.diagnose import Diagnosis, Exit, diagnose
from vllm_proxy.domain.lifecycle import Event, Phase, Reason, State
from vllm_proxy.engine.ejection import mind
from vllm_proxy.engine.gate import DeviceGate
from vllm_proxy.engine.launch import Engine, LaunchError
from vllm_proxy.engine.probe import Ready
from vllm_proxy.engine.registry import Endpoint, Registry

log = structlog.get_logger()

_POLL_SECONDS = 0.05  # a refused connection on loopback costs microseconds
_TAIL_LINES = 20


class Launcher(Protocol):
    """What starts engines."""

    def devices(self, spec: EngineSpec) -> frozenset[str]:
        """The GPUs that an engine measures while it loads."""

    def running(self, model: ModelSpec, instance: str) -> contextlib.AbstractAsyncContextManager[Engine]:
        """An engine that runs inside the block."""


class Probe(Protocol):
    """What tells whether an engine is ready."""

    async def ready(self, port: int, own_name: str, credential: str) -> Ready | None:
        """What the engine on this port says of itself, None while it is not ready or not ours."""

    async def healthy(self, port: int) -> bool:
        """Whether `/health` answers 200."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every supervisor shares."""

    launcher: Launcher
    gate: DeviceGate
    registry: Registry
    probe: Probe
    hurry: asyncio.Event  # set: do not wait for requests any more


@dataclass(frozen=True, slots=True)
class LastExit:
    """How the engine last ended without being asked to."""

    diagnosis: Diagnosis
    ended: Exit
    at: datetime
    log_tail: tuple[str, ...]


class Supervisor:
    """The life of instance `index` of a model. `changed` is called after every change of what it shows."""

    def __init__(self, spec: ModelSpec, index: int, around: Surroundings, changed: Callable[[], None]) -> None:
        self.spec = spec
        self.index = index
        self.name = f"{spec.id}/{index}"
        self.state = State.STOPPED
        self.phase: Phase | None = None
        self.diagnosis: Diagnosis | None = None
        self.last_exit: LastExit | None = None
        self.updated_at = self.created_at = datetime.now(UTC)
        self.started_at: datetime | None = None
        self.ready_at: datetime | None = None
        self.restarts = 0
        self.engine: Engine | None = None
        self.endpoint: Endpoint | None = None
        self._around = around
        self._changed = changed
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run. Returns at once."""
        self._failures = 0
        self._move(Event.START)
        self._task = asyncio.create_task(self._run(), name=f"supervisor of {self.name}")

    async def stop(self) -> None:
        """Stop routing, wait for the requests in flight, end the engine; returns when nothing of it is left."""
        assert self._task is not None, "stop follows start"
        self._move(Event.STOP, Phase.DRAINING)
        self._task.cancel()
        await asyncio.wait({self._task})  # not the task itself: to cancel this wait must not cut the end of the engine
        self._move(Event.GONE)

    def _move(self, event: Event, phase: Phase | None = None) -> None:
        before, self.state = self.state, lifecycle.after(self.state, event)
        if self.state is not before:
            self.updated_at = datetime.now(UTC)
        self._show(phase)

    def _show(self, phase: Phase | None) -> None:
        self.phase = phase
        self._changed()

    async def _run(self) -> None:
        try:
            while True:
                self.diagnosis = await self._one_life()
                if not await self._may_try_again(self.diagnosis):
                    return
        except Exception:  # a bug in here must not take the other models along
            log.exception("the supervisor failed", instance=self.name)
            self.diagnosis = Diagnosis(Reason.CRASHED, "a fault of the daemon itself: see its log")
            if self.state is State.READY:
                self._move(Event.DIED)
            if self.state is State.LOADING:  # else it is stopped just now, which goes on
                self._move(Event.GAVE_UP)

    async def _may_try_again(self, diagnosis: Diagnosis) -> bool:
        """Wait out the backoff; False when the instance rests in `error`."""
        restart = self.spec.policy.restart
        self._failures += 1
        if diagnosis.reason in lifecycle.FINAL or self._failures >= restart.max_failures:
            log.error("the instance rests in error", instance=self.name, reason=diagnosis.reason,
                      message=diagnosis.message, failures=self._failures)  # fmt: skip
            self._move(Event.GAVE_UP)
            return False
        seconds = lifecycle.backoff_seconds(self._failures, restart.backoff, restart.max_backoff, random.random())  # noqa: S311
        log.warning("the engine failed and is started again", instance=self.name, reason=diagnosis.reason,
                    message=diagnosis.message, seconds=round(seconds, 1))  # fmt: skip
        self._show(Phase.BACKOFF)
        await asyncio.sleep(seconds)
        self.restarts += 1
        return True

    async def _one_life(self) -> Diagnosis:
        """Start an engine and stay with it until it ends by itself; returns why it did."""
        try:
            async with contextlib.AsyncExitStack() as gate:
                self._show(Phase.QUEUED)
                await gate.enter_async_context(self._around.gate.hold(self._around.launcher.devices(self.spec.engine)))
                async with self._around.launcher.running(self.spec, self.name) as engine:
                    self.engine, self.started_at = engine, datetime.now(UTC)
                    self._show(None)
                    ready = await self._until_ready(engine)
                    if isinstance(ready, Diagnosis):
                        return ready
                    await gate.aclose()  # its memory is taken: the next one may measure
                    return await self._serve(engine, ready)
        except LaunchError as error:
            return error.diagnosis
        finally:
            self.engine = self.ready_at = None

    async def _until_ready(self, engine: Engine) -> Ready | Diagnosis:
        """Poll the engine; a long start is fine as long as it writes something now and then."""
        loop, policy, place = asyncio.get_running_loop(), self.spec.policy, engine.place
        written, progress = engine.output_size(), loop.time()
        while not engine.exited.done():
            if ready := await self._around.probe.ready(place.port, place.own_name, place.credential):
                return ready
            if (size := engine.output_size()) != written:
                written, progress = size, loop.time()
            if loop.time() - progress > policy.startup_timeout:
                message = f"nothing happened for {policy.startup_timeout:g} s; see its log, or raise startup_timeout"
                return self._failed(engine, Diagnosis(Reason.STARTUP_TIMEOUT, message), Exit(None, None))
            await asyncio.wait({engine.exited}, timeout=_POLL_SECONDS)
        return self._examine(engine, was_ready=False)

    async def _serve(self, engine: Engine, ready: Ready) -> Diagnosis:
        """Let requests in until the engine ends; when stopped, wait for those in flight."""
        loop, place, registry = asyncio.get_running_loop(), engine.place, self._around.registry
        endpoint = Endpoint(self.name, place.port, place.credential, ready.max_model_len)
        self.ready_at, since = datetime.now(UTC), loop.time()
        self._move(Event.LISTENING, Phase.SERVING)
        log.info("engine ready", instance=self.name, seconds=self._seconds_to_ready())
        registry.open(self.spec.id, endpoint)
        self.endpoint = endpoint
        minding = asyncio.create_task(mind(endpoint, self._around.probe, lambda: registry.readmit(self.spec.id)))
        try:
            await asyncio.wait({engine.exited})
        except asyncio.CancelledError:
            registry.withdraw(self.spec.id, endpoint)
            await self._drain(endpoint, engine)
            raise
        else:
            registry.withdraw(self.spec.id, endpoint)  # before anything else, and before anyone is told
            if loop.time() - since > self.spec.policy.restart.max_backoff:
                self._failures = 0  # it served for a while: what came before is forgiven
            return self._examine(engine, was_ready=True)
        finally:
            minding.cancel()
            self.endpoint = None

    async def _drain(self, endpoint: Endpoint, engine: Engine) -> None:
        """Wait for the requests in flight, but not for longer than allowed, nor for a dead engine."""
        idle = asyncio.ensure_future(endpoint.wait_idle())
        hurry = asyncio.ensure_future(self._around.hurry.wait())
        waits: set[asyncio.Future[Any]] = {idle, hurry, engine.exited}
        try:
            await asyncio.wait(waits, timeout=self.spec.policy.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            idle.cancel()
            hurry.cancel()
        if endpoint.in_flight:
            log.warning("requests did not end in time", instance=self.name, in_flight=endpoint.in_flight)
        endpoint.pool.close()  # vLLM waits for open connections without limit
        self._show(Phase.STOPPING)

    def _examine(self, engine: Engine, *, was_ready: bool) -> Diagnosis:
        ended = engine.exited.result()
        return self._failed(engine, diagnose(ended, engine.tail(_TAIL_LINES), was_ready=was_ready), ended)

    def _failed(self, engine: Engine, diagnosis: Diagnosis, ended: Exit) -> Diagnosis:
        self.last_exit = LastExit(diagnosis, ended, datetime.now(UTC), engine.tail(_TAIL_LINES))
        self.diagnosis = diagnosis
        self._move(Event.DIED, Phase.STOPPING)  # the rest of its processes
        return diagnosis

    def _seconds_to_ready(self) -> float:
        assert self.ready_at is not None
        assert self.started_at is not None
        return round((self.ready_at - self.started_at).total_seconds(), 1)
