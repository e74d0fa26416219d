"""What has to be done, told from what is wanted and what was adopted: nothing but what changed."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.adapters import Adapter
from vllm_proxy.domain.config import ModelSpec, Server
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.plan import Action, Kind, plan, restart_needed


def apply(running: Mapping[str, ModelSpec], action: Action) -> dict[str, ModelSpec]:
    """What is adopted behind an action."""
    rest = dict(running)
    if action.to is None:
        del rest[action.model]
    else:
        rest[action.model] = action.to
    return rest


def models(text: str) -> Mapping[str, ModelSpec]:
    """The models of a file."""
    return parse_config(text.encode(), "models.toml").models


def told(desired: str, running: str) -> list[tuple[str, str, str]]:
    """The plan between two files: action, model, reason."""
    return [(action.kind, action.model, action.reason) for action in plan(models(desired), models(running))]


CHAT = '[models.chat]\nmodel = "org/chat"\n'


@pytest.mark.parametrize(
    ("desired", "running", "expected"),
    [
        (CHAT, "", [("start", "chat", "new")]),
        (CHAT + 'start = "on-demand"', "", [("start", "chat", "new; its first request starts it")]),
        (CHAT + "enabled = false", "", [("update", "chat", "new, disabled")]),
        ("", CHAT, [("stop", "chat", "no longer in the file")]),
        (CHAT + "enabled = false", CHAT, [("stop", "chat", "disabled")]),
        (CHAT, CHAT + "enabled = false", [("start", "chat", "enabled")]),
        (CHAT + "max_model_len = 8192", CHAT + "max_model_len = 4096",
         [("replace", "chat", "max_model_len 4096 -> 8192")]),
        (CHAT + 'dtype = "half"', CHAT, [("replace", "chat", 'dtype not given -> "half"')]),
        (CHAT + "devices = [1]", CHAT + "devices = [0]", [("replace", "chat", "devices [0] -> [1]")]),
        (CHAT + 'args = { kv_cache_dtype = "fp8" }', CHAT,
         [("replace", "chat", 'args.kv-cache-dtype not given -> "fp8"')]),
        (CHAT + "args = { x = 1 }", CHAT + "args = { x = true }", [("replace", "chat", "args.x true -> 1")]),
        (CHAT + 'env = { HF_HOME = "/b" }', CHAT + 'env = { HF_HOME = "/a" }',
         [("replace", "chat", "env.HF_HOME changed")]),
        (CHAT + 'env = { T = { file = "b" } }', CHAT + 'env = { T = { file = "a" } }',
         [("replace", "chat", 'env.T {"file": "a"} -> {"file": "b"}')]),
        (CHAT + 'env = { T = { file = "b" } }', CHAT + 'env = { T = "a" }', [("replace", "chat", "env.T changed")]),
        (CHAT + 'args = { auth-token = "b" }', CHAT, [("replace", "chat", "args.auth-token changed")]),
        (CHAT + 'args = { x = { api_key = "b" } }', CHAT + 'args = { x = { api_key = "a" } }',
         [("replace", "chat", "args.x changed")]),
        (CHAT + 'args = { x = { api_key = "b" } }', CHAT,
         [("replace", "chat", 'args.x not given -> {"api_key": "***"}')]),
        (CHAT + "args = { max-num-batched-tokens = 2 }", CHAT,
         [("replace", "chat", "args.max-num-batched-tokens not given -> 2")]),
        ('[engine]\ncommand = ["x"]\n' + CHAT, CHAT, [("replace", "chat", 'command not given -> ["x"]')]),
        (CHAT + "replicas = 3", CHAT, [("scale", "chat", "replicas 1 -> 3")]),
        (CHAT + "queue_size = 1", CHAT, [("update", "chat", "queue_size 512 -> 1")]),
        (CHAT + "restart = { max_failures = 1 }", CHAT, [("update", "chat", "restart.max_failures 5 -> 1")]),
        (CHAT + 'metadata = { team = "a" }', CHAT, [("update", "chat", 'metadata.team not given -> "a"')]),
        (CHAT.replace("models.chat", "models.talk"), CHAT,
         [("stop", "chat", "no longer in the file"), ("start", "talk", "new")]),
        (CHAT + "enabled = false\nmax_model_len = 1", CHAT + "enabled = false",
         [("update", "chat", "max_model_len not given -> 1")]),
        (CHAT + "replicas = 2\nmax_model_len = 1\nqueue_size = 1", CHAT,
         [("update", "chat", "queue_size 512 -> 1"), ("replace", "chat", "max_model_len not given -> 1"),
          ("scale", "chat", "replicas 1 -> 2")]),
    ],
)  # fmt: skip
def test_each_change_is_one_action_with_its_reason(
    desired: str, running: str, expected: list[tuple[str, str, str]]
) -> None:
    """What the action is, and which key made it; values that may be secret are not shown."""
    assert told(desired, running) == expected


@pytest.mark.parametrize(
    "same",
    [
        "# a comment\n\n" + CHAT + 'max_model_len = "8k" # here too\nargs = { x_y = 1, z = { x = 1, y = 2 } }\n',
        '[models.chat]\nargs.z = { y = 2, x = 1 }\nargs.x-y = 1\nmax_model_len = "8k"\nmodel = "org/chat"\n',
        'models.chat = { model = "org/chat", max_model_len = "8k", args = { x_y = 1, z = { x = 1, y = 2 } } }\n',
        '[defaults]\nmax_model_len = "8k"\n' + CHAT + "args = { x_y = 1, z = { x = 1, y = 2 } }\n",
        CHAT + 'max_model_len = "8k"\nreplicas = 1\nqueue_timeout = 600\nargs = { x-y = 1, z = { x = 1, y = 2 } }\n',
        CHAT + 'max_model_len = "8k"\nidle_timeout = "900s"\n[models.chat.args]\nx_y = 1\nz = { x = 1, y = 2 }\n',
    ],
)
def test_what_means_the_same_costs_nothing(same: str) -> None:
    """Comments, order, layout, the spelling of options, a default that is written out or comes from `[defaults]`."""
    assert told(same, CHAT + 'max_model_len = "8k"\nargs = { x_y = 1, z = { x = 1, y = 2 } }\n') == []


def test_nan_is_what_it_was_before() -> None:
    """Read twice it is two values that are not equal: no change, all the same."""
    text = CHAT + "metadata.x = [nan]\n"
    assert told(text, text) == []
    assert models(text)["chat"].policy == models(text)["chat"].policy


def test_what_gives_room_comes_before_what_needs_it() -> None:
    """Updates, stops, smaller, replacements, larger, starts; in each the file's order."""
    running = "".join(f'[models.{name}]\nmodel = "m"\nreplicas = 2\n' for name in "abcde")
    desired = "".join(
        f'[models.{name}]\nmodel = "m"\n{keys}\n'
        for name, keys in {
            "new": "",
            "b": "replicas = 3",
            "c": "replicas = 1",
            "d": 'replicas = 2\ndtype = "half"',
            "e": "replicas = 2\nqueue_size = 1",
        }.items()
    )
    assert [(kind, name) for kind, name, _ in told(desired, running)] == [
        ("update", "e"), ("stop", "a"), ("scale", "c"), ("replace", "d"), ("scale", "b"), ("start", "new"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("idle_timeout = 900", "idle_timeout = '5m'", "idle_timeout 15m -> 5m"),
        ("queue_timeout = '1h30m'", "queue_timeout = 0.25", "queue_timeout 1h30m -> 250ms"),
        ("request_timeout = 0", "request_timeout = 1.5", "request_timeout 0s -> 1.5s"),
        ("restart = { backoff = 1 }", "restart = { backoff = 90 }", "restart.backoff 1s -> 1m30s"),
        ("gpu_memory_utilization = 0.9", "gpu_memory_utilization = 0.5", "gpu_memory_utilization 0.9 -> 0.5"),
    ],
)
def test_a_duration_is_shown_as_people_write_it(before: str, after: str, reason: str) -> None:
    """In the reasons of `plan`, of REST and of the log."""
    assert [row[2] for row in told(CHAT + after, CHAT + before)] == [reason]


def test_a_long_value_is_shortened() -> None:
    """The reason is a line in a log."""
    (row,) = told(CHAT + f'description = "{"x" * 1000}"', CHAT)
    assert len(row[2]) < 200


def test_what_only_a_restart_applies_is_named() -> None:
    """The sockets are open already; everything else of `[server]` is live."""
    assert restart_needed(Server(), Server(host="::1", port=1, on_exit="keep")) == ["server.host", "server.port"]
    assert restart_needed(Server(), Server(cors_origins=("*",), max_body_size=1)) == []
    assert restart_needed(Server(), Server(listen=("[::1]:1",))) == ["server.listen"]


def test_tls_goes_on_or_off_with_a_restart_and_another_file_is_live() -> None:
    """Where systemd holds the sockets, TLS is the file's business all the same."""
    on, other = Server(tls_cert="a", tls_key="b"), Server(tls_cert="c", tls_key="d", port=1)
    assert restart_needed(Server(), on) == restart_needed(on, Server()) == ["server.tls_cert", "server.tls_key"]
    assert restart_needed(on, other) == ["server.port"]
    assert restart_needed(Server(), other, address_is_given=True) == ["server.tls_cert", "server.tls_key"]


KEYS = st.fixed_dictionaries(
    {},
    optional={
        "max_model_len": st.sampled_from(["1", '"8k"']),
        "args": st.sampled_from(["{}", "{ seed = 1 }", "{ seed = true }"]),
        "env": st.sampled_from(["{}", '{ A = "1" }']),
        "replicas": st.integers(1, 3).map(str),
        "enabled": st.sampled_from(["true", "false"]),
        "start": st.sampled_from(['"always"', '"on-demand"']),
        "queue_size": st.integers(0, 2).map(str),
        "restart": st.sampled_from(["{}", "{ max_failures = 1 }"]),
    },
)
FILES = st.dictionaries(st.sampled_from("abcd"), KEYS, max_size=4).map(
    lambda tables: models(
        "".join(
            f'[models.{name}]\nmodel = "m"\n' + "".join(f"{key} = {value}\n" for key, value in keys.items())
            for name, keys in tables.items()
        )
    )
)


def meaning(specs: Mapping[str, ModelSpec]) -> dict[str, object]:
    """What two files must share to mean the same."""
    return {name: (spec.engine, spec.policy) for name, spec in specs.items()}


@given(FILES, FILES)
def test_a_plan_that_is_applied_leads_to_what_is_desired_and_to_no_further_plan(
    desired: Mapping[str, ModelSpec], running: Mapping[str, ModelSpec]
) -> None:
    """Step by step, whatever the two are."""
    now: Mapping[str, ModelSpec] = running
    for action in plan(desired, running):
        now = apply(now, action)
    assert meaning(now) == meaning(desired)
    assert plan(desired, now) == ()


@given(FILES, FILES, st.integers(0, 12))
def test_a_plan_that_is_cut_off_is_planned_again_and_converges(
    desired: Mapping[str, ModelSpec], running: Mapping[str, ModelSpec], done: int
) -> None:
    """After any number of steps."""
    now: Mapping[str, ModelSpec] = running
    for action in plan(desired, running)[:done]:
        now = apply(now, action)
    for action in plan(desired, now):
        now = apply(now, action)
    assert meaning(now) == meaning(desired)


@given(FILES, FILES)
def test_nothing_is_replaced_unless_an_engine_key_changed(
    desired: Mapping[str, ModelSpec], running: Mapping[str, ModelSpec]
) -> None:
    """And whatever is replaced is enabled, before and after."""
    replaced = {action.model for action in plan(desired, running) if action.kind is Kind.REPLACE}
    changed = {
        name
        for name in {*desired} & {*running}
        if desired[name].engine != running[name].engine
        and desired[name].policy.enabled
        and running[name].policy.enabled
    }
    assert replaced == changed


ADAPTER = CHAT + '[models.chat.adapters.support]\npath = "org/support"\n'
FIRST = "adapters.support new, adapters.support is the first: engines were started without room for adapters"


@pytest.mark.parametrize(
    ("desired", "running", "expected"),
    [
        (ADAPTER, CHAT, [("replace", FIRST)]),
        (CHAT, ADAPTER, [("update", "adapters.support removed")]),
        (ADAPTER + '[models.chat.adapters."x.y"]\npath = "org/x"', ADAPTER, [("update", 'adapters."x.y" new')]),
        (ADAPTER + "enabled = false", ADAPTER, [("update", "adapters.support disabled")]),
        (ADAPTER, ADAPTER + "enabled = false", [("replace", FIRST.replace("new", "enabled"))]),
        (ADAPTER + "enabled = false", CHAT, [("update", "adapters.support new, disabled")]),
        (ADAPTER.replace("org/support", "other/support"), ADAPTER,
         [("update", "adapters.support.path org/support -> other/support")]),
        (ADAPTER + 'description = "d"', ADAPTER, [("update", "adapters.support.description changed")]),
        (ADAPTER + "[models.chat.adapters_max]\nrank = 64", ADAPTER, [("replace", "adapters_max.rank 16 -> 64")]),
        (ADAPTER, ADAPTER + "[models.chat.adapters_max]\nrank = 64",
         [("update", "adapters_max changed")]),
        (ADAPTER + "[models.chat.adapters_max]\nrank = 16", ADAPTER,
         [("update", "adapters_max changed")]),
        (ADAPTER.replace("chat]", "chat]\nmax_model_len = 1"), CHAT,
         [("replace", FIRST + ", max_model_len not given -> 1")]),
        (CHAT + "queue_size = 1\n" + "".join(f'adapters.a{n}.path = "o/{n}"\n' for n in range(17)), ADAPTER,
         [("update", "queue_size 512 -> 1"),
          ("replace", ", ".join(["adapters.support removed", *(f"adapters.a{n} new" for n in range(17)),
                                 "adapters: 17 are more than the 16 that engines hold"]))]),
        (CHAT + "enabled = false\n" + ADAPTER[len(CHAT):], CHAT + "enabled = false",
         [("update", "adapters.support new")]),
        (ADAPTER.replace("chat]", "chat]\nenabled = false", 1) + "[models.chat.adapters_max]\nrank = 64",
         ADAPTER.replace("chat]", "chat]\nenabled = false", 1), [("update", "adapters_max changed")]),
    ],
)  # fmt: skip
def test_an_adapter_is_live_where_engines_have_room_for_it(
    desired: str, running: str, expected: list[tuple[str, str]]
) -> None:
    """The plan says before anything happens where they have none, and why."""
    assert sorted((kind, reason) for kind, _, reason in told(desired, running)) == sorted(expected)


def test_a_larger_rank_replaces_and_changed_files_do_not() -> None:
    """Known by their folders, which the file says nothing of."""
    (old,) = models(ADAPTER).values()
    small = replace(old, adapters={"support": Adapter("support", "x", rank=8, revision="1")}).with_lora(None)
    other = replace(old, adapters={"support": Adapter("support", "x", rank=4, revision="2")}).with_lora(None)
    large = replace(old, adapters={"support": Adapter("support", "x", rank=64, revision="3")}).with_lora(None)
    assert [(one.kind, one.reason) for one in plan({"chat": other}, {"chat": small})] == [
        ("update", files := "adapters.support: its files changed")
    ]
    assert [(one.kind, one.reason) for one in plan({"chat": large}, {"chat": small})] == [
        ("replace", f"{files}, adapters.support: its rank 64 is more than the 8 that engines hold")
    ]
    assert plan({"chat": small}, {"chat": small}) == ()
