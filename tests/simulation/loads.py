"""Loads for a machine: clients in closed loops, random arrivals, recorded ones. Seeds are fixed, so runs are alike."""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Protocol

from tests.simulation.machine import GIB, Engine, Machine
from vllm_proxy.domain.eviction import Rules

HOUR = 3600.0

type Draw = Callable[[random.Random], float]


class Load(Protocol):
    """Makes a machine under these rules and runs it to its end."""

    def __call__(self, rules: Rules, *, sleep: bool) -> Machine:
        """`sleep`: models that give way sleep, and keep 1 to 2 GiB."""


def uniform(low: float, high: float) -> Draw:
    """Seconds between these."""
    return lambda rng: rng.uniform(low, high)


def client(machine: Machine, name: str, seconds: Draw, thought: Draw, rng: random.Random, start: float = 0.0) -> None:
    """One that asks, waits for the answer, thinks, and asks again."""

    def ask() -> None:
        machine.arrive(name, seconds(rng), lambda: machine.at(machine.now + thought(rng), ask))

    machine.at(start, ask)


def poisson(machine: Machine, name: str, rate: float, seconds: Draw, rng: random.Random, until: float = HOUR) -> None:
    """Requests that know nothing of each other; `rate` a second."""
    time = rng.expovariate(rate)
    while time <= until:
        machine.at(time, partial(machine.arrive, name, seconds(rng)))
        time += rng.expovariate(rate)


def _pair(rules: Rules, *, sleep: bool) -> Machine:
    engines = [Engine(name, 70 * GIB, keeps=2 * GIB if sleep else None) for name in "ab"]
    return Machine({"0": 79 * GIB}, engines, rules)


def busy_beside_rare(rules: Rules, *, sleep: bool) -> Machine:
    """8 clients who never leave a alone, and a request to b every two minutes."""
    machine, rng = _pair(rules, sleep=sleep), random.Random(1)
    for _ in range(8):
        client(machine, "a", uniform(2, 20), uniform(0, 0.2), rng)
    poisson(machine, "b", 1 / 120, uniform(2, 10), rng)
    return machine.run(HOUR)


def two_agents(rules: Rules, *, sleep: bool) -> Machine:
    """Two agents on one model each, who think for 0.2 to 1.5 s between their requests."""
    machine, rng = _pair(rules, sleep=sleep), random.Random(2)
    client(machine, "a", uniform(1, 5), uniform(0.2, 1.5), rng)
    client(machine, "b", uniform(1, 5), uniform(0.2, 1.5), rng, start=5)
    return machine.run(HOUR)


def six_models(rules: Rules, *, sleep: bool) -> Machine:
    """Six models of 10 to 70 GiB, some asked for every 5 s, some every two minutes."""
    sizes = ((40, 2), (35, 2), (70, 2), (20, 1), (15, 1), (10, 1))
    engines = [
        Engine(f"m{number}", size * GIB, keeps=kept * GIB if sleep else None)
        for number, (size, kept) in enumerate(sizes)
    ]
    machine, rng = Machine({"0": 79 * GIB}, engines, rules), random.Random(3)
    for number, every in enumerate((5, 20, 60, 30, 60, 120)):
        poisson(machine, f"m{number}", 1 / every, lambda rng: rng.lognormvariate(1.5, 0.8), rng)
    return machine.run(HOUR)


def one_agent(rules: Rules, *, sleep: bool) -> Machine:
    """An agent who plans with a and writes with b, a few requests each, while somebody chats with b at times."""
    machine, rng = _pair(rules, sleep=sleep), random.Random(4)
    steps = itertools.cycle("aabbbbb")

    def ask() -> None:
        machine.arrive(next(steps), rng.uniform(1, 8), lambda: machine.at(machine.now + rng.uniform(0.2, 1.5), ask))

    machine.at(0.0, ask)
    poisson(machine, "b", 1 / 90, uniform(2, 10), rng)
    return machine.run(HOUR)


# What was recorded


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it came: second, and how long it was in flight."""

    at: float
    model: str
    seconds: float


def read_access_log(lines: Iterable[str]) -> list[Arrival]:
    """The requests of the daemon's log in JSON that an engine answered, the first one at second 0."""
    found = []
    for line in lines:
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("event") == "request" and entry.get("model") and entry.get("instance"):
            ended = datetime.fromisoformat(entry["timestamp"]).timestamp()
            waited = entry["first_byte"] or 0.0
            found.append(Arrival(ended - entry["seconds"], entry["model"], max(entry["seconds"] - waited, 0.1)))
    first = min((one.at for one in found), default=0.0)
    return sorted((replace(one, at=one.at - first) for one in found), key=lambda one: one.at)


def recorded(gib: int, engines: Sequence[Engine], arrivals: Sequence[Arrival]) -> Load:
    """The same requests at the same times, whatever came of those before; until an hour after the last one."""

    def load(rules: Rules, *, sleep: bool) -> Machine:
        own = [replace(engine, keeps=2 * GIB if sleep else None, queue=[], in_flight=[]) for engine in engines]
        machine = Machine({"0": gib * GIB}, own, rules)
        for one in arrivals:
            machine.at(one.at, partial(machine.arrive, one.model, one.seconds))
        return machine.run(max((one.at for one in arrivals), default=0.0) + HOUR)

    return load


LOADS: dict[str, Load] = {
    "busy beside rare": busy_beside_rare,
    "two agents": two_agents,
    "one agent, two models": one_agent,
    "six models": six_models,
}
POLICIES = {
    "swap when idle": Rules(max_wait=float("inf"), min_residency=0, patience=0, worth=0),
    "first come, first served": Rules(max_wait=0, min_residency=0, patience=0, worth=0),
    "room": Rules(),
}
