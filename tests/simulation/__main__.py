"""`python -m tests.simulation`: what a machine with too many models serves, by our rules and by those of others.

Time is virtual and seeds are fixed, so the table is the same everywhere. `--recorded FILE` plays the arrivals of an
access log of the daemon instead, as `--log-format json` writes it.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.simulation import loads
from tests.simulation.loads import Load
from tests.simulation.machine import GIB, Engine, Result

HEAD = ("load", "policy", "served", "mean wait", "p95", "worst wait", "never served", "swaps", "serving", "idle loss")


def rows(chosen: Mapping[str, Load]) -> list[tuple[str, ...]]:
    """One for each load and policy, first without sleep, then with it."""
    return [
        (f"{name}; {'sleep' if sleep else 'cold'}", policy, *_cells(load(rules, sleep=sleep).result()))
        for sleep in (False, True)
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


def table(found: Sequence[Sequence[str]]) -> str:
    """As Markdown, columns aligned."""
    lines = [HEAD, *found]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recorded", type=Path, metavar="FILE", help="an access log in JSON, to be played instead")
    parser.add_argument("--device", type=int, default=79, metavar="GIB", help="memory of the one GPU; default 79")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=GIB", help="its memory; default 40")
    flags = parser.parse_args(arguments)
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
