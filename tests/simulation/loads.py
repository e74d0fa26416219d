"""Loads for a machine: clients in closed loops, random arrivals, recorded ones. Seeds are fixed, so runs are alike."""

import random
from collections.abc import Callable, Iterable

from tests.simulation.machine import GIB, Engine, Machine
from vllm_proxy.domain.eviction import Rules

HOUR = 3600.0

type Draw = Callable[[random.Random], float]


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
        arrival = (name, seconds(rng))
        machine.at(time, lambda arrival=arrival: machine.arrive(*arrival))  # type: ignore[misc]
        time += rng.expovariate(rate)


def recorded(machine: Machine, arrivals: Iterable[tuple[float, str, float]]) -> None:
    """Requests as they came: second, model, seconds in flight."""
    for time, name, seconds in arrivals:
        machine.at(time, lambda name=name, seconds=seconds: machine.arrive(name, seconds))  # type: ignore[misc]


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


LOADS = {"busy beside rare": busy_beside_rare, "two agents": two_agents, "six models": six_models}
POLICIES = {
    "swap when idle": Rules(max_wait=float("inf"), min_residency=0, patience=0, worth=0),
    "first come, first served": Rules(max_wait=0, min_residency=0, patience=0, worth=0),
    "room": Rules(),
}
