"""Random faults under load, for a short while: `python -m tests.chaos` is the long version."""

from pathlib import Path

import pytest

from tests.chaos.run import chaos


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
async def test_under_random_faults_every_request_has_one_honest_outcome(
    tmp_path: Path, port_start: int, seed: int
) -> None:
    """Kills, hangs, stops by hand and deaths of the daemon: no lie, no hang, no process without an owner at rest."""
    found = await chaos(tmp_path, port_start, seconds=12, clients=12, seed=seed)
    assert sum(found["faults"].values()) > 5
    assert found["outcomes"]["whole"] > 50
