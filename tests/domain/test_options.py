"""What of a model vLLM would not take, by a table of its options. What the parser itself says: tests/real."""

from pathlib import Path
from typing import Any

import pytest

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.domain.options import Option, OptionTable, names, problems

# Some of the options of vLLM 0.32.0, as engine/read_options.py prints them.
TABLE = OptionTable.from_json(Path(__file__).with_name("options.json").read_bytes())


def found(**keys: Any) -> list[tuple[str, str]]:  # noqa: ANN401 - TOML values
    """The problems of an engine's keys."""
    return problems(TABLE, EngineSpec.model_validate({"model": "org/m", **keys}))


def message(name: str, value: object) -> str:
    """The only message about one option."""
    ((path, text),) = found(args={name: value})
    assert path == f"args.{name}"
    return text


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_num_batch_tokens", "max_num_batched_tokens"),
        ("max-num-batch-tokens", "max-num-batched-tokens"),
        ("enable_prefx_caching", "enable_prefix_caching"),
        ("max_num_seq2", "max_num_seqs, which is written outside args"),
        ("asc", "api-server-count".replace("-", "_")),
        ("hf-override.part", "hf-overrides"),
    ],
)
def test_a_misspelled_option_is_told_with_the_nearest_name(name: str, meant: str) -> None:
    """In the spelling of the file, `_` or `-`; and where it is to be written."""
    text = message(name, 1)
    assert text in {f"unknown option; did you mean {meant}?", f"an abbreviation; write {meant}"}


def test_false_for_a_misspelled_flag_is_told_with_the_flag() -> None:
    """Not with its `no-` form, which nobody has written."""
    assert message("enable_prefx_caching", value=False) == "unknown option; did you mean enable_prefix_caching?"
    assert message("no_enable_prefx_caching", value=True) == "unknown option; did you mean no_enable_prefix_caching?"


def test_an_option_like_no_other_is_told_with_the_version() -> None:
    """It may be of another version."""
    assert message("swap_space", 4) == "unknown option: vLLM 0.32.0 has none of this name"


def test_what_the_daemon_owns_is_never_meant() -> None:
    """Nobody is led to an option that is refused next."""
    assert message("pord", 4) == "unknown option: vLLM 0.32.0 has none of this name"


@pytest.mark.parametrize("name", ["max_num_batched", "max-num-batched-token"])
def test_an_abbreviation_is_refused_with_the_full_name(name: str) -> None:
    """vLLM takes it today, and the next version may know two that begin so."""
    full = "max-num-batched-tokens" if "-" in name else "max_num_batched_tokens"
    assert message(name, 4) == f"an abbreviation; write {full}"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("enable_prefix_caching", "true", 'expected true or false, since vLLM takes no value here, got "true"'),
        ("enable_prefix_caching", 1, "expected true or false, since vLLM takes no value here, got 1"),
        ("enable_prefix_caching.x", 1, "expected true or false, since vLLM takes no value here, got 1"),
        ("seed", True, "expected a value, got true"),
        ("seed", False, "expected a value, got false"),
        ("seed", [1, 2], "expected one value, got a list of 2"),
        ("hf_token", ["a", "b"], "expected one value, got a list of 2"),
        (
            "limit_mm_per_prompt",
            [1, 2],
            'expected one value, got a list of 2; write it as text of JSON, such as "[1, 2]"',
        ),
        ("lora_modules", True, "expected a value, got true"),
        ("no_disable_log_stats", True, "vLLM has no --no-disable-log-stats: leave the option out"),
        ("no_seed", True, "vLLM has no --no-seed, since seed takes a value"),
        ("seed", "many", 'expected a whole number, got "many"'),
        ("seed", 1.5, "expected a whole number, got 1.5"),
        ("seed.x", 1, "expected a whole number, got 1"),
        ("cudagraph_capture_sizes", [1, "two"], 'expected a whole number, got "two"'),
        ("cpu_offload_gb", {"a": 1}, 'expected a number, got {"a": 1}'),
        ("max_num_batched_tokens", "many", 'expected a whole number such as 8192 or "8k", got a string'),
        ("max_num_batched_tokens", 2.0, 'expected a whole number such as 8192 or "8k", got 2.0'),
        ("compilation_config", "fast", 'expected a table, got "fast"'),
        ("speculative_config", "/srv/models/draft", 'expected a table, got "/srv/models/draft"'),
        ("scheduling_policy", "fcfS", 'expected one of "fcfs", "priority", got "fcfS"; did you mean "fcfs"?'),
        ("max_lora_rank", 7, "expected one of 1, 8, 16, 32, 64, 128, 256, 320, 512, got 7"),
    ],
)
def test_a_value_that_vllm_refuses_is_refused(name: str, value: object, expected: str) -> None:
    """With what is expected instead."""
    assert message(name, value).startswith(expected)


def test_of_many_choices_some_are_listed_and_the_nearest_is_named() -> None:
    """A message has an end."""
    text = message("moe_backend", "tritton")
    assert " or 11 more, got" in text
    assert text.endswith('got "tritton"; did you mean "triton"?')


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": True, "no_enable_chunked_prefill": True, "enforce_eager": False},
        {"disable_log_stats": False},
        {"max_num_batched_tokens": "8k"},
        {"max_num_batched_tokens": "25.6k"},
        {"max_num_batched_tokens": "8Z"},  # who knows which letters come
        {"seed": [3]},
        {"seed": " 7 "},
        {"cpu_offload_gb": "1e1"},
        {"chat_template": "None"},
        {"compilation_config": {"mode": 0}},
        {"compilation_config.mode": 0},
        {"compilation_config": '{"bytes": 80m}'},
        {"speculative_config": "null"},
        {"hf_overrides": "some.function"},
        {"chat_template": {"a": 1}},
        {"hf_token": True},
        {"hf_token": "secret"},
        {"lora_modules": "a=/srv/a"},
        {"lora_modules": [{"name": "a"}]},
        {"allowed_methods": ["GET", "PUT"]},
        {"moe_backend": "Flashinfer-Trtllm"},
        {"max_lora_rank": "016"},
        {"device_ids": "0,1"},
    ],
)
def test_what_vllm_takes_passes(options: dict[str, object]) -> None:
    """And so does what it might take."""
    assert not found(args=options)


def test_keys_outside_args_are_checked_by_their_own_names() -> None:
    """vLLM's versions differ in them, too."""
    table = OptionTable("9", tuple(option for option in TABLE.options if option.name not in {"dtype", "max-num-seqs"}))
    table = OptionTable("9", (*table.options, Option(("--dtype",), "store", None, "str", ("auto", "fp4"))))
    spec = EngineSpec(model="m", dtype="half", max_num_seqs=3, max_model_len="8k", trust_remote_code=False)
    assert problems(table, spec) == [
        ("dtype", 'expected one of "auto", "fp4", got "half"'),
        ("max_num_seqs", "unknown option: vLLM 9 has none of this name"),
    ]


def test_the_path_is_spelled_as_the_file_spells_it() -> None:
    """The parser of the file has turned the names of options into one spelling."""
    spec = EngineSpec(model="m", args={"max-num-batched-tokens": "x", "seed": "y"})
    written = {"model": "m", "args": {"max_num_batched_tokens": "x"}}
    assert [path for path, _ in problems(TABLE, spec, written)] == ["args.max_num_batched_tokens", "args.seed"]
    assert [path for path, _ in problems(TABLE, spec)] == ["args.max-num-batched-tokens", "args.seed"]


@pytest.mark.parametrize("nargs", ["*", "A...", "...", "==SUPPRESS=="])
@pytest.mark.parametrize("value", [True, 1, [1, 2], {"a": 1}])
def test_an_arity_that_takes_anything_refuses_nothing(nargs: str, value: object) -> None:
    """As argparse has it, or will have it."""
    table = OptionTable("9", (Option(("--x",), "other", nargs, "other", None),))
    assert not problems(table, EngineSpec(model="m", args={"x": value}))


def test_an_option_of_two_values_takes_two() -> None:
    """No fewer, no more."""
    table = OptionTable("9", (Option(("--x",), "store", 2, "int", None),))
    verdicts = {
        str(value): bool(problems(table, EngineSpec(model="m", args={"x": value})))
        for value in (True, 1, [1, 2], [1, 2, 3])
    }
    assert verdicts == {"True": True, "1": True, "[1, 2]": False, "[1, 2, 3]": True}


def test_names_are_the_long_ones() -> None:
    """For whoever completes them."""
    assert {"max-num-seqs", "no-enforce-eager", "device-memory-utilization"} <= names(TABLE)
    assert not any(name.startswith("-") for name in names(TABLE))


def test_a_table_survives_its_json() -> None:
    """What is kept is what was read."""
    assert OptionTable.from_json(TABLE.to_json()) == TABLE
    assert b"\n" not in TABLE.to_json()


OPTION = '{"names": ["--x"], "kind": "store", "nargs": null, "type": "str", "choices": null}'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("]}", ""),
        (OPTION, ""),
        ('["--x"]', "[]"),
        ('["--x"]', '["' + "x" * 501 + '"]'),
        ('"str"', '"text"'),
        ("null,", "1.5,"),
        ('"choices": null', '"choices": [1]'),
        ('"choices": null', '"choice": null'),
        ('"1"', "1"),
    ],
)
def test_what_is_no_table_is_not_read(old: str, new: str) -> None:
    """A file cut short, or of another version of this program."""
    text = '{"version": "1", "options": [' + OPTION + "]}"
    assert OptionTable.from_json(text.encode()).options[0].name == "x"
    assert old in text
    with pytest.raises(ValueError, match=r"."):
        OptionTable.from_json(text.replace(old, new).encode())
