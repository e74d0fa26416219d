"""What an engine needs of each device, and which models of a file can never have it, with the sums in the message."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain import packing
from vllm_proxy.domain.config import EngineSpec, ModelSpec, Policy
from vllm_proxy.domain.fit import CUDA_CONTEXT_BYTES, Demand, demand_of, held, misfits, needs, requested, share_of
from vllm_proxy.domain.ledger import Device, Kind

GIB = 2**30
H100 = int(79.18 * GIB)


def gpus(*sizes: float, reserve: float = 0.5) -> dict[str, Device]:
    """Devices of so many GiB, of which a part is kept back."""
    return {str(index): Device(int(size * GIB), int((size - reserve) * GIB)) for index, size in enumerate(sizes)}


def model(name: str = "m", start: str = "always", replicas: int = 1, **keys: object) -> ModelSpec:
    """A model with these engine keys."""
    engine = EngineSpec.model_validate({"model": name, **keys})
    return ModelSpec(name, engine, Policy.model_validate({"start": start, "replicas": replicas}), {})


def demand(
    name: str = "m", gib: float | None = None, start: str = "always", replicas: int = 1, **keys: object
) -> Demand:
    """What it wants, with `memory` in GiB."""
    return demand_of(model(name, start, replicas, **keys), None if gib is None else int(gib * GIB))


def messages(devices: dict[str, Device], *demands: Demand) -> dict[str, str]:
    """What does not fit, by model and key."""
    return {f"{one.model}.{one.key}": one.message for one in misfits(demands, devices)}


# Arithmetic


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_a_share_is_never_more_than_was_asked_and_hardly_less(memory: int, total: int) -> None:
    """Six digits, rounded down; vLLM rounds the bytes up."""
    share = share_of(memory, total)
    assert requested(total, share) <= memory + 1
    assert requested(total, share) >= memory - total * 1e-6 - 1


def test_a_start_needs_what_vllm_looks_for_and_the_context_before_it() -> None:
    """0.92 of the device where nothing is said, or what the installed vLLM says; no context in the machine's memory."""
    devices = {"0": Device(H100, H100), "1": Device(10 * GIB, 10 * GIB, kind=Kind.MEMORY)}
    assert needs(demand(), devices) == {
        "0": requested(H100, 0.92) + CUDA_CONTEXT_BYTES, "1": requested(10 * GIB, 0.92),
    }  # fmt: skip
    assert needs(demand(gpu_memory_utilization=0.5), devices)["0"] == requested(H100, 0.5) + CUDA_CONTEXT_BYTES
    assert needs(demand_of(model(), default_share=0.8), devices)["1"] == requested(10 * GIB, 0.8)
    assert abs(needs(demand(gib=20), devices)["0"] - CUDA_CONTEXT_BYTES - 20 * GIB) < 1e-6 * H100
    assert requested(1000, 0.2004) == 201


def test_named_devices_get_the_share_of_the_smallest() -> None:
    """One command line has one share, which is more of a larger device."""
    devices = gpus(80, 40)
    found = needs(demand(gib=20, tensor_parallel_size=2, devices=[0, 1]), devices)
    assert [round((size - CUDA_CONTEXT_BYTES) / GIB, 2) for size in found.values()] == [40, 20]
    found = needs(demand(gib=20, tensor_parallel_size=2), devices)
    assert [round((size - CUDA_CONTEXT_BYTES) / GIB, 2) for size in found.values()] == [20, 20]


def test_what_was_learned_counts_for_the_context() -> None:
    """But never less than what vLLM wants to find."""
    devices = gpus(80)
    wants = needs(demand(gib=20), devices)["0"] - CUDA_CONTEXT_BYTES
    assert needs(demand(gib=20), devices, measured=wants + 7) == {"0": wants + 7}
    assert needs(demand(gib=20), devices, measured=GIB) == {"0": wants + CUDA_CONTEXT_BYTES}
    assert needs(demand(gib=20), devices, measured=90 * GIB) == {"0": wants + CUDA_CONTEXT_BYTES}, "another device"


@pytest.mark.parametrize(("measured", "expected"), [
    (None, 1000 * 2**20),
    (600 * 2**20, 1000 * 2**20),
    (300 * 2**20, (375 + 512) * 2**20),
    (599 * 2**20, 1000 * 2**20),
    (0, 512 * 2**20),
])  # fmt: skip
def test_an_engine_without_kv_cache_counts_for_what_it_has(measured: int | None, expected: int) -> None:
    """A quarter and 512 MiB more than was measured, and never more than it needed."""
    assert held(1000 * 2**20, measured) == expected


@pytest.mark.parametrize(("keys", "count"), [
    ({}, 1),
    ({"tensor_parallel_size": 2, "pipeline_parallel_size": 3}, 6),
    ({"tensor_parallel_size": 2, "args": {"data-parallel-size": 2}}, 4),
    ({"tensor_parallel_size": 2, "args": {"prefill_context_parallel_size": 2}}, 4),
    ({"args": {"data-parallel-size": 8, "data-parallel-size-local": 2}}, 2),
    ({"devices": []}, 0),
    ({"env": {"CUDA_VISIBLE_DEVICES": ""}}, 0),
])  # fmt: skip
def test_the_world_size_says_how_many_devices(keys: dict[str, object], count: int) -> None:
    """Tensor, pipeline, prefill context and data parallel, those of this machine."""
    assert demand(**keys).count == count  # type: ignore[arg-type]


def test_a_model_of_no_memory_uses_no_device() -> None:
    """Whatever it names."""
    assert (demand(gib=0, devices=[1]).count, demand(gib=0, devices=[1]).named) == (0, None)
    assert needs(demand(gib=0), gpus(80)) == {}


def test_cuda_visible_devices_counts_as_devices() -> None:
    """The key comes first; of more devices than it needs, vLLM takes the first."""
    assert demand(env={"CUDA_VISIBLE_DEVICES": "2, 3"}).named == ("2",)
    assert demand(devices=[1], env={"CUDA_VISIBLE_DEVICES": "2"}).named == ("1",)
    assert demand(tensor_parallel_size=2, devices=[1, "GPU-a", 3]).named == ("1", "GPU-a")


# Misfits


def test_what_fits_is_no_misfit() -> None:
    """Models that come and go need not fit beside each other."""
    assert not messages(gpus(80), demand("a", 30), demand("b", 40), demand("c", 70, start="on-demand"))
    assert not messages({}, demand("a", 0))


def test_more_devices_than_there_are() -> None:
    """With what makes them so many."""
    wide = demand(gib=10, tensor_parallel_size=2, pipeline_parallel_size=2)
    product = "4 devices (tensor_parallel_size 2 x pipeline_parallel_size 2)"
    assert messages(gpus(80, 80), wide) == {"m.tensor_parallel_size": f"needs {product}, and there are 2: GPU 0, GPU 1"}
    assert messages(gpus(80, 80), demand(gib=10, tensor_parallel_size=2, devices=[1])) == {
        "m.devices": "needs 2 devices (tensor_parallel_size 2), and names 1"
    }
    assert messages(gpus(80, 48), demand(gib=10, tensor_parallel_size=2)) == {
        "m.tensor_parallel_size": "needs 2 devices (tensor_parallel_size 2) of one size, "
        "and there are 1 of 80.0 + 1 of 48.0 GiB"
    }
    assert messages(gpus(80), demand(args={"data-parallel-size": 2})).keys() == {"m.args.data_parallel_size"}


def test_devices_that_are_not_there() -> None:
    """By name."""
    assert messages(gpus(80), demand(gib=10, devices=[7])) == {"m.devices": "names 7, and there is GPU 0"}


def test_more_memory_than_the_largest_has() -> None:
    """With the sum: context included, what is kept back left out."""
    assert messages(gpus(24, 80), demand(gib=79.2)) == {
        "m.memory": "needs 79.8 GiB on a GPU, and engines may have 79.5 of GPU 1 (80.0 without what is kept back)"
    }
    memory = {"0": Device(14 * GIB, 13 * GIB, kind=Kind.MEMORY)}
    assert messages(memory, demand(gib=13.5))["m.memory"].startswith("needs 13.5 GiB on the machine's memory, and")
    assert messages(gpus(24), demand(gpu_memory_utilization=0.99)).keys() == {"m.gpu_memory_utilization"}
    two = messages(gpus(80, 24), demand(gib=40, tensor_parallel_size=2, devices=[0, 1]))
    assert two["m.memory"].startswith("needs 40.6 GiB on each of 2 devices (tensor_parallel_size 2), and engines may")
    assert messages(gpus(80, 24), demand(gib=78.8)) == {}, "to the byte"


def test_what_is_always_to_run_has_to_fit_together() -> None:
    """The first of the file that does not fit beside those before it, with the sum; replicas and gangs count."""
    found = messages(gpus(80), demand("chat", 40), demand("code", 60), demand("small", 1))
    assert found == {
        "code.start": "what is always to run needs 40.6 (chat) + 60.6 (code) + 1.6 (small) = 102.8 GiB, and "
        'engines may have 79.5 (GPU 0): give less memory, or start = "warm" or "on-demand"'
    }
    assert "3 x 30.6 (a) = 91.8 GiB" in messages(gpus(80), demand("a", 30, replicas=3))["a.start"]
    gang = demand("g", 60, tensor_parallel_size=2)
    assert "2 x 60.6 (g) + 20.6 (s) = 141.8 GiB" in messages(gpus(80, 80), gang, demand("s", 20))["s.start"]
    many = messages(gpus(80), *(demand(f"m{index}", 9) for index in range(9)))
    assert "needs 3 more + 9.6 (m3) +" in many["m8.start"]


def test_what_fits_in_sum_may_still_not_be_divided() -> None:
    """By an exact search: the largest first is not enough."""
    thirds = [demand(name, 30) for name in "abcde"]
    found = messages(gpus(80, 80), *thirds)
    assert (
        "= 153.0 GiB, and engines may have 79.5 (GPU 0) + 79.5 (GPU 1) = 159.0, which cannot be divided"
        in found["e.start"]
    )
    sizes = (39.4, 39.4, 29.4, 29.4, 29.4, 29.4)
    assert not messages(gpus(100.7, 100.7), *(demand(f"m{index}", size) for index, size in enumerate(sizes)))
    named = [demand("a", 50, devices=[0]), demand("b", 50, devices=[0])]
    assert messages(gpus(80, 80), *named).keys() == {"b.start"}
    assert not messages(gpus(80, 80), demand("a", 50), demand("b", 50, devices=[0]))


def test_what_was_measured_counts_for_an_engine_without_kv_cache() -> None:
    """Two that each have to find much and keep little stand together."""
    pair = [demand("a"), demand("b", devices=[0])]
    assert misfits(pair, gpus(80))
    assert not misfits(pair, gpus(80), {"a": GIB, "b": GIB})


def test_in_doubt_everything_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that takes too long, engines on several machines, devices that are named elsewhere."""
    thirds = [demand(name, 30) for name in "abcde"]
    monkeypatch.setattr(packing, "MOST_STEPS", 4)
    assert not messages(gpus(80, 80), *thirds)
    assert not messages(gpus(80), demand(gib=10, tensor_parallel_size=8, args={"nnodes": 4}))
    ray = {"distributed-executor-backend": "ray"}
    assert not messages(gpus(80), demand(gib=10, tensor_parallel_size=8, args=ray))
    assert not messages(gpus(80), demand(gib=90, env={"CUDA_VISIBLE_DEVICES": {"file": "/run/devices"}}))


def test_a_model_that_is_disabled_is_not_always_to_run() -> None:
    """It takes nothing from the others."""
    spec = model("a")
    off = ModelSpec("a", spec.engine, Policy(enabled=False), {})
    assert not misfits([demand_of(off, 60 * GIB), demand("b", 60)], gpus(80))


@given(st.lists(st.integers(1, 30), max_size=6), st.lists(st.integers(20, 40), min_size=1, max_size=3))
def test_the_search_finds_what_trying_everything_finds(sizes: list[int], rooms: list[int]) -> None:
    """Every way to put each on one device."""
    devices = {str(index): Device(room * GIB, room * GIB, kind=Kind.MEMORY) for index, room in enumerate(rooms)}
    demands = [Demand(f"m{index}", (), 1, size * GIB, always=True) for index, size in enumerate(sizes)]

    def fits(left: list[float], rest: list[float]) -> bool:
        if not rest:
            return True
        return any(
            left[one] >= rest[0] - 1e-3 and fits([*left[:one], left[one] - rest[0], *left[one + 1 :]], rest[1:])
            for one in range(len(left))
        )

    alone = all(size <= max(rooms) for size in sizes)
    assert (not misfits(demands, devices)) == (
        alone and fits([float(room) for room in rooms], [float(size) for size in sizes])
    )


# Sleep


def test_weights_are_not_kept_in_the_memory_that_they_are_in() -> None:
    """Level 1 where GPUs have the machine's memory can never be had; level 2 can, and so can level 1 elsewhere."""
    spark = {"0": replace(Device(119 * GIB, 100 * GIB), unified=True)}
    assert messages(spark, demand("a", 20), demand("b", 20, sleep=2)) == {}
    found = messages(spark, demand("a", 20, sleep=1))
    assert [*found] == ["a.sleep"]
    assert found["a.sleep"].startswith("keeps weights in the machine's memory, and the memory of GPU 0 is just that")
    assert messages(gpus(80), demand("a", 20, sleep=1)) == {}
    assert messages({"cpu": Device(16 * GIB, 16 * GIB, kind=Kind.MEMORY)}, demand("a", 8, sleep=1)) == {}


def test_one_gpu_with_its_own_memory_is_enough_to_keep_weights_elsewhere() -> None:
    """Where any may be had; one that is named has to be such a one."""
    devices = {**gpus(80), "1": replace(Device(80 * GIB, 79 * GIB), unified=True)}
    assert messages(devices, demand("a", 20, sleep=1), demand("b", 20, sleep=1, devices=[0])) == {}
    assert [*messages(devices, demand("a", 20, sleep=1, devices=[1]))] == ["a.sleep"]
    assert [*messages(devices, demand("a", 20, sleep=1, tensor_parallel_size=2))] == ["a.sleep"]
