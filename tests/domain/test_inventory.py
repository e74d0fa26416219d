"""Devices as values: what they are called, which may be used, and how decisions count with them."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from vllm_proxy.domain.config import Devices, EngineSpec, ModelSpec, Policy
from vllm_proxy.domain.inventory import Foreign, Seen, ledger_devices, resolve, usable
from vllm_proxy.domain.ledger import Device, Kind
from vllm_proxy.domain.placement import Machine

GIB = 2**30


def gpu(index: int, uuid: str = "", total: int = 80 * GIB) -> Seen:
    """A GPU that nobody uses."""
    name = str(index)
    return Seen(
        name, uuid or name, index, "NVIDIA H100", Kind.GPU, unified=False, total=total, free=total, visible=name
    )


def named(*devices: Seen) -> dict[str, Seen]:
    """By name."""
    return {device.name: device for device in devices}


MIG = "MIG-41b3359c-e721-56e5-8009-12e5797ed514"
PART = Seen(MIG, MIG, None, "A100 MIG 1g.5gb", Kind.MIG, unified=False, total=5 * GIB, free=5 * GIB, visible=MIG)
CPU = Seen("cpu", "cpu", None, "NUMA node 0", Kind.MEMORY, unified=False, total=16 * GIB, free=8 * GIB)
MACHINE = named(gpu(0, "GPU-8932f937"), gpu(1, "GPU-8932aaaa"), gpu(2, "GPU-8932"), PART)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("0", "0"),
        ("9", None),
        ("GPU-8932f937", "0"),
        ("GPU-8932f", "0"),
        ("GPU-8932", "2"),  # it is one's whole name, though others begin so
        ("GPU-893", None),
        ("GPU-", None),
        ("GPU-0", None),
        ("MIG-41b3", MIG),
        (MIG, MIG),
        ("8932f937", None),
        ("", None),
        ("-1", None),
        ("00", None),
    ],
)
def test_a_device_is_named_as_cuda_names_it(name: str, found: str | None) -> None:
    """By its index, its UUID, or the beginning of one UUID alone; never by what could be another one's."""
    assert resolve(name, MACHINE) == found


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, {"0", "1", "2", MIG}),
        ("1", {"1"}),
        (" 1, GPU-8932f ", {"1", "0"}),
        ("1,-1,0", {"1"}),
        ("1,7,0", {"1"}),
        ("", set()),
        ("NoDevFiles", set()),
        (MIG, {MIG}),
    ],
)
def test_what_the_environment_hides_is_not_used(visible: str | None, found: set[str]) -> None:
    """As CUDA reads CUDA_VISIBLE_DEVICES: what stands behind a name of nothing is hidden too."""
    assert usable(visible, MACHINE) == found


def test_memory_of_the_machine_is_never_hidden() -> None:
    """CUDA_VISIBLE_DEVICES is about GPUs, and often is empty where there are none."""
    assert usable("", named(CPU)) == {"cpu"}


def devices(
    *seen: Seen,
    reserve: int = 0,
    limits: Mapping[str, int] | None = None,
    held: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, Device]:
    """In the ledger."""
    return ledger_devices(named(*seen), reserve=reserve, limits=limits or {}, held_by_ledger=held or {})


def test_engines_get_what_is_not_reserved() -> None:
    """Of each device; never less than nothing."""
    found = devices(gpu(0), gpu(1, total=GIB), reserve=2 * GIB)
    assert {name: device.room for name, device in found.items()} == {"0": 78 * GIB, "1": 0}
    assert {name: device.total for name, device in found.items()} == {"0": 80 * GIB, "1": GIB}


def test_of_unified_memory_a_tenth_is_kept_at_least() -> None:
    """All other programs live there too."""
    unified = replace(gpu(0, total=120 * GIB), unified=True)
    assert devices(unified, reserve=GIB)["0"].room == 108 * GIB
    assert devices(unified, reserve=20 * GIB)["0"].room == 100 * GIB


def test_a_limit_is_of_the_device_that_it_names() -> None:
    """By index or UUID. The lower one of two counts, one above the total changes nothing, one of no device neither."""
    seen = gpu(0, "GPU-8932f937"), gpu(1), gpu(2)
    found = devices(*seen, limits={"GPU-8932f": 30 * GIB, "0": 40 * GIB, "1": 99 * GIB, "7": 1})
    assert [found[name].room for name in "012"] == [30 * GIB, 80 * GIB, 80 * GIB]
    assert devices(*seen, limits={"0": 30 * GIB, "GPU-8932f": 40 * GIB})["0"].room == 30 * GIB


def test_where_nothing_is_measured_the_ledger_alone_counts() -> None:
    """As much is free as it says. The machine's memory is measured, without knowing whose it is."""
    assert devices(replace(gpu(0), free=None))["0"].free == math.inf
    assert devices(CPU)["cpu"] == Device(16 * GIB, 16 * GIB, 0, 8 * GIB, Kind.MEMORY)


def test_what_an_engine_is_told_says_of_which_kind_its_devices_are() -> None:
    """GPUs of their own, GPUs that have the machine's memory, or that memory alone."""
    model = ModelSpec("m", EngineSpec(model="m", sleep=1), Policy(), {})
    seen = named(gpu(0), replace(gpu(1), unified=True), CPU)
    machine = Machine(seen, frozenset(seen), Devices())
    told = {name: machine.allocation(model, (name,), {name: 5}) for name in machine.seen}
    assert {name: (one.gpus, one.unified) for name, one in told.items()} == {
        "0": (True, False), "1": (True, True), "cpu": (False, False),
    }  # fmt: skip
    assert [name for name, one in told.items() if one.visible is None] == ["cpu"]
    assert machine.devices()["1"].unified


OTHERS = (Foreign(7, "python3", 10 * GIB), Foreign(8, "Xorg", GIB))


def test_memory_of_other_programs_is_taken_from_the_room() -> None:
    """All of it where every engine of ours was found among the processes."""
    seen = replace(gpu(0), foreign=OTHERS, held={"chat/0": 30 * GIB})
    assert devices(seen, held={"chat/0": {"0": 40 * GIB}, "code/0": {"1": 40 * GIB}})["0"].foreign == 11 * GIB


def test_an_engine_that_cannot_be_told_from_other_programs_does_not_count_twice() -> None:
    """One in a container, say: what it is booked with is not foreign as well."""
    seen = replace(gpu(0), foreign=OTHERS)
    assert devices(seen, held={"chat/0": {"0": 10 * GIB}})["0"].foreign == GIB
    assert devices(seen, held={"chat/0": {"0": 40 * GIB}})["0"].foreign == 0
