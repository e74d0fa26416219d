"""Options of `vllm serve` in `args`."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.args import misplaced, option_name, problems_of, repeated, tokens

OWNED = (
    "served-model-name host port uds api-key config root-path ssl-keyfile ssl-anything headless grpc middleware "
    "shutdown-timeout allowed-origins enable-sleep-mode data-parallel-multi-port-external-lb lora-modules"
).split()
OWN_KEYS = (
    "model tensor_parallel_size pipeline_parallel_size max_model_len dtype quantization trust_remote_code "
    "gpu_memory_utilization max_num_seqs"
).split()
FREE = (
    "enable-prefix-caching kv-cache-dtype hf-overrides api-server-count max-num-batched-tokens allowed-methods "
    "data-parallel-size disable-log-stats no-enable-prefix-caching configuration hosts compilation-config.level"
).split()


def problem(key: str, value: object = True) -> str:  # noqa: FBT002 - a TOML value
    """The only message about an option."""
    ((found, message),) = problems_of({key: value})
    assert found == key
    return message


@pytest.mark.parametrize("name", OWNED)
@pytest.mark.parametrize("spelling", ["{}", "no-{}", "{}.part"])
@pytest.mark.parametrize("separator", ["-", "_"])
def test_an_option_of_the_daemon_is_refused_in_every_spelling(name: str, spelling: str, separator: str) -> None:
    """Snake case, kebab case, negation and a part of it: each would take over what the daemon decides."""
    message = problem(spelling.format(name).replace("-", separator))
    told = "clients could not ask for these: " if name == "lora-modules" else f"--{name} belongs to the daemon"
    assert message.startswith(told)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("api-key", ": `vllm-proxy keys add` writes one"),
        ("host", ": write host in [server], where clients come in; engines listen on 127.0.0.1"),
        ("port", ": write port in [server], where clients come in; engines get ports of their own"),
        ("uds", ': write listen = ["unix:PATH"] in [server], where clients come in'),
        ("ssl-keyfile", ": write server.tls_cert and server.tls_key"),
        ("served-model-name", ": clients send the id of its table, or one of its aliases"),
        ("enable-sleep-mode", ": write sleep = 1 in the model's table"),
        ("headless", " and cannot be set"),
    ],
)
def test_an_option_of_the_daemon_is_told_with_what_to_write_instead(name: str, instead: str) -> None:
    """The same in `args` and as a key of a model, since the one leads to the other."""
    assert problem(name) == misplaced(name.replace("-", "_"), "x") == f"--{name} belongs to the daemon{instead}"


@pytest.mark.parametrize(
    ("value", "table"),
    [
        (["sql=/srv/lora/sql", "b=/b"], '[models.ID.adapters.sql] with path = "/srv/lora/sql"'),
        ("sql=/srv/lora/sql", '[models.ID.adapters.sql] with path = "/srv/lora/sql"'),
        ([{"name": "v1.5", "path": "org/sql"}], '[models.ID.adapters."v1.5"] with path = "org/sql"'),
        (['{"name": "sql", "path": "/sql"}'], '[models.ID.adapters.sql] with path = "/sql"'),
        (["{not json"], '[models.ID.adapters.NAME] with path = "a folder, or a hub id"'),
        ([], '[models.ID.adapters.NAME] with path = "a folder, or a hub id"'),
        (True, '[models.ID.adapters.NAME] with path = "a folder, or a hub id"'),
        ([{"path": [1]}], '[models.ID.adapters.NAME] with path = "a folder, or a hub id"'),
    ],
)
def test_adapters_in_an_option_are_told_with_their_table(value: object, table: str) -> None:
    """Engines would have them, and nobody could ask for one; the first one is shown as the file would have it."""
    message = f"clients could not ask for these: write {table} instead"
    assert problem("lora_modules", value) == misplaced("lora_modules", value) == message


@pytest.mark.parametrize(
    ("key", "in_args", "outside"),
    [
        ("tp", "tensor_parallel_size, which is written outside args", "tensor_parallel_size"),
        ("-tp", "tensor_parallel_size, which is written outside args", "tensor_parallel_size"),
        ("pp", "pipeline_parallel_size, which is written outside args", "pipeline_parallel_size"),
        ("q", "quantization, which is written outside args", "quantization"),
        ("-dp", "data_parallel_size", "args.data_parallel_size"),
    ],
)
def test_a_short_name_is_told_with_the_full_one(key: str, in_args: str, outside: str) -> None:
    """Known without vLLM's own table."""
    assert problem(key, 2) == f"unknown option; did you mean {in_args}?"
    assert misplaced(key, 2) == f"unknown key; did you mean {outside}?"


@pytest.mark.parametrize("name", ["zzz", "enable_prefix_caching", "data_parallel_size", "tensor"])
def test_of_another_key_nothing_is_known(name: str) -> None:
    """It may be an option that goes into `args`, or a misspelt key."""
    assert misplaced(name, 1) is None


@pytest.mark.parametrize("name", OWN_KEYS)
@pytest.mark.parametrize("spelling", ["{}", "no_{}", "{}.part"])
@pytest.mark.parametrize("separator", ["-", "_"])
def test_a_key_of_the_model_is_refused_by_its_name(name: str, spelling: str, separator: str) -> None:
    """What has a key outside `args` is set there, and the message says which."""
    message = problem(spelling.format(name).replace("_", separator))
    assert message == f"has a key of its own: write {name} outside args"


def test_another_name_of_a_key_is_refused_too() -> None:
    """vLLM knows `--gpu-memory-utilization` by a second name."""
    assert problem("device_memory_utilization") == "has a key of its own: write gpu_memory_utilization outside args"


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("por", "port"),
        ("ssl", "ssl-"),
        ("serv", "served-model-name"),
        ("max_model", "max-model-len"),
        ("no-trust", "trust-remote-code"),
        ("no-enable-sleep", "enable-sleep-mode"),
        ("hos.x", "host"),
        ("mod", "model"),
        ("mid", "middleware"),
    ],
)
def test_an_abbreviation_of_what_cannot_be_set_is_refused(name: str, full: str) -> None:
    """Argparse completes names: half an owned option is the option."""
    assert problem(name) == f"vLLM would read this as an abbreviation of --{full}, which cannot be set here"


@given(st.sampled_from([*OWNED, *OWN_KEYS]), st.data())
def test_no_beginning_of_what_cannot_be_set_is_accepted(name: str, data: st.DataObject) -> None:
    """However short the abbreviation, it does not pass."""
    short = name[: data.draw(st.integers(1, len(name)))]
    assert list(problems_of({short: True}))


@pytest.mark.parametrize("name", FREE)
def test_any_other_option_is_free(name: str) -> None:
    """Options that only look like owned ones pass, known to this program or not."""
    assert not list(problems_of({name: True}))
    assert not list(problems_of({name.replace("-", "_"): True}))


@pytest.mark.parametrize(
    "name", ["", "-", "--seed", "Seed", "seed=1", "se ed", "seed\n", "\u00e4", ".seed", "seed.", "_seed"]
)
def test_what_is_no_option_name_is_refused(name: str) -> None:
    """A key is the option without its dashes, nothing that could become two tokens."""
    assert problem(name).startswith("expected the name of a vLLM option without its dashes, got ")


@pytest.mark.parametrize("value", [False, 1, "x", [1], {}])
def test_a_negated_option_can_only_be_true(value: object) -> None:
    """`no_x = false` would be `--no-no-x`, which vLLM does not know."""
    assert "write enable-x = true or false" in problem("no_enable_x", value)


def test_an_empty_list_is_refused() -> None:
    """An option that takes several values takes at least one."""
    assert problem("allowed_local_domains", []) == "expected at least one item"


@pytest.mark.parametrize("item", ["-x", "--host=0.0.0.0", "-", -0.5])
def test_a_list_item_that_vllm_would_take_for_an_option_is_refused(item: object) -> None:
    """List items are tokens of their own: nothing may slip an option in."""
    assert "vLLM would take it for an option" in problem("allowed_local_domains", ["ok", item])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1]], "expected a list of plain values or tables, got a list inside a list"),
        ("a\0b", "expected text without NUL characters"),
        (["a\0b"], "expected text without NUL characters"),
        ({"a": {"b": ["\0"]}}, "expected text without NUL characters"),
        (float("nan"), "expected a finite number, got nan"),
        ({"a": [float("inf")]}, "expected a finite number, got inf"),
        (None, "expected a string, number, boolean, list or table, got None"),
        ({"a": b"bytes"}, "expected a string, number, boolean, list or table, got b'bytes'"),
    ],
)
def test_a_value_that_no_command_line_holds_is_refused(value: object, message: str) -> None:
    """At any depth: NUL, numbers that are none, dates and other types are problems of the file, not of a crash."""
    assert problem("hf_overrides", value) == message


def test_every_problem_is_told() -> None:
    """One wrong option does not hide the next; the keys are as written."""
    found = dict(problems_of({"host": "x", "seed": 1, "Bad": 1, "max_num_seqs": 4, "lora_modules": []}))
    assert list(found) == ["host", "Bad", "max_num_seqs", "lora_modules"]


@pytest.mark.parametrize(
    ("first", "second"),
    [("a_b", "a-b"), ("a-b", "a_b"), ("enable_x", "no_enable_x"), ("no-enable-x", "enable_x"), ("a-b.c_d", "a_b.c_d")],
)
def test_one_option_in_two_spellings_is_repeated(first: str, second: str) -> None:
    """Nobody is left guessing which of the two counts."""
    assert list(repeated({first: 1, "other": 1, second: 1})) == [
        (second, f'the same option as "{first}"; keep one of them')
    ]


def test_different_options_are_not_repeated() -> None:
    """Behind a dot `_` and `-` are different, since vLLM reads it as a key of a table."""
    assert not list(repeated({"a": 1, "a_b": 1, "a.b_c": 1, "a.b-c": 1, "north": 1, "th": 1}))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("enable_prefix_caching", True, ["--enable-prefix-caching"]),
        ("enable-prefix-caching", False, ["--no-enable-prefix-caching"]),
        ("no_enable_prefix_caching", True, ["--no-enable-prefix-caching"]),
        ("disable_log_stats", True, ["--disable-log-stats"]),
        ("disable_log_stats", False, []),
        ("kv_cache_dtype", "fp8", ["--kv-cache-dtype=fp8"]),
        ("chat_template", "-x y", ["--chat-template=-x y"]),
        ("revision", "", ["--revision="]),
        ("seed", -1, ["--seed=-1"]),
        ("swap_space", 1.5, ["--swap-space=1.5"]),
        ("hf_overrides", {"a": 1, "b": {"c": [True, "x"]}}, ["--hf-overrides", '{"a": 1, "b": {"c": [true, "x"]}}']),
        ("lora_modules", ["a=b", "c=d"], ["--lora-modules", "a=b", "c=d"]),
        ("lora_modules", [{"name": "a"}, {"name": "b"}], ["--lora-modules", '{"name": "a"}', '{"name": "b"}']),
        ("cudagraph_capture_sizes", [1, 2], ["--cudagraph-capture-sizes", "1", "2"]),
        ("flags", [True, False], ["--flags", "true", "false"]),
        ("allowed_methods", ["GET"], ["--allowed-methods", '["GET"]']),
    ],
)
def test_a_value_becomes_the_tokens_that_vllm_parses(key: str, value: object, expected: list[str]) -> None:
    """Flags, values, lists and JSON look on the command line as vLLM's own help shows them."""
    assert tokens({key: value}) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, "true"), (False, "false"), (2, "2"), ("fp8", "fp8"), ([1, "a"], '[1, "a"]'), ({"x": None}, '{"x": null}')],
)
def test_a_part_of_a_table_is_one_token_with_its_value(value: object, expected: str) -> None:
    """vLLM takes the token after a dotted option for its value: a bare flag would swallow the next option."""
    assert tokens({"compilation_config.pass_config.x": value}) == [f"--compilation-config.pass_config.x={expected}"]


def test_tokens_keep_the_order_of_the_file() -> None:
    """The command line reads as the file does."""
    assert tokens({"b": 1, "a": True, "c": "x"}) == ["--b=1", "--a", "--c=x"]


@given(st.from_regex(r"[a-z0-9_-]{1,10}(\.[A-Za-z_-]{1,10})?", fullmatch=True))
def test_a_name_is_the_same_once_it_is_kebab_case(key: str) -> None:
    """Naming an option twice changes nothing, and what is behind a dot is untouched."""
    name = option_name(key)
    assert option_name(name) == name
    assert "_" not in name.partition(".")[0]
    assert name.partition(".")[1:] == key.partition(".")[1:]


plain = st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(st.sampled_from(FREE), plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(), plain)))
def test_what_has_no_problem_has_only_tokens_that_vllm_reads_as_meant(args: dict[str, Any]) -> None:
    """No token of accepted options starts with a dash but the options themselves and whole negative numbers."""
    if list(problems_of(args)):
        return
    for token in tokens(args):
        assert "\0" not in token
        if token.startswith("-") and not token[1:].isdigit():
            name = token.partition("=")[0].removeprefix("--").removeprefix("no-")
            assert name in {free.removeprefix("no-") for free in FREE}
