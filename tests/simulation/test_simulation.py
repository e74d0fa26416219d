"""What the room serves where models do not fit together, beside the rules of other programs; in virtual time."""

import json
import time
from pathlib import Path

import pytest

from tests.simulation import __main__ as command
from tests.simulation import loads
from tests.simulation.machine import GIB, Engine, Result
from tests.simulation.scenarios import bound
from vllm_proxy.domain.eviction import Rules


def results(load: loads.Load, *, sleep: bool = False) -> dict[str, Result]:
    """What each policy comes to."""
    return {name: load(rules, sleep=sleep).result() for name, rules in loads.POLICIES.items()}


def test_two_agents_on_two_models_get_five_times_the_requests_of_swapping_when_idle() -> None:
    """They think for a moment between requests, and whoever swaps then does little else."""
    found = results(loads.two_agents)
    assert found["room"].served >= 5 * found["swap when idle"].served
    assert found["room"].idle_loss == 0
    asleep = results(loads.two_agents, sleep=True)
    assert asleep["room"].served >= 1.3 * asleep["swap when idle"].served


def test_a_model_that_is_never_left_alone_starves_nobody() -> None:
    """Where others wait until it is idle, they wait for ever."""
    found = results(loads.busy_beside_rare)
    assert found["swap when idle"].never > 20
    machine = loads.busy_beside_rare(Rules(), sleep=False)
    assert machine.result().worst_wait <= bound(machine, longest_request=20)
    assert machine.result().never == 0


def test_no_load_makes_anybody_wait_beyond_the_bound() -> None:
    """Asleep or cold; and no device lies idle while somebody waits for it."""
    for load in loads.LOADS.values():
        for sleep in (False, True):
            machine = load(Rules(), sleep=sleep)
            assert machine.result().worst_wait <= bound(machine, longest_request=60)
            assert machine.result().idle_loss == 0


def log_line(at: float, model: str, seconds: float, **more: object) -> str:
    """A line of the access log."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_800_000_000 + at))
    entry = {"timestamp": stamp, "event": "request", "model": model, "instance": f"{model}/0", "seconds": seconds}
    return json.dumps({**entry, "first_byte": 0.5, **more})


def test_the_access_log_of_the_daemon_can_be_played() -> None:
    """A request came before its line was written; what no engine answered is left out, and what is no request."""
    lines = [log_line(12, "b", 4), log_line(10, "a", 3), log_line(11, "a", 1, instance=None), "no JSON", "{}"]
    arrivals = loads.read_access_log(lines)
    assert arrivals == [loads.Arrival(0, "a", 2.5), loads.Arrival(1, "b", 3.5)]
    engines = [Engine("a", 50 * GIB), Engine("b", 50 * GIB)]
    machine = loads.recorded(79, engines, arrivals)(Rules(), sleep=False)
    assert (machine.result().served, machine.waits["a"], machine.now) == (2, [40.0], 3601)


def test_the_table_has_a_row_for_each_load_and_policy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With the columns that people compare by; the same each time."""
    log = tmp_path / "access.log"
    log.write_text("\n".join(log_line(at, "ab"[at % 2], 2) for at in range(0, 40, 5)))
    for _ in range(2):
        assert command.main(["--recorded", str(log), "--model", "a=60"]) == 0
    first, second = capsys.readouterr().out.split("| load")[1:]
    assert first == second
    assert [line.split("|")[1:4] for line in first.splitlines()[2:4]] == [
        [" access.log; cold  ", " swap when idle           ", " 8      "],
        [" access.log; cold  ", " first come, first served ", " 8      "],
    ]
    assert len(first.splitlines()) == 2 + 2 * len(loads.POLICIES)
