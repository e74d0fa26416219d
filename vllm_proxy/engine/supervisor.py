"""One instance of a model: started, watched, started again after a failure, stopped. One task each.

Its one rule: an engine's death is a value here, never an exception that could reach another model.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from vllm_proxy.domain import lifecycle, progress
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.diagnose import Diagnosis, Exit, diagnose
from vllm_proxy.domain.lifecycle import Event, Life, Phase, Reason, State
from vllm_proxy.domain.progress import Progress
from vllm_proxy.engine.ejection import mind
from vllm_proxy.engine.gate import DeviceGate
from vllm_proxy.engine.history import History
from vllm_proxy.engine.launch import Engine
from vllm_proxy.engine.liveness import until_stalled
from vllm_proxy.engine.probe import Probe, Ready
from vllm_proxy.engine.program import LaunchError
from vllm_proxy.engine.registry import Endpoint, Registry
from vllm_proxy.engine.start import until_ready
from vllm_proxy.engine.state import EngineRecord

log = structlog.get_logger()

_TAIL_LINES = 20  # shown
_DIAGNOSED_LINES = 2000  # the root of a failure stands far above vLLM's last words


class Launcher(Protocol):
    """What starts engines."""

    def devices(self, spec: EngineSpec) -> frozenset[str]:
        """The GPUs that an engine measures while it loads."""

    def running(
        self, model: ModelSpec, instance: str, stop_timeout: Callable[[], float]
    ) -> contextlib.AbstractAsyncContextManager[Engine]:
        """An engine that runs inside the block."""

    def adopted(
        self, record: EngineRecord, stop_timeout: Callable[[], float]
    ) -> contextlib.AbstractAsyncContextManager[Engine]:
        """One that runs already."""

    async def objection(self, model: ModelSpec) -> Diagnosis | None:
        """Why no engine would start for a model, as far as it can be known without starting one."""

    async def option_names(self, spec: EngineSpec) -> frozenset[str]:
        """The options that the vLLM of a spec takes, without dashes; none where they are not known."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every supervisor shares."""

    launcher: Launcher
    gate: DeviceGate
    registry: Registry
    probe: Probe
    hurry: asyncio.Event  # set: do not wait for requests any more
    cleared: asyncio.Event  # set: what an earlier daemon left is gone, its ports and its memory are free


@dataclass(frozen=True, slots=True)
class LastExit:
    """How the engine last ended without being asked to."""

    diagnosis: Diagnosis
    ended: Exit
    at: datetime
    log_tail: tuple[str, ...]


class Supervisor:
    """The life of instance `index` of a model. `changed` is called after every change of what it shows."""

    def __init__(
        self, spec: ModelSpec, index: int, around: Surroundings, history: History, changed: Callable[[], None]
    ) -> None:
        self.spec = spec  # its policy may change at any time, its engine while it is stopped
        self.index = index
        self.name = f"{spec.id}/{index}"
        self.phase: Phase | None = None
        self.fraction: float | None = None  # of the phase
        self.diagnosis: Diagnosis | None = None
        self.last_exit: LastExit | None = None
        self.updated_at = datetime.now(UTC)
        self.started_at: datetime | None = None
        self.ready_at: datetime | None = None
        self.restarts = 0
        self.engine: Engine | None = None
        self.endpoint: Endpoint | None = None
        self._life = Life()
        self._around = around
        self._history = history
        self._changed = changed
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """What it is now."""
        return self._life.state

    def start(self, record: EngineRecord | None = None) -> None:
        """Begin to run, with an engine of an earlier daemon where there is one. Returns at once."""
        self._failures = 0
        self.diagnosis = None
        self._move(Event.START)
        self._task = asyncio.create_task(self._run(record), name=f"supervisor of {self.name}")

    def stop(self, *, keep: bool = False) -> asyncio.Task[None]:
        """Stop routing, wait for the requests in flight, end the engine; the task is done when nothing of it is left.

        `keep`: the engine itself goes on, for the next daemon.
        """
        assert self._task is not None, "only a started one can be stopped"
        assert self._life.state not in {State.STOPPED, State.UNLOADING}, "it is stopped once"
        left = self._around.gate.leave(self._around.launcher.devices(self.spec.engine))
        self._move(Event.STOP, Phase.DRAINING)
        if keep and self.engine is not None:
            self.engine.keep()
        self._task.cancel()
        return asyncio.create_task(self._leave(self._task, left), name=f"stop of {self.name}")

    async def _leave(self, running: asyncio.Task[None], left: Callable[[], None]) -> None:
        await asyncio.wait({running})
        left()
        self._move(Event.GONE)

    @property
    def failure(self) -> Diagnosis | None:
        """Why its last engine failed; None where one serves, or the first one is on its way."""
        return self.diagnosis if self._failures and self.state in {State.LOADING, State.ERROR} else None

    def seconds_left(self) -> float | None:
        """How long this start may still take, as the last ones of the same spec went; None where nothing is known."""
        if self.state is not State.LOADING or self.engine is None:
            return None
        elapsed = (datetime.now(UTC) - self.engine.started_at).total_seconds()
        return progress.estimate(self._history.past_starts(self.spec.engine), elapsed)

    def _move(self, event: Event, phase: Phase | None = None, *, generation: int | None = None) -> None:
        before = self._life
        self._life = before.after(event, before.generation if generation is None else generation)
        if self._life is before:  # a late event
            return
        if self._life.state is not before.state:
            self.updated_at = datetime.now(UTC)
        self._show(phase)

    def _show(self, phase: Phase | None, fraction: float | None = None) -> None:
        self.phase, self.fraction = phase, fraction
        self._changed()

    async def _run(self, record: EngineRecord | None) -> None:
        try:
            while True:
                self.diagnosis = await self._one_life(record)
                record = None
                self._history.failed(self.name, self.diagnosis.reason)
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

    async def _one_life(self, record: EngineRecord | None) -> Diagnosis:
        """Start or adopt an engine and stay with it until it ends by itself; returns why it did."""
        around = self._around
        try:
            async with contextlib.AsyncExitStack() as gate:
                self._show(Phase.QUEUED)
                if record is None:
                    await around.cleared.wait()
                devices = around.launcher.devices(self.spec.engine)
                await gate.enter_async_context(around.gate.hold(devices, at_once=record is not None))
                async with self._living(record) as engine:
                    self.engine, self.started_at = engine, engine.started_at
                    self._show(Phase.IMPORTING)
                    ready = await until_ready(engine, around.probe, self._startup_timeout, self._progress)
                    if not isinstance(ready, Ready):
                        refused = ready is None and engine.exited.result().refused
                        known = await around.launcher.option_names(self.spec.engine) if refused else frozenset()
                        return self._failed(engine, ready, known_options=known)
                    engine.serves()
                    await gate.aclose()  # its memory is taken: the next one may measure
                    return await self._serve(engine, ready)
        except LaunchError as error:
            return error.diagnosis
        finally:
            self.engine = self.ready_at = None

    def _living(self, record: EngineRecord | None) -> contextlib.AbstractAsyncContextManager[Engine]:
        if record is not None:
            return self._around.launcher.adopted(record, self._stop_timeout)
        return self._around.launcher.running(self.spec, self.name, self._stop_timeout)

    async def _serve(self, engine: Engine, ready: Ready) -> Diagnosis:
        """Let requests in until the engine ends or stalls; when stopped, wait for those in flight."""
        loop, place, registry = asyncio.get_running_loop(), engine.place, self._around.registry
        endpoint = Endpoint(self.name, place.port, place.credential, ready.max_model_len)
        generation = self._life.generation
        self._note_ready(engine)
        since = loop.time()
        self._move(Event.LISTENING, Phase.SERVING, generation=generation)
        registry.open(self.spec.id, endpoint)
        self.endpoint = endpoint
        minding = asyncio.create_task(mind(endpoint, self._around.probe, lambda: registry.readmit(self.spec.id)))
        stalling = asyncio.create_task(until_stalled(endpoint, self._around.probe, self._stall_timeout))
        try:
            ends: set[asyncio.Future[Any]] = {engine.exited, stalling}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            registry.withdraw(self.spec.id, endpoint)
            await self._drain(endpoint, engine)
            raise
        else:
            registry.withdraw(self.spec.id, endpoint)  # before anything else, and before anyone is told
            if loop.time() - since > self.spec.policy.restart.max_backoff:
                self._failures = 0  # it served for a while: what came before is forgiven
            stalled = None if engine.exited.done() else stalling.result()
            if stalled is not None:
                endpoint.pool.close()  # whoever waits for it learns now
            return self._failed(engine, stalled, was_ready=True, generation=generation)
        finally:
            minding.cancel()
            stalling.cancel()
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

    def _failed(
        self,
        engine: Engine,
        verdict: Diagnosis | None,
        *,
        was_ready: bool = False,
        generation: int | None = None,
        known_options: Collection[str] = (),
    ) -> Diagnosis:
        """Write a failure down. `verdict` None: the engine ended, and how it did says why."""
        ended = Exit(None, None)
        if verdict is None:
            ended = engine.exited.result()
            tail = engine.output.tail(_DIAGNOSED_LINES)
            verdict = diagnose(ended, tail, was_ready=was_ready, known_options=known_options)
        self.last_exit = LastExit(verdict, ended, datetime.now(UTC), engine.output.tail(_TAIL_LINES))
        self.diagnosis = verdict
        event = Event.STALLED if was_ready and verdict.reason is Reason.STALLED else Event.DIED
        self._move(event, Phase.STOPPING, generation=generation)  # the rest of its processes
        return verdict

    def _note_ready(self, engine: Engine) -> None:
        self.ready_at = datetime.now(UTC)
        self.diagnosis = None
        seconds = round((self.ready_at - engine.started_at).total_seconds(), 1)
        if not engine.was_ready:
            self._history.started(self.spec.engine, seconds)
        log.info("engine ready", instance=self.name, seconds=seconds)

    def _progress(self, now: Progress) -> None:
        self._show(now.phase, now.fraction)

    def _startup_timeout(self) -> float:
        return self.spec.policy.startup_timeout

    def _stop_timeout(self) -> float:
        return self.spec.policy.stop_timeout

    def _stall_timeout(self) -> float:
        return self.spec.policy.stall_timeout
