"""Random machines under random loads, one for each seed, and the bound on how long any request may wait there."""

import math
import random
from dataclasses import dataclass

from tests.simulation.loads import client, poisson, uniform
from tests.simulation.machine import GIB, Engine, Machine
from vllm_proxy.domain.eviction import Rules

MINUTES = 20
_LONGEST_REQUEST = 15.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """A machine under load. `bound`: seconds that no request may wait longer."""

    machine: Machine
    bound: float


def scenario(seed: int) -> Scenario:
    """1 to 8 devices, gangs, fixed devices, sleepers with residues, residents, priorities."""
    rng = random.Random(seed)
    count = rng.choice([1, 1, 2, 2, 3, 4, 8])
    mixed = rng.random() < 0.3
    devices = {str(index): (rng.choice([24, 48, 80]) if mixed else 80) * GIB for index in range(count)}
    engines = [_engine(rng, f"m{index}", devices, first=index == 0) for index in range(rng.randint(2, 7))]
    rules = Rules(rng.choice([5.0, 30.0]), rng.choice([0.0, 10.0]))
    machine = Machine(devices, engines, rules)
    for engine in engines:
        if rng.random() < 0.5:
            for _ in range(rng.randint(1, 4)):
                client(machine, engine.name, uniform(0.5, _LONGEST_REQUEST), uniform(0, 3), rng, rng.uniform(0, 60))
        else:
            rate = 1 / rng.uniform(5, 200)
            poisson(machine, engine.name, rate, uniform(0.5, _LONGEST_REQUEST), rng, MINUTES * 60)
    return Scenario(machine, bound(machine, _LONGEST_REQUEST))


def _engine(rng: random.Random, name: str, devices: dict[str, int], *, first: bool) -> Engine:
    """The first may be a resident, small enough that every other one fits beside it."""
    gang = min(rng.choice([1, 1, 1, 2, 4]), _largest_group(devices))
    smallest = min(devices.values()) // GIB
    needs = rng.randint(4, smallest - 12) * GIB
    asleep = rng.choice([None, 1, 2])
    only = tuple(rng.sample(sorted(devices), gang)) if rng.random() < 0.3 else ()
    start = "always" if first and rng.random() < 0.4 else rng.choice(["on-demand", "on-demand", "on-demand", "warm"])
    return Engine(
        name,
        rng.randint(2, 10) * GIB if start == "always" else needs,
        gang,
        only,
        keeps=asleep and asleep * GIB,
        start_seconds=rng.uniform(5, 60),
        wake_seconds=rng.uniform(0.2, 5),
        sleep_seconds=rng.uniform(0.1, 8),
        stop_seconds=rng.uniform(0.1, 6),
        start=start,  # type: ignore[arg-type]
        priority=rng.choice([0, 0, 0, 1, 5]),
        yield_timeout=rng.choice([2.0, 300.0]),
    )


def _largest_group(devices: dict[str, int]) -> int:
    sizes = list(devices.values())
    return max(sizes.count(size) for size in sizes)


def bound(machine: Machine, longest_request: float = math.inf) -> float:
    """max_wait + (k + 1) x (max(min_residency, own return) + yield_timeout + going + coming), k being all others."""
    engines, rules = machine.engines.values(), machine.rules
    returns = max(rules.min_residency, *(one.start_seconds for one in engines))
    yields = max(min(one.yield_timeout, longest_request) for one in engines)
    going = max(one.sleep_seconds + one.stop_seconds for one in engines)
    coming = max(one.start_seconds for one in engines)
    return rules.max_wait + len(engines) * (returns + yields + going + coming)
