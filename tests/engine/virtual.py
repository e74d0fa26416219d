"""A clock that moves only when nothing else can happen, and what stands around a supervisor, as fakes.

A test of hours takes milliseconds, and one in which nothing can happen any more fails instead of hanging.
"""

import asyncio
import contextlib
import functools
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_proxy.domain.address import Address, TcpAddress
from vllm_proxy.domain.canary import Canary
from vllm_proxy.domain.command import Place
from vllm_proxy.domain.config import EngineSpec, ModelSpec, Policy
from vllm_proxy.domain.devices import Allocation, unmanaged
from vllm_proxy.domain.diagnose import Diagnosis, Exit
from vllm_proxy.domain.ledger import Depth
from vllm_proxy.domain.lifecycle import Phase, State
from vllm_proxy.domain.progress import START, Progress
from vllm_proxy.engine.adapter_source import AdapterError
from vllm_proxy.engine.adapters import Failed as Refusal
from vllm_proxy.engine.ending import Owner
from vllm_proxy.engine.nap import Failed, Freed, Noted, Operation, Slept, Woke
from vllm_proxy.engine.probe import Ready
from vllm_proxy.engine.process import run_shielded
from vllm_proxy.engine.program import LaunchError
from vllm_proxy.engine.state import EngineRecord
from vllm_proxy.fleet.adapter_use import AdapterUse
from vllm_proxy.fleet.adapters import ModelAdapters
from vllm_proxy.fleet.claims import Waits
from vllm_proxy.fleet.dependencies import Dependencies
from vllm_proxy.fleet.history import History
from vllm_proxy.fleet.loop import FleetLoop
from vllm_proxy.fleet.managed import Machines
from vllm_proxy.fleet.supervisor import Supervisor
from vllm_proxy.traffic.registry import Registry


class _Jumping(selectors.SelectSelector):
    """Where another selector would wait, the clock jumps."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing is left that could happen"
            self._jump(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time starts at 0 and jumps to the next timer. Not for threads, nor for real input."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jumping(self.jump))

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now

    def jump(self, seconds: float) -> None:
        """So many seconds pass at once."""
        self._now += seconds


def virtual[**P](test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make a test of a coroutine function: it runs in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


def now() -> float:
    """Virtual seconds."""
    return asyncio.get_running_loop().time()


async def passes(seconds: float) -> None:
    """Virtual time passes."""
    await asyncio.sleep(seconds)


async def settle() -> None:
    """Everything that can happen now happens."""
    for _ in range(20):
        await asyncio.sleep(0)


def model(model_id: str = "chat", devices: tuple[int | str, ...] | None = None, **policy: object) -> ModelSpec:
    """A model; `policy` are policy keys."""
    return ModelSpec(model_id, EngineSpec(model="some/model", devices=devices), Policy.model_validate(policy), {})


class FakeOutput:
    """What a fake engine writes."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.progress: Progress = START
        self.weights_bytes = 0

    @property
    def activity(self) -> int:
        """Grows with every line."""
        return len(self.lines)

    def tail(self, lines: int) -> tuple[str, ...]:
        """The last lines that it wrote."""
        return tuple(self.lines[-lines:])


class FakeLog:
    """Where that goes."""

    def __init__(self) -> None:
        self.path = Path("/nowhere")
        self.problem: str | None = None

    def check(self) -> str | None:
        """See anew."""
        return self.problem


class FakeEngine:
    """An engine that does what the test says."""

    def __init__(self, place: Place, *, was_ready: bool = False) -> None:
        self.pid = 4242
        self.place = place
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.output = FakeOutput()
        self.log = FakeLog()
        self.started_at = datetime.now(UTC)
        self.was_ready = was_ready
        self.memory_bytes = 0
        self.listens = False
        self.noted_ready = False
        self.kept = False
        self.asleep = 0
        self.canary: Canary | None = None
        self.before_sleep: int | None = None
        self.born = now()
        self.reaped_at: float | None = None
        self.spec: EngineSpec | None = None  # what it was started for; not known of an adopted one

    async def holds_address(self) -> bool:
        """Nobody else is there."""
        return True

    def age_seconds(self) -> float:
        """Since it was born."""
        return now() - self.born

    def mark_ready(self) -> None:
        """It is put on record that it is ready."""
        self.noted_ready = True

    def note_sleep(self, level: int, canary: Canary | None) -> None:
        """It is put on record that it is to sleep, or to serve."""
        self.asleep, self.canary = level, canary
        if level == 1 and self.before_sleep is None:
            self.before_sleep = self.memory_bytes

    def keep(self) -> None:
        """It is left to the next daemon."""
        self.kept = True

    def die(self, code: int | None = 1, signal: int | None = None) -> None:
        """Its first process ends."""
        self.listens = False
        self.exited.set_result(Exit(code, signal))


def place_of(instance: str, number: int, allocation: Allocation) -> Place:
    """Where the engine of that number runs."""
    return Place(instance, f"engine-{number}", TcpAddress("127.0.0.1", 9000 + number), "secret", "/nowhere", allocation)


class FakeLauncher:
    """Starts fake engines; like the real one it ends them to the last, whatever is cancelled meanwhile."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.refusal: LaunchError | None = None
        self.no_port: str | None = None  # why there is none for a minute
        self.known_objection: Diagnosis | None = None
        self.objection_error: Exception | None = None
        self.teardown_seconds = 0.0
        self.tidying_seconds = 0.0  # behind the end of its last process
        self.end_error: Exception | None = None
        self.teardown_error: Exception | None = None  # behind the end
        self.adopted_listen = True
        self.stop_timeouts: list[float] = []
        self.unkillable: dict[str, str] = {}  # instances whose engines cannot be ended, and why
        self.stopping = asyncio.Event()

    def allocation(self, spec: EngineSpec) -> Allocation:
        """What an engine of this spec needs."""
        return unmanaged(str(device) for device in spec.devices or ())

    async def objection(self, model: ModelSpec) -> Diagnosis | None:  # noqa: ARG002 - one answer for all
        """Why no engine would start."""
        if self.objection_error:
            raise self.objection_error
        return self.known_objection

    async def option_names(self, spec: EngineSpec) -> frozenset[str]:  # noqa: ARG002 - one vLLM for all
        """The options that its vLLM takes."""
        return frozenset({"seed", "max-num-batched-tokens"})

    @contextlib.asynccontextmanager
    async def running(
        self, model: ModelSpec, instance: str, allocation: Allocation, owner: Owner
    ) -> AsyncIterator[FakeEngine]:
        """An engine that runs inside the block."""
        if self.refusal:
            raise self.refusal
        if self.no_port:
            owner.waits_for_port(self.no_port)
            await asyncio.sleep(60)
            owner.waits_for_port(None)
        number = len(self.engines)
        place = place_of(instance, number, allocation)
        engine = FakeEngine(replace(place, may_sleep=model.engine.sleep is not None))
        engine.spec = model.engine
        async with self._living(engine, owner):
            yield engine

    @contextlib.asynccontextmanager
    async def adopted(
        self,
        record: EngineRecord,
        spec: EngineSpec,  # noqa: ARG002 - the signature is the launcher's
        owner: Owner,
    ) -> AsyncIterator[FakeEngine]:
        """One that runs already."""
        if self.refusal:
            raise self.refusal
        engine = FakeEngine(record.place, was_ready=record.ready)
        engine.asleep, engine.before_sleep = record.asleep, record.before_sleep
        engine.listens = self.adopted_listen
        async with self._living(engine, owner):
            yield engine

    async def end_orphan(self, record: EngineRecord, owner: Owner) -> None:
        """End one that an earlier daemon left."""
        await self._until_ended(record.instance, owner)

    @contextlib.asynccontextmanager
    async def _living(self, engine: FakeEngine, owner: Owner) -> AsyncIterator[None]:
        self.engines.append(engine)
        try:
            yield
        finally:
            if engine.kept:
                owner.ended()
            else:
                self.stop_timeouts.append(owner.stop_timeout())
                await run_shielded(self._end, engine, owner)

    async def _end(self, engine: FakeEngine, owner: Owner) -> None:
        await asyncio.sleep(self.teardown_seconds)
        if self.end_error:
            raise self.end_error
        if not engine.exited.done():
            engine.die(0)
        if await self._until_ended(engine.place.instance, owner):
            engine.reaped_at = now()
        if self.teardown_error:
            raise self.teardown_error

    async def _until_ended(self, instance: str, owner: Owner) -> bool:
        if instance in self.unkillable:
            owner.not_ended(self.unkillable[instance])
        while instance in self.unkillable:
            if self.stopping.is_set():
                return False
            await asyncio.sleep(1)
        owner.gone()
        await asyncio.sleep(self.tidying_seconds)
        owner.ended()
        return True


class FakeNap:
    """Puts fake engines to sleep, or does not."""

    def __init__(self) -> None:
        self.failures: list[Operation] = []  # what fails next
        self.seconds = 1.0  # of each
        self.done: list[str] = []
        self.sleeping: bool | None = True

    async def sleep(self, place: Place, level: int, note: Noted, freed: Freed) -> Slept | Failed:  # noqa: ARG002 - as it is
        """It sleeps."""
        note(None)
        await asyncio.sleep(self.seconds)
        if "sleep" in self.failures:
            self.failures.remove("sleep")
            return Failed("sleep", "as the test says")
        self.done.append(f"{place.instance} sleeps")
        return Slept(None, measured=False)

    async def wake(
        self,
        place: Place,
        level: int,  # noqa: ARG002 - as above
        expected: Canary | None,  # noqa: ARG002 - as above
        reload_seconds: float,  # noqa: ARG002 - as above
    ) -> Woke | Failed:
        """It serves again."""
        await asyncio.sleep(self.seconds)
        if "wake" in self.failures:
            self.failures.remove("wake")
            return Failed("wake", "as the test says")
        self.done.append(f"{place.instance} wakes")
        return Woke(verified=False)

    async def is_sleeping(self, place: Place) -> bool | None:  # noqa: ARG002 - as above
        """It says so."""
        return self.sleeping

    async def verify(self, place: Place, expected: Canary | None) -> Woke | Failed:  # noqa: ARG002 - as above
        """It answers."""
        return Woke(verified=True)


class FakeProbe:
    """Answers for the fake engines."""

    def __init__(self, launcher: FakeLauncher) -> None:
        self._launcher = launcher
        self.error: Exception | None = None
        self.health = True
        self.work: str | None = "0"
        self.looks: list[float] = []  # when somebody asked for it
        self.hangs = False  # and gives no answer to that for long
        self.bugs: list[Exception] = []  # raised by what is asked next

    async def healthy(self, address: Address) -> bool:  # noqa: ARG002 - one answer for all
        """Whether `/health` answers 200."""
        if self.bugs:
            raise self.bugs.pop()
        return self.health

    async def counters(self, address: Address) -> str | None:  # noqa: ARG002 - as above
        """What changes while the engine works."""
        self.looks.append(now())
        if self.hangs:
            await asyncio.sleep(5)
            return None
        return self.work

    async def ready(self, place: Place, is_engines: Callable[[], Awaitable[bool]]) -> Ready | None:
        """What the engine of this place says of itself."""
        assert await is_engines()
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        engine = next(engine for engine in self._launcher.engines if engine.place.address == place.address)
        assert place == engine.place
        return Ready(8192) if engine.listens else None


async def at_once[**P, T](function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What a thread would do: virtual time knows none."""
    return function(*args, **kwargs)


class KeptNumbers:
    """The durations of starts, and what memory engines had, by fingerprint."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.bytes: dict[str, int] = {}
        self.residues: dict[str, int] = {}

    def starts(self, spec: str) -> Sequence[float]:
        """How many seconds the last starts of a spec took."""
        return self.seconds.get(spec, [])

    def add_start(self, spec: str, seconds: float) -> None:
        """One more start of a spec."""
        self.seconds.setdefault(spec, []).append(seconds)

    def memory(self, spec: str) -> int | None:
        """Bytes that the last engine of a spec had of each device."""
        return self.bytes.get(spec)

    def note_memory(self, spec: str, size: int) -> None:
        """An engine of a spec has so many bytes of each device."""
        self.bytes[spec] = size

    def residue(self, spec: str) -> int | None:
        """Bytes that the last engine of a spec had of each device while it slept."""
        return self.residues.get(spec)

    def note_residue(self, spec: str, size: int) -> None:
        """An engine of a spec has so many bytes of each device while it sleeps."""
        self.residues[spec] = size


type Moment = tuple[State, Phase | None, int]  # what a supervisor shows, and how many endpoints its model has then


class FakeTenant:
    """An instance that wants devices, for who has no supervisor."""

    def __init__(self, name: str, *devices: str) -> None:
        self.name = name
        self.spec = model(name.rpartition("/")[0], devices=devices)
        self.told: list[str | None] = []  # why it waits
        self.gives_way_to: str | None = None
        self.engine: FakeEngine | None = None

    def wanted_since(self) -> float | None:
        """Nobody waits for it."""
        return None

    def idle_since(self) -> float | None:
        """It has no requests."""
        return 0.0

    def in_flight(self) -> int:
        """None."""
        return 0

    def on_idle(self, callback: Callable[[], None]) -> None:
        """It is."""
        callback()

    def start_seconds(self) -> float:
        """A guess."""
        return 60.0

    def wake_seconds(self) -> float:
        """A guess."""
        return 2.0

    def measured(self) -> int | None:
        """Not known."""
        return None

    def on_wait(self, why: Waits | None) -> None:
        """Note it."""
        self.told.append(why.because if why else None)

    def on_resume(self) -> None:
        """It does not give way."""
        self.gives_way_to = None

    def on_room(self) -> None:
        """It was not refused."""

    def may_sleep(self) -> bool:
        """It may not."""
        return False

    def keeps(self) -> int | None:
        """Not known."""
        return None

    def on_yield(self, depth: Depth, for_whom: str) -> None:  # noqa: ARG002 - it can only stop
        """Note it."""
        self.gives_way_to = for_whom


class FakeAdapters:
    """Fake engines' adapters, and snapshots of their files, one for each path that the test gives files."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}  # contents by path; else there are none
        self.held_now: dict[str, dict[str, Path]] = {}  # by the own name of the engine
        self.failures: dict[str, list[Refusal]] = {}  # of loads, by adapter, the next one first
        self.load_seconds: dict[str, float] = {}
        self.copy_seconds: dict[str, float] = {}  # by path
        self.mute = 0  # so many questions what is held get no answer
        self.done: list[str] = []
        self.kept: list[Path] = []
        self.removed: set[Path] = set()

    async def load(self, place: Place, name: str, folder: Path) -> Refusal | None:
        """One is loaded, or fails as the test says."""
        self.done.append(f"{place.instance} + {name}")
        await asyncio.sleep(self.load_seconds.get(name, 0.01))
        if failures := self.failures.get(name):
            return failures.pop(0)
        assert folder not in self.removed, "its files are gone"
        held = self.held_now.setdefault(place.own_name, {})
        if name in held:
            return Refusal("it is loaded already", answered=True)
        held[name] = folder
        return None

    async def unload(self, place: Place, name: str) -> Refusal | None:
        """One is forgotten."""
        self.done.append(f"{place.instance} - {name}")
        await asyncio.sleep(0.001)
        self.held_now.get(place.own_name, {}).pop(name, None)
        return None

    async def loaded(self, place: Place) -> dict[str, Path] | Refusal:
        """What it holds."""
        await asyncio.sleep(0.001)
        if self.mute:
            self.mute -= 1
            return Refusal("it says nothing", answered=False)
        return dict(self.held_now.get(place.own_name, {}))

    async def open(self) -> None:
        """There is a place for snapshots."""

    @contextlib.asynccontextmanager
    async def held(self, spec: EngineSpec, path: str, *, is_hub_id: bool) -> AsyncIterator[Path]:  # noqa: ARG002 - all are here
        """A snapshot, named by its contents."""
        await asyncio.sleep(self.copy_seconds.get(path, 0.0))
        if path not in self.files:
            raise AdapterError(f"cannot find {path}")
        folder = Path("/snapshots") / self.files[path]
        self.kept.append(folder)
        self.removed.discard(folder)
        try:
            yield folder
        finally:
            self.kept.remove(folder)

    async def sweep(self, used: Callable[[], Iterable[Path]]) -> None:
        """What nobody needs goes."""
        self.removed |= {Path("/snapshots") / content for content in self.files.values()} - {*used(), *self.kept}


class Stage:
    """What every supervisor shares, and a record of what they showed."""

    def __init__(self, machines: Machines | None = None) -> None:
        """`machines`: the devices, where they are managed."""
        self.launcher = FakeLauncher()
        self.probe = FakeProbe(self.launcher)
        self.nap = FakeNap()
        self.adapters = FakeAdapters()
        self.registry = Registry()
        self.loop = FleetLoop(machines)
        self.loop.room.unmanaged = self.launcher.allocation
        self.loop.start()
        self.shared = Dependencies(
            self.launcher,
            self.loop,
            self.registry,
            self.probe,
            self.nap,
            AdapterUse(self.adapters, self.adapters),
            skip_drain=asyncio.Event(),
            stopping=self.launcher.stopping,
            offload=at_once,
        )
        self.kept = KeptNumbers()
        self.woken: list[str] = []
        self.shown: list[Moment] = []
        self._moved = asyncio.Event()

    def history(self) -> History:
        """What became of a model's engines."""
        return History(self.kept, lambda spec: spec.model)

    def supervisor(self, spec: ModelSpec) -> Supervisor:
        """The only instance of a model, not started yet."""

        def changed() -> None:
            message = supervisor.diagnosis.message if supervisor.diagnosis else None
            route = self.registry.find(spec.id)
            self.shown.append((supervisor.state, supervisor.phase, len(route.endpoints)))
            self.registry.report(spec.id, supervisor.state, message)
            self.moved()

        self.registry.declare(spec, lambda: self.woken.append(spec.id))
        adapters = ModelAdapters(spec, self.shared.adapters, self.registry, changed, lambda _: None)
        supervisor = Supervisor(spec, 0, self.shared, self.history(), changed, adapters=adapters)
        return supervisor

    def moved(self) -> None:
        """Something changed: look again whether it is what somebody waits for."""
        self._moved.set()

    async def until(self, fact: Callable[[], bool]) -> None:
        """Wait for a fact, looked at after every change of what a supervisor shows."""
        async with asyncio.timeout(2000):
            while not fact():
                self._moved.clear()
                await self._moved.wait()

    async def engine(self, count: int = 1) -> FakeEngine:
        """The engine that was started as number `count`, once it is."""
        await self.until(lambda: len(self.launcher.engines) >= count)
        return self.launcher.engines[count - 1]

    async def serving(self, supervisor: Supervisor) -> FakeEngine:
        """Bring a started supervisor to `ready`."""
        await self.until(lambda: supervisor.engine is not None)
        engine = self.launcher.engines[-1]
        engine.listens = True
        await self.until(lambda: supervisor.state is State.READY)
        await settle()
        return engine
