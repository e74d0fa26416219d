"""One machine in virtual time: engines load, serve, sleep and end as the room decides, and requests wait for them.

Every decision is verified, and asked for twice. What a policy costs is read from the machine afterwards.
"""

import heapq
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from tests.simulation import checks
from vllm_proxy.domain.eviction import Rules
from vllm_proxy.domain.ledger import Ask, Depth, Device, Hold, Short, Standing
from vllm_proxy.domain.room import Moves

GIB = 2**30


@dataclass(slots=True)
class Request:
    """`seconds`: so long it is in flight. `done`: called when it has ended, in whatever way."""

    came: float
    seconds: float
    done: Callable[[], None] | None = None


@dataclass(slots=True, eq=False)
class Engine:
    """One model with one instance; what its start, sleep and end cost, in seconds, and what has become of it."""

    name: str
    needs: int  # bytes of each device
    count: int = 1
    only: tuple[str, ...] = ()
    keeps: int | None = None  # of each device while it sleeps; None: it does not
    start_seconds: float = 40.0
    wake_seconds: float = 2.0
    sleep_seconds: float = 1.0
    stop_seconds: float = 1.0
    start: Literal["always", "warm", "on-demand"] = "on-demand"
    priority: int = 0
    yield_timeout: float = 300.0
    standing: Standing | None = None
    takes: dict[str, int] = field(default_factory=dict)
    in_flight: list[Request] = field(default_factory=list)
    queue: list[Request] = field(default_factory=list)
    since: float = 0.0
    asks_since: float = 0.0
    idle_since: float | None = None
    to: Depth | None = None
    place: tuple[str, ...] = ()
    short: Short | None = None

    @property
    def asks(self) -> bool:
        """Whether it wants room."""
        return self.standing in {None, Standing.SLEEPS} and (bool(self.queue) or self.start != "on-demand")

    def hold(self) -> Hold:
        """As the room sees it."""
        assert self.standing is not None
        return Hold(
            self.name, self.name, dict(self.takes), self.standing, self.keeps, always=self.start == "always",
            priority=self.priority, since=self.since, idle_since=self.idle_since, to=self.to,
            start_seconds=self.start_seconds, wake_seconds=self.wake_seconds,
        )  # fmt: skip

    def ask(self, devices: Iterable[str]) -> Ask:
        """As the room sees it."""
        since = self.queue[0].came if self.queue else self.asks_since
        return Ask(
            self.name, self.name, dict.fromkeys(devices, self.needs), self.count, self.only,
            always=self.start == "always", priority=self.priority, since=since,
            pressing=bool(self.queue) or self.start == "always", place=self.place, short=self.short,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """What a load got of a policy. Waits in seconds, from a request's arrival until an engine takes it."""

    served: int
    mean_wait: float
    p95_wait: float
    worst_wait: float  # of those who still wait, too
    never: int  # still wait at the end
    cut: int  # by yield_timeout
    swaps: int  # starts and wakes
    serving: float  # part of the time in which somebody wanted something
    idle_loss: float  # seconds in which somebody waited, and all devices that would do lay idle


class Machine:
    """Devices and engines under the room's rules."""

    def __init__(self, devices: Mapping[str, int], engines: Iterable[Engine], rules: Rules) -> None:
        self.devices = {name: Device(size, size) for name, size in devices.items()}
        self.engines = {engine.name: engine for engine in engines}
        self.rules = rules
        self.now = 0.0
        self.waits: dict[str, list[float]] = {name: [] for name in self.engines}
        self.stuck: set[str] = set()
        self.on_admit: Callable[[Engine], None] = lambda _: None
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._served = self._swaps = self._cut = 0
        self._serving = self._wanted = self._idle = 0.0
        self._looks_at = math.inf

    # What happens

    def at(self, time: float, do: Callable[[], object]) -> None:
        """Do something then."""
        heapq.heappush(self._timers, (time, next(self._numbers), do))

    def arrive(self, name: str, seconds: float, done: Callable[[], None] | None = None) -> None:
        """A request comes."""
        self.engines[name].queue.append(Request(self.now, seconds, done))

    def crash(self, engine: Engine) -> None:
        """It is gone, and with it what was in flight."""
        for request in list(engine.in_flight):
            self._end(engine, request, cut=True)
        engine.to = None
        self._has_gone(engine)

    def run(self, until: float) -> "Machine":
        """Let time pass."""
        self._look()
        while self._timers and self._timers[0][0] <= until:
            time, _, do = heapq.heappop(self._timers)
            self._pass(time)
            do()
            while self._timers and self._timers[0][0] == time:
                heapq.heappop(self._timers)[2]()
            self._look()
        self._pass(max(until, self.now))
        return self

    def result(self) -> Result:
        """What it came to."""
        waits = sorted(itertools.chain.from_iterable(self.waits.values())) or [0.0]
        pending = [self.now - one.came for engine in self.engines.values() for one in engine.queue]
        return Result(
            self._served, statistics.mean(waits), waits[int(len(waits) * 0.95)], max([*waits, *pending]), len(pending),
            self._cut, self._swaps, self._serving / max(self._wanted, 1e-9), self._idle,
        )  # fmt: skip

    def _pass(self, time: float) -> None:
        seconds, self.now = time - self.now, time
        engines = self.engines.values()
        serving = any(engine.in_flight for engine in engines)
        self._serving += seconds * serving
        self._wanted += seconds * (serving or any(engine.queue for engine in engines))
        self._idle += seconds * any(map(self._waits_in_vain, engines))

    def _waits_in_vain(self, engine: Engine) -> bool:
        """Whether all devices that would do have nothing awake, and are not promised to another one."""
        if not engine.queue or engine.standing not in {None, Standing.SLEEPS} or engine.name in self.stuck:
            return False
        others = [one for one in self.engines.values() if one is not engine]
        taken = {name for one in others if one.standing not in {None, Standing.SLEEPS} for name in one.takes}
        return not {*(engine.takes or engine.only or self.devices)} & (
            taken | {name for one in others for name in one.place}
        )

    # What follows

    def _look(self) -> None:
        for engine in self.engines.values():
            self._serve(engine)
        holds = [engine.hold() for engine in self.engines.values() if engine.standing is not None]
        asks = [engine.ask(self.devices) for engine in self.engines.values() if engine.asks]
        moves = checks.settled(self.now, self._measured(), holds, asks, self.rules) if asks else Moves()
        self.stuck = {*moves.stuck}
        assert not moves.refuse, "nothing is short here"
        for engine in self.engines.values():
            engine.place, engine.short = moves.place.get(engine.name, ()), moves.short.get(engine.name)
        for name, where in moves.admit.items():
            self._admit(self.engines[name], where)
        for name, depth in moves.go.items():
            self._yield(self.engines[name], depth)
        for engine in self.engines.values():
            self._go_when_drained(engine)
        if self.now < moves.look_again < math.inf and moves.look_again != self._looks_at:
            self._looks_at = moves.look_again
            self.at(moves.look_again, int)

    def _measured(self) -> dict[str, Device]:
        used = dict.fromkeys(self.devices, 0)
        for engine in self.engines.values():
            for name, size in engine.takes.items():
                used[name] += size
        return {
            name: Device(device.total, device.room, free=device.room - used[name])
            for name, device in self.devices.items()
        }

    def _serve(self, engine: Engine) -> None:
        while engine.standing is Standing.SERVES and engine.queue:
            request = engine.queue.pop(0)
            self.waits[engine.name].append(self.now - request.came)
            engine.in_flight.append(request)
            engine.idle_since = None
            self.at(self.now + request.seconds, partial(self._end, engine, request))

    def _end(self, engine: Engine, request: Request, *, cut: bool = False) -> None:
        if request not in engine.in_flight:
            return
        engine.in_flight.remove(request)
        self._served += not cut
        self._cut += cut
        if not engine.in_flight:
            engine.idle_since = self.now
        if request.done:
            request.done()

    def _admit(self, engine: Engine, where: tuple[str, ...]) -> None:
        self.on_admit(engine)
        self._swaps += 1
        seconds = engine.wake_seconds if engine.standing is Standing.SLEEPS else engine.start_seconds
        engine.standing, engine.takes = Standing.COMES, dict.fromkeys(where, engine.needs)
        self.at(self.now + seconds, partial(self._has_come, engine))

    def _has_come(self, engine: Engine) -> None:
        engine.standing, engine.since, engine.idle_since = Standing.SERVES, self.now, self.now

    def _yield(self, engine: Engine, depth: Depth) -> None:
        engine.standing, engine.to = Standing.YIELDS, depth
        if engine.yield_timeout and engine.in_flight:
            self.at(self.now + engine.yield_timeout, partial(self._cut_off, list(engine.in_flight), engine))

    def _cut_off(self, requests: list[Request], engine: Engine) -> None:
        for request in requests:
            self._end(engine, request, cut=True)

    def _go_when_drained(self, engine: Engine) -> None:
        """Memory is not set free beside one that measures it."""
        if engine.standing is not Standing.YIELDS or engine.in_flight:
            return
        others = (one for one in self.engines.values() if one.standing is Standing.COMES)
        if any(one.takes.keys() & engine.takes.keys() for one in others):
            return
        engine.standing = Standing.GOES
        seconds = engine.sleep_seconds if engine.to is Depth.SLEEP else engine.stop_seconds
        self.at(self.now + seconds, partial(self._has_gone, engine))

    def _has_gone(self, engine: Engine) -> None:
        asleep = engine.to is Depth.SLEEP
        engine.standing, engine.to, engine.asks_since = Standing.SLEEPS if asleep else None, None, self.now
        engine.takes = dict.fromkeys(engine.takes, engine.keeps or 0) if asleep else {}
