"""One instance of a model, one task: starts its engine, watches it, drains and ends it.

Owns the engine, what is shown of it, and its claim on devices, from the wish to start until nothing is left. An
engine's death is a value here, never an exception that could reach another model. When a start is admitted, who gives
way, and whether there is a retry after a failure, is decided by the fleet loop; `start` and `stop` are for its `Model`
alone.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import structlog

from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.devices import Allocation
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Event, Phase, Reason, State
from vllm_proxy.engine.interface import Engine
from vllm_proxy.engine.meter import Meter
from vllm_proxy.engine.nap import Failed
from vllm_proxy.engine.probe import Ready
from vllm_proxy.engine.program import LaunchError
from vllm_proxy.engine.readiness import until_ready
from vllm_proxy.engine.state import EngineRecord
from vllm_proxy.fleet.adapters import ModelAdapters
from vllm_proxy.fleet.claims import Claim
from vllm_proxy.fleet.dependencies import Dependencies
from vllm_proxy.fleet.draining import cut, drain, give_way
from vllm_proxy.fleet.engine_adapters import EngineAdapters
from vllm_proxy.fleet.failure import last_exit
from vllm_proxy.fleet.history import History
from vllm_proxy.fleet.instance import Instance
from vllm_proxy.fleet.rest import ColdStartError, EndedAsleepError, Rest
from vllm_proxy.fleet.watching import watched
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import run_once, spawn
from vllm_proxy.traffic.endpoint import Endpoint

log = structlog.get_logger()

_TRANSFERS = {"kv-transfer-config"}  # args of an engine that others read from, until it has ended in peace


class Supervisor(Instance):
    """The life of instance `index` of a model. `changed` is called after every change of what it shows."""

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        shared: Dependencies,
        history: History,
        changed: Callable[[], None],
        *,
        adapters: ModelAdapters,
        wanted_since: Callable[[], float | None] = lambda: None,
    ) -> None:
        """`adapters`: of the model. `wanted_since`: since when a request or a person has waited for the model."""
        super().__init__(spec, index, history, changed, wanted_since)
        self._shared = shared
        self._adapters = adapters
        self._failures = {False: 0, True: 0}  # in a row; of a machine that lacks something apart
        self._engine_alive = False  # whether an engine of it, or a process of one, lives
        self._task: asyncio.Task[None] | None = None
        self._to_sleep = False
        self._starts_cold = False  # its engine is ended, and it keeps its claim

    def start(self, record: EngineRecord | None = None) -> None:
        """Begin to run, with an engine of an earlier daemon where there is one. Returns at once."""
        self._failures = {False: 0, True: 0}
        self.diagnosis = self._failure = None
        self.has_room = False
        if record is not None:  # it holds what it has before anybody asks
            self.claim = self._shared.loop.room.hold(self, record.place.allocation)
        self._transition(Event.START)
        self._task = run_once(partial(self._run, record), f"supervisor of {self.name}")

    def sleep(self) -> asyncio.Task[None]:
        """Stop routing, wait for the requests in flight, put the engine to sleep; or end it, where that fails.

        The task is done when that is so.
        """
        leaving = self.stop()
        self._to_sleep = True
        return leaving

    def stop_yielding(self) -> None:
        """One that gives way, or is to sleep, is stopped by hand, or for good: as any other."""
        super().stop_yielding()
        if self._to_sleep and self.state is State.UNLOADING and self._task is not None:
            self._to_sleep = False
            if self.phase is Phase.FALLING_ASLEEP:
                self._task.cancel()
            self._transition(Event.STOP, Phase.STOPPING)

    def stop(self, *, keep: bool = False) -> asyncio.Task[None]:
        """Stop routing, wait for the requests in flight, end the engine; the task is done when nothing of it is left.

        `keep`: the engine itself goes on, for the next daemon.
        """
        assert self._task is not None, "only a started one can be stopped"
        assert self._life.state not in {State.STOPPED, State.UNLOADING}, "it is stopped once"
        self._to_sleep = False
        self._serves_on.clear()
        if self.gives_way_to is None:
            self._leave()
        is_reported = self.diagnosis is not None and self.diagnosis.reason is Reason.NOT_ENDED and self._engine_alive
        self._transition(Event.STOP, Phase.STOPPING if is_reported else Phase.DRAINING)
        if keep and self.engine is not None:
            self.engine.keep()
        self._task.cancel()
        return run_once(partial(self._finish_stop, self._task), f"stop of {self.name}")

    async def _finish_stop(self, running: asyncio.Task[None]) -> None:
        """It stays `unloading` where its engine could not be ended and a stopping daemon gave up.

        One that gave way serves on where nobody waits for its room any more.
        """
        serves_on = spawn(self._serves_on.wait(), f"return of {self.name}")
        await asyncio.wait({running, serves_on}, return_when=asyncio.FIRST_COMPLETED)
        serves_on.cancel()
        if running.done() and not self._engine_alive:
            self._release_claim()
            self._shared.loop.room.forget(self)
            self.diagnosis = None
            self._transition(Event.GONE)

    # Notifications of the launcher

    def stop_timeout(self) -> float:
        """Seconds between SIGTERM and SIGKILL. One that gives way has no request any more and holds nothing to save."""
        if self.gives_way_to is not None and not _TRANSFERS & self.spec.engine.args.keys():
            return 0.0
        return self.spec.policy.stop_timeout

    def waits_for_port(self, why: str | None) -> None:
        """No port is free yet."""
        self._show_wait(Diagnosis(Reason.PORT_IN_USE, f"waits: {why}") if why else None)

    def not_ended(self, why: str) -> None:
        """Its engine could not be ended, which is tried again."""
        self._engine_alive = True
        if self.state is State.READY:
            self._transition(Event.DIED)
        if self.claim is None:
            self.claim = self._shared.loop.room.hold(self, self._shared.launcher.allocation(self.spec.engine))
        self.claim.failed(why)
        self.diagnosis = Diagnosis(Reason.NOT_ENDED, f"cannot end its engine: {why}")
        self._notify(Phase.STOPPING)

    def gone(self) -> None:
        """No process of its engine lives: another one may have its room."""
        if self.claim is not None and not self._starts_cold:
            self.claim.done()
            self.claim = None

    def ended(self) -> None:
        """Nothing is left of its engine, or it was left to the next daemon."""
        self._engine_alive = False

    def _can_sleep(self) -> bool:
        able = self.engine is not None and self.engine.place.may_sleep and self.claim is not None
        return able and self.claim is not None and self._shared.loop.room.has_host_memory_for(self.claim)

    async def _run(self, record: EngineRecord | None) -> None:
        try:
            while True:
                try:
                    failure = await self._run_engine(record)
                except ColdStartError as error:
                    self._starts_cold = False
                    self._note_nap_failed(Reason.WAKE_FAILED, error.failed)
                    record = None
                    continue
                except EndedAsleepError:
                    record = None
                    if self._engine_alive or not self._starts_after_sleep():
                        return
                    continue
                if self._engine_alive:  # a stopping daemon could not end it
                    return
                self._release_claim()
                record = None
                self.diagnosis = self._failure = failure
                self._history.failed(self.name, failure.reason)
                if not await self._await_retry(failure):
                    return
        except Exception:  # a bug in here must not reach other models
            log.exception("the supervisor failed", instance=self.name)
            self._fail_by_bug()

    def _starts_after_sleep(self) -> bool:
        """Whether its next engine starts, as any other: the one that slept has ended, and somebody waits for it."""
        self._release_claim()
        self._transition(Event.DIED, Phase.QUEUED if self.state is State.LOADING else None)
        return self.state is State.LOADING

    def _fail_by_bug(self) -> None:
        """It ends in `error`; where its engine may live, it is reported as not ended, and nothing starts beside it."""
        fault = "a fault of the daemon itself: see its log"
        if self._engine_alive:
            self.not_ended(f"{fault}; end it by hand, then restart the daemon")
            return
        self._release_claim()
        if self.state is State.READY:
            self._transition(Event.DIED)
        self.diagnosis = Diagnosis(Reason.CRASHED, fault)
        if self.state is State.LOADING:  # else a stop is in progress, which continues
            self._transition(Event.GAVE_UP)

    async def _await_retry(self, failure: Diagnosis) -> bool:
        """Wait out the backoff before a retry; False when the instance stays in `error`."""
        self._failures[failure.of_machine] += 1

        def on_retry(seconds: float) -> None:
            log.warning("the engine failed and is started again", instance=self.name, reason=failure.reason,
                        message=failure.message, seconds=round(seconds, 1))  # fmt: skip
            self._notify(Phase.BACKOFF)

        again = await self._shared.loop.await_retry(
            self.name, failure, self._failures[failure.of_machine], lambda: self.spec.policy.restart, on_retry
        )
        if again:
            self.restarts += 1
        else:
            log.error("the instance rests in error", instance=self.name, reason=failure.reason,
                      message=failure.message, failures=self._failures[False])  # fmt: skip
            self._transition(Event.GAVE_UP)
        return again

    async def _run_engine(self, record: EngineRecord | None) -> Diagnosis:
        """Start or adopt an engine and stay with it until it ends by itself; returns why it did."""
        shared = self._shared
        try:
            self._notify(Phase.QUEUED)
            claim = self.claim = self.claim or shared.loop.room.ask(self)
            allocation = await claim.admission()
            self._engine_alive = record is not None
            self._adapters.prepare()
            async with self._running(record, allocation) as engine:
                self.engine, self.started_at, self._engine_alive = engine, engine.started_at, True
                self._notify(Phase.IMPORTING)
                ready = await until_ready(
                    engine, shared.probe, lambda: self.spec.policy.startup_timeout, self._progress
                )
                if not isinstance(ready, Ready):
                    refused = ready is None and engine.exited.result().refused
                    known = await shared.launcher.option_names(self.spec.engine) if refused else frozenset()
                    return await self._failed(engine, ready, known_options=known)
                engine.mark_ready()
                with self._adapters.of_engine(self, engine, adopted=record is not None) as held:
                    return await self._live(engine, ready, claim, held)
        except LaunchError as error:
            return error.diagnosis.masked(shared.mask)
        finally:
            self.engine = self.ready_at = None
            shared.adapters.forget(record.own_name if record else "")

    def _running(
        self, record: EngineRecord | None, allocation: Allocation
    ) -> contextlib.AbstractAsyncContextManager[Engine]:
        if record is not None:
            return self._shared.launcher.adopted(record, self.spec.engine, self)
        return self._shared.launcher.running(self.spec, self.name, allocation, self)

    async def _live(self, engine: Engine, ready: Ready, claim: Claim, held: EngineAdapters) -> Diagnosis:
        """Have it serve and sleep until it ends by itself; returns why it did."""
        rest = Rest(self._shared.nap, self._shared.loop.room, engine, claim, self._history)
        meter = self.meter = await Meter.of(engine, self._shared.probe, self._history.tokens.update)
        if (sleeps := await rest.adopted()) is not False:
            if sleeps is None:
                self._starts_cold = True
                raise ColdStartError(Failed("wake", "an earlier daemon put it to sleep, and it gives no clean answer"))
            claim.sleeps(None)
            await self._sleep(rest, engine, held)
        while (failure := await self._serve(engine, ready, claim, meter, held)) is None:
            if engine.exited.done():  # while its last requests were awaited
                await self._note_end(engine)
                raise asyncio.CancelledError
            self._notify(Phase.FALLING_ASLEEP)
            await held.close()
            if (failed := await rest.begin(self.spec.engine.sleep or 1)) is not None:
                self._note_nap_failed(Reason.SLEEP_FAILED, failed)
                raise asyncio.CancelledError
            await self._sleep(rest, engine, held)
        return failure

    async def _sleep(self, rest: Rest, engine: Engine, held: EngineAdapters) -> None:
        """It sleeps, until it is admitted to wake, and has."""
        self.sleeps = True
        self._settle(Event.SLEPT, Phase.SLEEPING)
        try:
            if not await rest.until_admitted():
                self._leave()
                await self._note_end(engine)
                raise EndedAsleepError
        finally:
            self.sleeps = False
        if self.state is State.SLEEPING:
            self._transition(Event.START)
        self._notify(Phase.WAKING)
        held.wakes(engine.asleep)
        if (failed := await rest.end(self.spec)) is not None:
            self._starts_cold = True
            raise ColdStartError(failed)

    async def _serve(
        self, engine: Engine, ready: Ready, claim: Claim, meter: Meter, held: EngineAdapters
    ) -> Diagnosis | None:
        """Route requests to it until the engine ends or stalls; when stopped, drain. None: it is to sleep."""
        loop, place, registry = asyncio.get_running_loop(), engine.place, self._shared.registry
        endpoint = Endpoint(self.name, place.address, place.credential, ready.max_model_len, ready.tasks)
        generation = self._life.generation
        await held.open(endpoint)
        self._note_ready(engine, claim.woke_seconds)
        since = loop.time()
        self._transition(Event.LISTENING, Phase.SERVING, generation=generation)
        registry.add_endpoint(self.spec.id, endpoint)
        self.endpoint = endpoint
        claim.serves()  # its memory is allocated: the next engine may measure
        try:
            with watched(endpoint, meter, self._shared, lambda: self.spec.policy) as stalling:
                ends: set[asyncio.Future[Any]] = {engine.exited, stalling}
                while not any(end.done() for end in ends):
                    try:
                        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    except asyncio.CancelledError:
                        registry.withdraw_endpoint(self.spec.id, endpoint)
                        if await self._drain(endpoint, engine, claim, meter):
                            self._settle(Event.RESUMED, Phase.SERVING)
                            registry.add_endpoint(self.spec.id, endpoint)
                        elif self._to_sleep:
                            return None
                        else:
                            raise
                registry.withdraw_endpoint(self.spec.id, endpoint)  # before anything else, and before any notification
                if clock.elapsed(since) > self.spec.policy.restart.max_backoff:
                    self._failures = {False: 0, True: 0}  # it served for a while: earlier failures do not count
                stalled = None if engine.exited.done() else stalling.result()
                if stalled is not None:
                    endpoint.pool.close()  # its requests in flight fail now
                return await self._failed(engine, stalled, was_ready=True, generation=generation)
        finally:
            self.endpoint = None

    def _settle(self, event: Event, phase: Phase) -> None:
        """What was to end goes on: it serves, or sleeps."""
        assert self._task is not None, "it runs"
        while self._task.uncancel():
            pass
        self._to_sleep = False
        self._end_yielding()
        self._transition(event, phase)
        self._serves_on.set()

    async def _drain(self, endpoint: Endpoint, engine: Engine, claim: Claim, meter: Meter) -> bool:
        """Wait for the requests in flight; one that gives way, until it is stopped by hand, has a time of its own.

        Whether it is to serve on.
        """
        policy, skip = self.spec.policy, self._shared.skip_drain
        if self.gives_way_to is not None:
            ends = skip, self._stop_yielding, self._resumed
            await give_way(endpoint, engine, claim, policy.yield_timeout, ends)
            if self._resumed.is_set():
                return not engine.exited.done()
        if self.gives_way_to is None or self._stop_yielding.is_set():
            await drain(endpoint, engine, policy.drain_timeout, (skip,))
        if not self._shared.stopping.is_set():  # nobody can ask the daemon for its figures any more
            await meter.finish(endpoint)
        cut(endpoint)
        self._notify(Phase.STOPPING)
        return False

    async def _failed(
        self,
        engine: Engine,
        verdict: Diagnosis | None,
        *,
        was_ready: bool = False,
        generation: int | None = None,
        known_options: Collection[str] = (),
    ) -> Diagnosis:
        """Record a failure. `verdict` None: the engine ended, and its exit and its log are diagnosed."""
        self._leave()
        stalled = was_ready and verdict is not None and verdict.reason is Reason.STALLED
        # Shown before the diagnosis is there: the rest of its processes is being stopped.
        self._transition(Event.STALLED if stalled else Event.DIED, Phase.STOPPING, generation=generation)
        self.last_exit = await last_exit(
            engine, verdict, self._shared, was_ready=was_ready, known_options=known_options
        )
        self.diagnosis = self.last_exit.diagnosis
        self._notify(Phase.STOPPING)
        return self.diagnosis

    async def _note_end(self, engine: Engine) -> None:
        self._note_died(await last_exit(engine, None, self._shared, was_ready=True))
