"""The command line and the environment of an engine."""

from dataclasses import replace
from typing import Any

import pytest

from vllm_proxy.domain.adapters import Lora
from vllm_proxy.domain.address import TcpAddress, UnixAddress
from vllm_proxy.domain.command import ENGINE_SHUTDOWN_SECONDS, Place, argv, environment, fingerprint, may_sleep
from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.domain.devices import NO_DEVICES, Allocation, allocation_for, unmanaged

PLACE = Place("chat/1", "chat/1-own", TcpAddress("127.0.0.1", 8005), "secret", "/tmp/vp/1")


def spec(**keys: Any) -> EngineSpec:  # noqa: ANN401 - TOML values
    """An engine's keys."""
    return EngineSpec.model_validate({"model": "org/m", **keys})


def test_the_command_line_is_command_model_daemon_options_keys_and_args() -> None:
    """In this order, so that `ps` reads well and nothing of the user's comes before the model."""
    full = spec(
        tensor_parallel_size=2,
        max_model_len="8k",
        dtype="auto",
        trust_remote_code=False,
        gpu_memory_utilization=0.5,
        devices=[0, 1],
        env={"A": "1"},
        args={"kv-cache-dtype": "fp8"},
    )
    assert argv("chat", full, ["vllm", "serve"], PLACE) == [
        "vllm",
        "serve",
        "org/m",
        "--host=127.0.0.1",
        "--port=8005",
        "--served-model-name",
        "chat",
        "chat/1-own",
        f"--shutdown-timeout={ENGINE_SHUTDOWN_SECONDS}",
        "--tensor-parallel-size=2",
        "--max-model-len=8k",
        "--dtype=auto",
        "--no-trust-remote-code",
        "--gpu-memory-utilization=0.5",
        "--disable-access-log-for-endpoints=/health,/metrics,/v1/models",
        "--kv-cache-dtype=fp8",
    ]


def test_an_engine_at_a_unix_socket_is_told_the_socket_alone() -> None:
    """With a port beside it vLLM would not know which one is meant."""
    line = argv("chat", spec(), ["vllm", "serve"], replace(PLACE, address=UnixAddress("/run/x.sock")))
    assert line[2:5] == ["org/m", "--uds=/run/x.sock", "--served-model-name"]


def test_what_is_not_given_is_not_passed() -> None:
    """vLLM decides on every key that the file leaves out."""
    line = argv("chat", spec(), ["vllm", "serve"], PLACE)
    assert [token.partition("=")[0] for token in line if token.startswith("--")] == [
        "--host",
        "--port",
        "--served-model-name",
        "--shutdown-timeout",
        "--disable-access-log-for-endpoints",
    ]


@pytest.mark.parametrize(
    ("key", "value", "token"),
    [
        ("tensor_parallel_size", 2, "--tensor-parallel-size=2"),
        ("pipeline_parallel_size", 3, "--pipeline-parallel-size=3"),
        ("max_model_len", 8192, "--max-model-len=8192"),
        ("max_model_len", "auto", "--max-model-len=auto"),
        ("dtype", "half", "--dtype=half"),
        ("quantization", "awq", "--quantization=awq"),
        ("trust_remote_code", True, "--trust-remote-code"),
        ("gpu_memory_utilization", 1.0, "--gpu-memory-utilization=1.0"),
        ("max_num_seqs", 256, "--max-num-seqs=256"),
    ],
)
def test_each_engine_key_is_the_option_of_its_name(key: str, value: object, token: str) -> None:
    """A key of the contract is vLLM's option with dashes."""
    assert token in argv("chat", spec(**{key: value}), ["vllm", "serve"], PLACE)


@pytest.mark.parametrize(
    ("command", "start"),
    [
        (["podman", "run", "img", "{model}", "-x"], ["podman", "run", "img", "org/m", "-x", "--host=127.0.0.1"]),
        (["sh", "-c", 'exec v "{model}" "$@"'], ["sh", "-c", 'exec v "org/m" "$@"', "--host=127.0.0.1"]),
        (["py", "-m", "vllm.x.api_server"], ["py", "-m", "vllm.x.api_server", "--model", "org/m", "--host=127.0.0.1"]),
        (["/opt/vllm", "serve"], ["/opt/vllm", "serve", "org/m", "--host=127.0.0.1"]),
    ],
)  # fmt: skip
def test_the_command_says_where_the_model_goes(command: list[str], start: list[str]) -> None:
    """At "{model}", as `--model` of an api_server module, else behind the command."""
    assert argv("chat", spec(), command, PLACE)[: len(start)] == start


def test_the_users_quiet_endpoints_replace_ours() -> None:
    """The one option that the daemon sets without owning it."""
    line = argv("chat", spec(args={"disable-access-log-for-endpoints": "/x"}), ["vllm", "serve"], PLACE)
    assert [token for token in line if "access-log" in token] == ["--disable-access-log-for-endpoints=/x"]


@pytest.mark.parametrize(
    "name",
    "VLLM_PROXY_PORT VLLM_PROXY_API_KEY VLLM_PROXY_ADMIN_KEY CREDENTIALS_DIRECTORY "
    "NOTIFY_SOCKET LISTEN_FDS LISTEN_PID WATCHDOG_USEC VLLM_PORT VLLM_HOST_IP VLLM_DP_RANK MASTER_ADDR "
    "MASTER_PORT RANK LOCAL_RANK WORLD_SIZE PROMETHEUS_MULTIPROC_DIR".split(),
)
def test_what_would_mislead_an_engine_is_not_inherited(name: str) -> None:
    """The daemon's settings and systemd's variables stay with it; a model may set the name on purpose."""
    assert name not in environment({name: "x", "PATH": "/bin"}, {}, PLACE)
    assert environment({name: "x"}, {name: "y"}, PLACE)[name] == "y"


@pytest.mark.parametrize(
    "name", ["PATH", "HF_TOKEN", "VLLM_USE_V1", "RANKING", "MY_VLLM_PORT", "VLLM_PORTS", "HTTP_PROXY"]
)
def test_everything_else_is_inherited(name: str) -> None:
    """A proxy, a token, vLLM's own switches reach the engine."""
    assert environment({name: "x"}, {}, PLACE)[name] == "x"


def test_the_models_environment_beats_the_inherited_one_and_the_defaults() -> None:
    """Inherited values beat our defaults, the model's beat both."""
    inherited = {"VLLM_LOGGING_COLOR": "1", "TMPDIR": "/elsewhere", "A": "1", "B": "1"}
    env = environment(inherited, {"A": "2", "PYTHONUNBUFFERED": "0"}, PLACE)
    assert (env["A"], env["B"], env["VLLM_LOGGING_COLOR"], env["PYTHONUNBUFFERED"]) == ("2", "1", "1", "0")
    assert env["TMPDIR"] == PLACE.folder
    assert environment({}, {"TMPDIR": "/mine"}, PLACE)["TMPDIR"] == "/mine"


def test_engines_do_not_tell_when_each_counter_was_made_unless_they_are_to() -> None:
    """A fifth of what a scrape would read."""
    name = "PROMETHEUS_DISABLE_CREATED_SERIES"
    assert (environment({}, {}, PLACE)[name], environment({}, {name: "0"}, PLACE)[name]) == ("true", "0")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VLLM_API_KEY", "secret"),
        ("VLLM_RPC_BASE_PATH", "/tmp/vp/1"),
        ("ENGINE_INSTANCE", "chat/1.2bb80d537b1da3e3"),
        ("SPT_NOENV", "1"),
        ("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75"),
    ],
)
def test_what_the_daemon_relies_on_cannot_be_set(name: str, value: str) -> None:
    """Neither the environment nor a model's `env` can change the credential, the sockets and the marks of an engine."""
    assert environment({name: "x"}, {name: "y"}, PLACE)[name] == value


@pytest.mark.parametrize(
    ("devices", "value"), [([0], "0"), ([3, 1], "3,1"), (["GPU-8a5c", "MIG-1"], "GPU-8a5c,MIG-1"), ([], "")]
)
def test_devices_are_what_cuda_shows(devices: list[int | str], value: str) -> None:
    """The key beats every other CUDA_VISIBLE_DEVICES; an empty list hides all GPUs."""
    given = spec(devices=devices, env={"CUDA_VISIBLE_DEVICES": "8"})
    place = replace(PLACE, allocation=allocation_for(given, {}))
    env = environment({"CUDA_VISIBLE_DEVICES": "7"}, given.variables, place)
    assert env["CUDA_VISIBLE_DEVICES"] == value


def test_without_devices_the_environment_stays_as_it_is() -> None:
    """An absent key adds no CUDA_VISIBLE_DEVICES and removes none."""
    assert "CUDA_VISIBLE_DEVICES" not in environment({}, {}, PLACE)
    assert environment({"CUDA_VISIBLE_DEVICES": "7"}, {}, PLACE)["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize(
    ("keys", "inherited", "expected"),
    [
        ({}, {}, {"0"}),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {}, {"0", "1", "2", "3"}),
        ({"devices": [5, "GPU-a"]}, {"CUDA_VISIBLE_DEVICES": "1"}, {"5", "GPU-a"}),
        ({"devices": []}, {}, set()),
        ({}, {"CUDA_VISIBLE_DEVICES": " 4, 5"}, {"4"}),
        ({"tensor_parallel_size": 2}, {"CUDA_VISIBLE_DEVICES": "4,5,6"}, {"4", "5"}),
        ({"env": {"CUDA_VISIBLE_DEVICES": "2"}}, {"CUDA_VISIBLE_DEVICES": "1"}, {"2"}),
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, set()),
    ],
)
def test_an_engine_uses_the_first_visible_gpus(
    keys: dict[str, Any], inherited: dict[str, str], expected: set[str]
) -> None:
    """As many as its parallel sizes ask for, from what it is shown."""
    assert allocation_for(spec(**keys), inherited).devices == expected


SLEEPER = replace(PLACE, address=UnixAddress("/tmp/vp/1/http.sock"), may_sleep=True)


@pytest.mark.parametrize(
    ("level", "unified", "expected"), [(None, False, False), (1, False, True), (1, True, False), (2, True, True)]
)
def test_nobody_keeps_weights_in_the_memory_that_they_are_in(
    level: int | None, *, unified: bool, expected: bool
) -> None:
    """Level 1 on unified memory frees nothing, and waking takes the machine down; level 2 keeps nothing."""
    assert may_sleep(spec(sleep=level), Allocation({"0": 5}, unified=unified)) is expected


@pytest.mark.parametrize(
    ("allocation", "flag"),
    [
        (Allocation({"0": 5}), ["--enable-sleep-mode"]),
        (unmanaged(["0"]), ["--enable-sleep-mode"]),
        (Allocation({"cpu": 5}, gpus=False), []),
        (NO_DEVICES, []),
        (Allocation(visible=()), []),
    ],
)
def test_an_engine_that_may_sleep_is_told_so_on_gpus(allocation: Allocation, flag: list[str]) -> None:
    """Without one vLLM refuses to start with that option; the routes alone pause it."""
    line = argv("chat", spec(sleep=1), ["vllm", "serve"], replace(SLEEPER, allocation=allocation))
    assert [token for token in line if "sleep" in token] == flag
    assert [token for token in line if token.startswith(("--uds", "--host", "--port"))] == ["--uds=/tmp/vp/1/http.sock"]
    other = argv("chat", spec(), ["vllm", "serve"], replace(PLACE, allocation=allocation))
    assert [token for token in other if "sleep" in token] == []


def test_an_engine_that_may_sleep_has_the_routes_for_it() -> None:
    """Whatever `env` says; no other engine has them from the daemon."""
    assert environment({}, {"VLLM_SERVER_DEV_MODE": "0"}, SLEEPER)["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in environment({}, {}, PLACE)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_pinned_memory_is_not_rounded_up_unless_the_user_has_settings_of_his_own(name: str) -> None:
    """One of PyTorch's names for them would make it ignore the other ones."""
    ours = {"PYTORCH_ALLOC_CONF": "pinned_max_round_threshold_mb:64"}
    assert environment({}, {}, SLEEPER).items() >= ours.items()
    for env in (environment({name: "x"}, {}, SLEEPER), environment({}, {name: "x"}, SLEEPER)):
        assert {key: value for key, value in env.items() if key.endswith("ALLOC_CONF")} == {name: "x"}
    assert "PYTORCH_ALLOC_CONF" not in environment({}, {}, PLACE)


def test_an_engine_for_adapters_is_started_with_room_for_them() -> None:
    """And with the routes to load them; another room is another engine."""
    plain, able = spec(), spec().model_copy(update={"lora": Lora(64, 2, 16)})
    assert [word for word in argv("chat", able, ["vllm", "serve"], PLACE) if "lora" in word] == [
        "--enable-lora", "--max-lora-rank=64", "--max-loras=2", "--max-cpu-loras=16",
    ]  # fmt: skip
    assert not [word for word in argv("chat", plain, ["vllm", "serve"], PLACE) if "lora" in word]
    variable = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    assert environment({}, {variable: "0"}, PLACE, takes_adapters=True)[variable] == "1"
    assert variable not in environment({}, {}, PLACE)
    assert len({fingerprint(one, "/x") for one in (plain, able, able.model_copy(update={"lora": Lora(8, 2, 16)}))}) == 3
