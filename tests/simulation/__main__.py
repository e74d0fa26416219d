"""`python -m tests.simulation`: what a machine with too many models serves, by our rules and by those of others.

Time is virtual and seeds are fixed, so the table is the same everywhere. `--recorded FILE` plays the arrivals of an
access log of the daemon instead, as `--log-format json` writes it. `--replicas` shows what choosing between the
replicas of one model is worth.
"""

import argparse
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.simulation import loads, replicas
from tests.simulation.loads import Load
from tests.simulation.machine import GIB, Engine, Result
from vllm_proxy.domain.eviction import Rules
from vllm_proxy.domain.ledger import Ask, Device, Hold, Standing
from vllm_proxy.domain.room import decide

HEAD = ("load", "policy", "served", "mean wait", "p95", "worst wait", "never served", "swaps", "serving", "idle loss")


def rows(chosen: Mapping[str, Load], depths: Sequence[bool] = (False, True)) -> list[tuple[str, ...]]:
    """One for each load and policy, first without sleep, then with it."""
    return [
        (f"{name}; {'sleep' if sleep else 'cold'}", policy, *_cells(load(rules, sleep=sleep).result()))
        for sleep in depths
        for name, load in chosen.items()
        for policy, rules in loads.POLICIES.items()
    ]


def _cells(result: Result) -> tuple[str, ...]:
    return (
        str(result.served),
        f"{result.mean_wait:.1f} s",
        f"{result.p95_wait:.0f} s",
        f"{result.worst_wait:.0f} s",
        str(result.never),
        str(result.swaps),
        f"{result.serving:.0%}",
        f"{result.idle_loss:.1f} s",
    )


def table(found: Sequence[Sequence[str]], head: Sequence[str] = HEAD) -> str:
    """As Markdown, columns aligned."""
    lines = [head, *found]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def decisions(count: int = 200) -> str:
    """Milliseconds of processor time that a decision takes: 8 devices, 24 instances, 10 asks, states at random."""
    rng, taken = random.Random(5), []
    devices = {str(index): Device(80 * GIB, 80 * GIB) for index in range(8)}
    for _ in range(count):
        holds = [
            Hold(f"h{index}", f"h{index}", {str(index % 8): rng.randint(2, 26) * GIB},
                 rng.choice([Standing.SERVES, Standing.SERVES, Standing.SLEEPS]), rng.choice([None, GIB]),
                 since=rng.uniform(0, 100), idle_since=rng.choice([None, rng.uniform(0, 100)]))
            for index in range(24)
        ]  # fmt: skip
        asks = [
            Ask(f"a{index}", f"a{index}", dict.fromkeys(devices, rng.randint(10, 78) * GIB), rng.choice([1, 2, 4]),
                since=rng.uniform(0, 100), pressing=rng.random() < 0.8)
            for index in range(10)
        ]  # fmt: skip
        begun = time.process_time()
        decide(100.0, devices, holds, asks, Rules())
        taken.append((time.process_time() - begun) * 1000)
    taken.sort()
    return (
        f"a decision: median {taken[count // 2]:.1f} ms, p95 {taken[count * 95 // 100]:.1f} ms, most {taken[-1]:.1f} ms"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recorded", type=Path, metavar="FILE", help="an access log in JSON, to be played instead")
    parser.add_argument("--device", type=int, default=79, metavar="GIB", help="memory of the one GPU; default 79")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=GIB", help="its memory; default 40")
    parser.add_argument("--decisions", action="store_true", help="how long a decision takes, instead")
    parser.add_argument("--replicas", action="store_true", help="which of several replicas gets a request, instead")
    flags = parser.parse_args(arguments)
    if flags.replicas:
        print(table(replicas.rows(), replicas.HEAD))
        return 0
    if flags.decisions:
        print(decisions())
        return 0
    chosen = dict(loads.LOADS)
    if flags.recorded is not None:
        sizes = {name: int(size) for name, _, size in (text.rpartition("=") for text in flags.model)}
        arrivals = loads.read_access_log(flags.recorded.read_text(encoding="utf-8").splitlines())
        engines = [Engine(name, sizes.get(name, 40) * GIB) for name in dict.fromkeys(one.model for one in arrivals)]
        chosen = {flags.recorded.name: loads.recorded(flags.device, engines, arrivals)}
    print(table(rows(chosen)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
