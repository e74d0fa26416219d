"""Models that do not fit together take turns on devices whose memory is accounted for, and no request fails for it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import mixed_load
from tests.fakes.ledger import GIB, Devices
from tests.harness import Daemon, daemon, fake_engines

TOTAL = 80 * GIB
# Short, so that busy models give way as well.
SOON = 'reserve = "512MiB"\nmax_wait = "1s"\nmin_residency = "300ms"\n'


def configuration(port_start: int, devices: Devices, models: Mapping[str, str]) -> str:
    """These models, with more keys each, on these devices."""
    args = f'fake_ledger = "{devices.file}", fake_release_delay = 0.02'
    tables = (
        f'[models.{name}]\nmodel = "x"\nstart = "on-demand"\nargs = {{ {args} }}\n{keys}\n'
        for name, keys in models.items()
    )
    return fake_engines(port_start) + devices.config + SOON + "".join(tables)


TWO = {"a": "gpu_memory_utilization = 0.55", "b": "gpu_memory_utilization = 0.55"}
# One that may stand beside either of the others, which cannot stand together.
THREE = {"a": 'memory = "50GiB"', "b": 'memory = "30GiB"', "c": 'memory = "45GiB"'}
# On two devices: one needs both.
GANG = {
    "a": 'memory = "60GiB"',
    "b": 'memory = "60GiB"',
    "wide": 'memory = "40GiB"\ntensor_parallel_size = 2',
}


MANY = 10_000  # requests: over minutes, what a busy machine costs does not count


async def swaps_without_a_failure(
    folder: Path, port_start: int, devices: Devices, models: Mapping[str, str], requests: int
) -> None:
    """Ask for all of these models at once, and judge every answer, and what engines did to one another."""
    plans = mixed_load.wandering(list(models), clients=8, requests=requests, seed=1, stays=0.95)
    async with daemon(configuration(port_start, devices, models), folder) as running:
        assert await mixed_load.run(running.url, plans) == []
        assert devices.events() == []
        assert max(devices.most().values()) <= TOTAL
        assert sum(devices.starts().values()) > len(models)  # or nobody had to give way
        if requests >= MANY:
            await nothing_was_idle(running)


async def nothing_was_idle(running: Daemon) -> None:
    """The daemon itself lost at most a hundredth of the time in which somebody wanted a device."""
    found = {name: value for name, value in (await running.metrics()).items() if "wanted_seconds_total" in name}
    assert sum(value for name, value in found.items() if 'doing="idle"' in name) <= 0.01 * sum(found.values())


@pytest.mark.parametrize("models", [TWO, THREE, GANG], ids=["two", "three", "gang"])
async def test_no_request_fails_through_a_swap(tmp_path: Path, port_start: int, models: Mapping[str, str]) -> None:
    """Streams and whole answers, of clients that wander from model to model; no engine disturbs another's start."""
    with Devices(tmp_path / "devices.toml", {"0": TOTAL, "1": TOTAL} if models is GANG else {"0": TOTAL}) as devices:
        await swaps_without_a_failure(tmp_path, port_start, devices, models, 200)


@pytest.mark.thorough
@pytest.mark.timeout(900)
async def test_no_request_of_ten_thousand_fails_through_swaps(tmp_path: Path, port_start: int) -> None:
    """As above, for minutes."""
    with Devices(tmp_path / "devices.toml", {"0": TOTAL}) as devices:
        await swaps_without_a_failure(tmp_path, port_start, devices, THREE, MANY)
