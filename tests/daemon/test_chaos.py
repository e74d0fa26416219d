"""Random faults under load, for a short while: `python -m tests.chaos` is the long version."""

from collections import Counter
from pathlib import Path

import pytest

from tests.bench.build import compiler
from tests.chaos.run import chaos

pytestmark = pytest.mark.slow

FAULTS, ANSWERS = 10, 100  # however long they take on a machine that is busy


def enough(faults: Counter[str], outcomes: Counter[str]) -> bool:
    """Whether so much has happened."""
    return faults.total() >= FAULTS and outcomes["whole"] >= ANSWERS


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
async def test_under_random_faults_every_request_has_one_honest_outcome(
    tmp_path: Path, port_start: int, seed: int
) -> None:
    """Kills, hangs, stops by hand and deaths of the daemon: no lie, no hang, no process without an owner at rest."""
    found = await chaos(tmp_path, port_start, enough, clients=12, seed=seed)
    assert len(found["faults"]) > 3, "faults of several kinds"
    assert enough(found["faults"], found["outcomes"])


@pytest.mark.timeout(600)
@pytest.mark.skipif(not compiler(), reason="no C compiler")
async def test_under_random_faults_around_the_daemon_nothing_is_left_over(tmp_path: Path, port_start: int) -> None:
    """Outputs that fail, descriptors that are taken, clocks that jump: honest answers, and at rest all is well.

    Running is what is asked for, no process and no folder is left, memory is back, no turn of the loop was too long.
    """
    found = await chaos(tmp_path, port_start, enough, clients=8, seed=3, around=True)
    assert len(found["faults"]) > 3, "faults of several kinds"
