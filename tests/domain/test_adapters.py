"""What is known of an adapter by its configuration, and which engines can hold which adapters."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.adapters import RANKS, Adapter, Lora, Most, describe, looks_like_hub_id, needed, shortfall

PLAIN: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none", "peft_type": "LORA"}


def of_ranks(*ranks: int | None) -> list[Adapter]:
    """One adapter each; of one on the hub it is not known."""
    found = enumerate(ranks)
    return [Adapter(f"a{index}", f"org/{index}", rank=rank, is_hub_id=rank is None) for index, rank in found]


@pytest.mark.parametrize(
    ("keys", "rank"),
    [
        ({}, 8),
        ({"r": 512}, 512),
        ({"rank_pattern": {"q_proj": 40, "v_proj": 4}}, 40),
        ({"rank_pattern": {"q_proj": 4}}, 8),
        ({"rank_pattern": None}, 8),
        ({"modules_to_save": None}, 8),
        ({"modules_to_save": ["score", "classifier"]}, 8),
        ({"init_lora_weights": True}, 8),
        ({"init_lora_weights": "gaussian"}, 8),
        ({"init_lora_weights": "EVA"}, 8),
        ({"use_dora": False, "lora_bias": False, "layer_replication": None}, 8),
        ({"use_rslora": True, "something_new": 1}, 8),
    ],
)
def test_the_rank_of_an_adapter_is_its_largest(keys: dict[str, Any], rank: int) -> None:
    """Of `r` and of every module that has one of its own; what vLLM takes beside them is no problem."""
    assert describe(json.dumps(PLAIN | keys).encode()).rank == rank


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "LoRA bias"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"modules_to_save": "embed_tokens"}, "modules_to_save"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [[0, 1]]}, "layer replication"),
        ({"use_bdlora": {"a": 1}}, "block-diagonal"),
        ({"use_qalora": True}, "QALoRA"),
        ({"r": 513}, "513 is more than 512"),
        ({"rank_pattern": {"x": 600}}, "600 is more than 512"),
        ({"r": 0}, "whole numbers above 0"),
        ({"r": True}, "whole numbers above 0"),
        ({"rank_pattern": {"x": "8"}}, "whole numbers above 0"),
        ({"rank_pattern": [8]}, "whole numbers above 0"),
    ],
)
def test_an_adapter_that_vllm_would_refuse_is_known_by_its_configuration(keys: dict[str, Any], says: str) -> None:
    """What vLLM 0.32 refuses when it loads one is told before anything starts."""
    with pytest.raises(ValueError, match=says):
        describe(json.dumps(PLAIN | keys).encode())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"r": 8}', "[" * 100_000, "\udcff"])
def test_what_is_no_configuration_of_an_adapter_is_refused(text: str) -> None:
    """Whatever stands there, with the name of the file."""
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        describe(text.encode(errors="surrogateescape"))


@pytest.mark.parametrize(
    ("ranks", "most", "lora"),
    [
        ([], Most(), None),
        ([], Most(64), None),
        ([1], Most(), Lora(1, 1, 16)),
        ([8, 9], Most(), Lora(16, 2, 16)),
        ([None], Most(), Lora(16, 1, 16)),
        ([8, 8, 8], Most(), Lora(8, 4, 16)),
        ([321] * 9, Most(), Lora(512, 4, 32)),
        ([8], Most(rank=64), Lora(64, 1, 16)),
        ([None], Most(rank=8), Lora(8, 1, 16)),
        ([8] * 3, Most(cpu_loras=2), Lora(8, 2, 2)),
        ([8], Most(loras=20), Lora(8, 20, 20)),
        ([8], Most(loras=3, cpu_loras=5), Lora(8, 3, 5)),
    ],
)
def test_engines_are_started_with_room_for_more(ranks: list[int | None], most: Most, lora: Lora | None) -> None:
    """The smallest rank of vLLM's that holds all, twice as many places; what the file says is as it says."""
    assert needed(of_ranks(*ranks), most) == lora


def test_a_disabled_adapter_needs_no_room() -> None:
    """It costs no engine its place."""
    off = Adapter("off", "x", enabled=False, rank=512)
    assert needed([off], Most()) is None
    assert needed([off, *of_ranks(8)], Most()) == Lora(8, 1, 16)
    assert shortfall(None, [off], Most()) is None


@pytest.mark.parametrize(
    ("running", "ranks", "most", "why"),
    [
        (None, [], Most(), None),
        (None, [8], Most(), "adapters.a0 is the first: engines were started without room for adapters"),
        (Lora(8, 1, 16), [], Most(), None),
        (Lora(8, 1, 16), [8] * 16, Most(), None),
        (Lora(8, 1, 16), [8] * 17, Most(), "adapters: 17 are more than the 16 that engines hold"),
        (Lora(8, 1, 16), [8, 64, 9], Most(), "adapters.a1: its rank 64 is more than the 8 that engines hold"),
        (Lora(8, 1, 16), [None], Most(), "adapters.a0: its rank 16 is more than the 8 that engines hold"),
        (Lora(64, 4, 32), [1], Most(), None),
        (Lora(64, 4, 32), [1], Most(rank=8), "adapters_max.rank 64 -> 8"),
        (Lora(64, 4, 32), [1], Most(loras=1), "adapters_max.loras 4 -> 1"),
        (Lora(64, 4, 32), [1], Most(64, 4, 32), None),
        (Lora(8, 1, 2), [8] * 3, Most(cpu_loras=2), None),
    ],
)
def test_engines_that_have_enough_room_stay(
    running: Lora | None, ranks: list[int | None], most: Most, why: str | None
) -> None:
    """Else it is said what is missing; less that would do now, and another number in one batch, are no reason."""
    assert shortfall(running, of_ranks(*ranks), most) == why


def test_an_adapter_whose_folder_cannot_be_read_needs_no_larger_rank() -> None:
    """It is broken, and no engine is replaced for it; for it alone engines have vLLM's default."""
    broken = Adapter("broken", "./gone")
    assert shortfall(Lora(8, 1, 16), [*of_ranks(8), broken], Most()) is None
    assert needed([broken, *of_ranks(8)], Most()) == Lora(8, 2, 16)
    assert needed([broken], Most()) == Lora(16, 1, 16)


@given(st.lists(st.integers(1, RANKS[-1]) | st.none(), max_size=40), st.sampled_from([None, 512]))
def test_new_engines_always_have_enough_room(ranks: list[int | None], rank: int | None) -> None:
    """What they are started with is what their adapters need."""
    adapters, most = of_ranks(*ranks), Most(rank=rank)
    lora = needed(adapters, most)
    assert shortfall(lora, adapters, most) is None
    assert lora is None or (lora.rank in RANKS and lora.loras <= lora.cpu_loras)


@pytest.mark.parametrize(
    ("path", "is_one"),
    [("org/name", True), ("name", False), ("a/b/c", False), ("./name", False), ("../name", False), ("/name", False),
     ("~/name", False), ("org/", False), (".a/b", False)],
)  # fmt: skip
def test_a_hub_id_is_two_names_with_a_slash(path: str, is_one: bool) -> None:  # noqa: FBT001 - a table of cases
    """Everything else can only be a folder."""
    assert looks_like_hub_id(path) is is_one
