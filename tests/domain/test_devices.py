"""What an engine is given, and whether two may have been given the same device."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.domain.devices import ANY_DEVICE, NO_DEVICES, Allocation, Names, allocation_for, unmanaged

NAMES = st.sampled_from(["0", "1", "2", "GPU-a", "GPU-b", ANY_DEVICE])
SETS = st.frozensets(NAMES, max_size=3)


def spec(**keys: object) -> EngineSpec:
    """An engine's keys."""
    return EngineSpec.model_validate({"model": "m", **keys})


@pytest.mark.parametrize(
    ("keys", "inherited", "expected"),
    [
        ({"devices": [1, "GPU-a"]}, {}, unmanaged({"1", "GPU-a"}, ("1", "GPU-a"))),
        ({"devices": [3]}, {"CUDA_VISIBLE_DEVICES": "0"}, unmanaged({"3"}, ("3",))),
        ({"devices": []}, {}, unmanaged((), ())),
        ({}, {}, unmanaged({"0"})),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {}, unmanaged("0123")),
        ({"tensor_parallel_size": 2}, {"CUDA_VISIBLE_DEVICES": "5, GPU-a,7"}, unmanaged({"5", "GPU-a"})),
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, NO_DEVICES),
        ({"env": {"CUDA_VISIBLE_DEVICES": "2"}}, {"CUDA_VISIBLE_DEVICES": "1"}, unmanaged({"2"})),
    ],
)
def test_an_engine_is_given_what_it_names_or_the_first_that_it_sees(
    keys: dict[str, object], inherited: Mapping[str, str], expected: Allocation
) -> None:
    """`devices` before everything; else as many of the visible ones as its parallel sizes say, in their order."""
    assert allocation_for(spec(**keys), inherited) == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (["0"], ["0"], True),
        (["0"], ["1"], False),
        (["GPU-a"], ["GPU-a"], True),
        (["GPU-a"], ["GPU-b"], False),
        (["0"], ["GPU-a"], True),
        (["GPU-a"], ["0"], True),
        ([ANY_DEVICE], ["0"], True),
        (["GPU-a"], [ANY_DEVICE], True),
        ([ANY_DEVICE], [ANY_DEVICE], True),
        ([ANY_DEVICE], [], False),
        ([], [], False),
        (["0", "1"], ["1", "2"], True),
    ],
)
def test_an_index_and_a_uuid_may_be_the_same_device(one: list[str], other: list[str], *, same: bool) -> None:
    """Nothing here can tell; a device that is not known may be each, and no device is none."""
    names = Names([*one, *other])
    assert bool({*names.of(one)} & {*names.of(other)}) is same


@given(st.lists(SETS, max_size=6), SETS)
def test_who_else_has_names_changes_nothing(others: list[frozenset[str]], asked: frozenset[str]) -> None:
    """Two sets may have a device in common as a look at each pair of their names would find it."""
    names = Names(name for devices in (*others, asked) for name in devices)
    for devices in others:
        may_share = any(a == b or ANY_DEVICE in (a, b) or a.isdigit() != b.isdigit() for a in devices for b in asked)
        assert bool({*names.of(devices)} & {*names.of(asked)}) is may_share
        assert {*names.of(devices)} <= {*names.all()}


def test_memory_of_no_size_uses_no_device() -> None:
    """Whatever the environment shows."""
    assert allocation_for(spec(memory="0B"), {"CUDA_VISIBLE_DEVICES": "1"}) == Allocation(visible=())
