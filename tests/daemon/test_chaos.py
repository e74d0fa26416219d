"""Random faults under load, for a short while: `python -m tests.chaos` is the long version."""

from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.run import chaos

FAULTS, ANSWERS = 10, 100  # however long they take on a machine that is busy


def enough(faults: Counter[str], outcomes: Counter[str]) -> bool:
    """Whether so much has happened."""
    return faults.total() >= FAULTS and outcomes["whole"] >= ANSWERS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
async def test_under_random_faults_every_request_has_one_honest_outcome(
    tmp_path: Path, port_start: int, seed: int
) -> None:
    """Kills, hangs, stops by hand and deaths of the daemon: no lie, no hang, no process without an owner at rest."""
    found = await chaos(tmp_path, port_start, enough, clients=12, seed=seed)
    assert len(found["faults"]) > 3, "faults of several kinds"
    assert enough(found["faults"], found["outcomes"])
