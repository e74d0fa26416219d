"""Which models have no room beside those that always run, however these are placed."""

from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.domain.test_fit import demand, gpus
from vllm_proxy.domain import fit, leftover, packing
from vllm_proxy.domain.fit import Demand, misfits
from vllm_proxy.domain.ledger import Ask, Device, Kind, Ledger, Where
from vllm_proxy.domain.leftover import crowded_out
from vllm_proxy.domain.packing import Part

GIB = 2**30


def told(devices: dict[str, Device], *demands: Demand, measured: dict[str, int] | None = None) -> dict[str, str]:
    """The sentences, by model and key."""
    known = measured or {}
    found = crowded_out(demands, devices, known, misfits(demands, devices, known))
    return {f"{one.model}.{one.key}": one.message for one in found}


CHAT, BIG = demand("chat", 40), demand("big", 60, "on-demand")


def test_a_model_that_has_no_room_beside_what_always_runs_is_told() -> None:
    """With what has it; a warm one as one on demand, and whatever key its size is in."""
    why = "needs 60.6 GiB on a GPU and 38.9 can be had: chat (always) has 40.6 of 80.0"
    assert told(gpus(80), CHAT, BIG) == {"big.memory": f"cannot serve big: it {why}"}
    assert told(gpus(80), CHAT, demand("big", 60, "warm")).keys() == {"big.memory"}
    assert told(gpus(80), CHAT, demand("big", start="warm", gpu_memory_utilization=0.9)).keys() == {
        "big.gpu_memory_utilization"
    }


def test_devices_that_are_named_are_those_that_count() -> None:
    """Of the model, and of those that always run."""
    on_first = demand("chat", 40, devices=[0])
    assert told(gpus(80, 80), on_first, BIG) == {}
    assert told(gpus(80, 80), on_first, demand("big", 60, "warm", devices=[1])) == {}
    assert told(gpus(80, 80), on_first, demand("big", 60, "warm", devices=[0])).keys() == {"big.memory"}
    gang = demand("big", 60, "on-demand", tensor_parallel_size=2)
    assert "on each of 2 GPUs and 38.9 can be had of GPU 0: chat" in told(gpus(80, 80), on_first, gang)["big.memory"]


def test_what_fits_in_one_way_is_not_told() -> None:
    """Where the others are placed is decided later; and those that come and go are never in each other's way."""
    assert told(gpus(80, 80), demand("a", 20), demand("b", 20), BIG) == {}
    assert told(gpus(80, 80), demand("a", 20, replicas=2), BIG) == {}
    assert told(gpus(80, 80), demand("a", 20, replicas=5), BIG).keys() == {"big.memory"}
    assert told(gpus(80), demand("a", 60, "warm"), BIG) == {}
    assert told({}, CHAT, BIG) == {}


def test_what_was_learned_of_an_engine_counts() -> None:
    """One without a KV cache keeps less than it had to find."""
    assert told(gpus(80), demand("chat", 70), BIG).keys() == {"big.memory"}
    assert told(gpus(80), demand("chat", 70), BIG, measured={"chat": 2**30}) == {}


def test_nothing_more_is_said_of_what_can_never_run() -> None:
    """Neither of a model that is too large alone, nor where what always runs does not fit together."""
    assert told(gpus(80), CHAT, demand("big", 90, "on-demand")) == {}
    assert told(gpus(80), CHAT, demand("code", 50), BIG) == {}


def test_in_doubt_a_model_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches that take too long, too many of them, engines that may be elsewhere."""
    shared = demand("big", 60, "on-demand", env={"CUDA_VISIBLE_DEVICES": {"file": "/run/devices"}})
    assert told(gpus(80), CHAT, shared) == {}
    other = demand("other", 61, "warm")
    assert told(gpus(80), CHAT, BIG, other).keys() == {"big.memory", "other.memory"}
    with monkeypatch.context() as patch:
        patch.setattr(leftover, "_MOST_SEARCHES", 1)
        assert told(gpus(80), CHAT, BIG, other, demand("same", 60, "warm")).keys() == {"big.memory", "same.memory"}
    with monkeypatch.context() as patch:
        patch.setattr(packing, "MOST_STEPS", 0)
        assert told(gpus(80), CHAT, BIG) == {}


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.lists(st.integers(20, 40), min_size=1, max_size=3),
    st.integers(1, 40),
)
def test_the_room_never_has_a_place_for_what_is_told(sizes: list[int], rooms: list[int], size: int) -> None:
    """And has one for the others, in one of the ways in which those that always run can be placed."""
    devices = {str(index): Device(room * GIB, room * GIB, kind=Kind.MEMORY) for index, room in enumerate(rooms)}
    resident = [Demand(f"m{index}", (), 1, each * GIB, always=True) for index, each in enumerate(sizes)]
    one = Demand("one", (), 1, size * GIB)
    assume(not misfits([*resident, one], devices))
    ask = Ask("one/0", "one", fit.needs(one, devices))
    parts = fit.parts_of(resident, devices, {})
    where = packing.placed(parts, devices)
    assert where in [[*ways] for ways in possible(parts, devices)]
    never = [
        Ledger(devices, leftover._holds(resident, parts, ways)).never_fits(ask) for ways in possible(parts, devices)
    ]
    assert bool(told(devices, *resident, one)) == all(never)


def possible(parts: list[Part], devices: dict[str, Device]) -> list[tuple[Where, ...]]:
    """Each way to put each of them on one device, so that none has too much."""
    ways = product([(name,) for name in devices], repeat=len(parts))
    return [
        way
        for way in ways
        if all(
            sum(part.needs[name] for part, (there,) in zip(parts, way, strict=True) if there == name) <= device.room
            for name, device in devices.items()
        )
    ]
