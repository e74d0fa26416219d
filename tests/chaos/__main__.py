"""`python -m tests.chaos`: several minutes of random faults under load. The short version is a test in tests/daemon."""

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path

from tests.chaos.run import chaos


def main() -> None:
    """Run it and say what happened; a lie, a hang or a stray process is a traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--port-start", type=int, default=20_000, help="the first of 200 ports for engines")
    parser.add_argument("--around", action="store_true", help="trouble with what is around the daemon, too")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    end: float = time.monotonic() + options.seconds

    def over(_faults: object, _outcomes: object) -> bool:
        return time.monotonic() > end

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        found = asyncio.run(
            chaos(Path(folder), options.port_start, over, options.clients, options.seed, around=options.around)
        )
    for title, counts in found.items():
        print(title)
        for name, count in counts.most_common():
            print(f"  {count:7} {name}")


if __name__ == "__main__":
    main()
