"""The meaning of models.toml, and every problem in it."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.config import Config, ModelSpec, Server, revision_of
from vllm_proxy.domain.file.parse import Override, merge, parse_config
from vllm_proxy.errors import ConfigError

CHAT = '[models.chat]\nmodel = "org/m"\n'


def parse(text: str, **overrides: Override) -> Config:
    """The configuration that a text means."""
    return parse_config(text.encode(), "models.toml", overrides)


def chat(text: str) -> ModelSpec:
    """The model `chat`, with more lines in its table."""
    return parse(CHAT + text).models["chat"]


def problems(text: str | bytes, **overrides: Override) -> list[str]:
    """Each problem as it is printed, without the file's name."""
    data = text.encode() if isinstance(text, str) else text
    with pytest.raises(ConfigError) as raised:
        parse_config(data, "models.toml", overrides)
    return [line.removeprefix("models.toml:") for line in raised.value.lines()]


def refusal(data: bytes, **overrides: Override) -> ConfigError | None:
    """Why bytes are no configuration; None where they are one."""
    try:
        parse_config(data, "f", overrides)
    except ConfigError as error:
        return error
    return None


def test_an_empty_file_is_valid() -> None:
    """No models are a fleet too, with all defaults of the contract."""
    config = parse("")
    assert config.models == {}
    assert config.server.model_dump() == {
        "host": "127.0.0.1",
        "port": 8000,
        "listen": (),
        "tls_cert": None,
        "tls_key": None,
        "keys_file": None,
        "cors_origins": (),
        "allowed_hosts": (),
        "allow_remote_admin": False,
        "max_body_size": 67108864,
        "max_buffered": 2**30,
        "max_connections": 0,
        "head_timeout": 30.0,
        "body_timeout": 60.0,
        "shutdown_timeout": 30.0,
        "usage": False,
        "fair": False,
        "on_exit": "stop",
    }
    assert config.engine.model_dump() == {"command": None, "port_start": 8001, "port_end": 8899, "env": {}}


def test_a_model_needs_no_more_than_its_model() -> None:
    """Engine keys that are not given are null, policy keys have the contract's defaults."""
    spec = chat("")
    assert spec.written == {"model": "org/m"}
    assert spec.effective() == {
        "model": "org/m",
        "tensor_parallel_size": None,
        "pipeline_parallel_size": None,
        "max_model_len": None,
        "dtype": None,
        "quantization": None,
        "trust_remote_code": None,
        "gpu_memory_utilization": None,
        "memory": None,
        "max_num_seqs": None,
        "sleep": None,
        "devices": None,
        "command": None,
        "env": {},
        "args": {},
        "description": "",
        "metadata": {},
        "aliases": [],
        "enabled": True,
        "replicas": 1,
        "balance": "prefix",
        "start": "always",
        "priority": 0,
        "yield_timeout": 300.0,
        "idle_timeout": 900.0,
        "startup_timeout": 600.0,
        "drain_timeout": 60.0,
        "stop_timeout": 30.0,
        "stall_timeout": 300.0,
        "replace": "auto",
        "request_timeout": 0.0,
        "max_in_flight": 0,
        "queue_size": 512,
        "queue_timeout": 600.0,
        "moderate": False,
        "restart": {"max_failures": 5, "backoff": 1.0, "max_backoff": 60.0},
        "adapters": {},
        "adapters_max": {"rank": None, "loras": None, "cpu_loras": None},
    }


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("max_model_len = 8192", "max_model_len", 8192),
        ('max_model_len = "8k"', "max_model_len", "8k"),
        ('max_model_len = "auto"', "max_model_len", "auto"),
        ("gpu_memory_utilization = 1", "gpu_memory_utilization", 1.0),
        ('devices = [0, "GPU-8a5c"]', "devices", [0, "GPU-8a5c"]),
        ("env = { OMP_NUM_THREADS = 1, X = 1.5 }", "env", {"OMP_NUM_THREADS": "1", "X": "1.5"}),
        ("args = { hf_overrides = { a_b = 1 } }", "args", {"hf-overrides": {"a_b": 1}}),
        ("args.compilation_config.level = 3", "args", {"compilation-config": {"level": 3}}),
        ('metadata = { any = ["thing", { a = 1 }] }', "metadata", {"any": ["thing", {"a": 1}]}),
        ('aliases = ["gpt-4o-mini", "org/x:1@b"]', "aliases", ["gpt-4o-mini", "org/x:1@b"]),
        ('idle_timeout = "1h30m"', "idle_timeout", 5400.0),
        ("stall_timeout = 0", "stall_timeout", 0.0),
        ('command = ["/opt/v", "serve"]', "command", ["/opt/v", "serve"]),
    ],
)
def test_a_value_means_what_the_contract_says(line: str, key: str, value: object) -> None:
    """Numbers, strings, lists and tables come out with their units and names resolved."""
    assert chat(line).effective()[key] == value


@pytest.mark.parametrize("model_id", ["a", "A.b_c-1", "org/chat", "a:b@c", "stop/it", "restarts", "...", "x" * 200])
def test_an_id_of_the_allowed_letters_is_accepted(model_id: str) -> None:
    """Hugging Face names, tags and paths are ids."""
    assert list(parse(f'[models."{model_id}"]\nmodel = "x"').models) == [model_id]


@pytest.mark.parametrize(
    ("model_id", "message"),
    [
        ("", "1 to 200 letters"),
        ("-a", "does not begin with -"),
        ("x" * 201, "1 to 200 letters"),
        ("a b", "1 to 200 letters"),
        ("\\u00e4", "1 to 200 letters"),
        ("a\\nb", "1 to 200 letters"),
        ("a?b", "1 to 200 letters"),
        ("/", 'no empty, "." or ".." part'),
        ("a//b", 'no empty, "." or ".." part'),
        ("a/", 'no empty, "." or ".." part'),
        ("./a", 'no empty, "." or ".." part'),
        ("a/../b", 'no empty, "." or ".." part'),
        ("..", 'no empty, "." or ".." part'),
        *((f"a/{action}", f'may not end in "{action}"') for action in "start stop restart sleep wake logs".split()),
        ("start", 'may not end in "start"'),
    ],
)
def test_a_bad_id_is_refused_and_so_is_such_an_alias(model_id: str, message: str) -> None:
    """An id becomes a path of the REST API, so its parts must not mean something else there."""
    (found,) = problems(f'\n[models."{model_id}"]\nmodel = "x"')
    assert found.startswith("2: models.")
    assert message in found
    (found,) = problems(f'{CHAT}aliases = ["ok", "{model_id}"]')
    assert found.startswith("3: models.chat.aliases.1: ")
    assert message in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp = 2", "1: tp: unknown key; did you mean tensor_parallel_size?"),
        ("enable_sleep_mode = true",
         "1: enable_sleep_mode: --enable-sleep-mode belongs to the daemon: write sleep = 1 in the model's table"),
        ("sever.port = 1", "1: sever: unknown key; did you mean server?"),
        ("\nx = 1", "2: x: unknown key; expected one of server, engine, devices, defaults, models, keys, moderation"),
        ("[server]\nprot = 1", "2: server.prot: unknown key; did you mean port?"),
        ("[engine.x]", "1: engine.x: unknown key; expected one of command, port_start, port_end, env"),
        ("[engine]\nport_begin = 1", "2: engine.port_begin: unknown key; did you mean port_end?"),
        ("[defaults]\nreplica = 1", "2: defaults.replica: unknown key; did you mean replicas?"),
        ("[defaults.restart]\nback = 1", "2: defaults.restart.back: unknown key; did you mean backoff?"),
        (f"{CHAT}max-model-len = 1", "3: models.chat.max-model-len: unknown key; did you mean max_model_len?"),
        (f"{CHAT}zzz = 1", "3: models.chat.zzz: unknown key; an option of vLLM itself goes into args"),
        (f"{CHAT}port = 1", ("3: models.chat.port: --port belongs to the daemon: write port in [server], "
         "where clients come in; engines get ports of their own")),
        ("[defaults]\napi-key = 'x'",
         "2: defaults.api-key: --api-key belongs to the daemon: `vllm-proxy keys add` writes one"),
        (f"{CHAT}hf_token = 'x'",
         '3: models.chat.hf_token: `ps` would show it: write env.HF_TOKEN = { file = "..." } in the model\'s table'),
        (f"{CHAT}enable-lora = true", ("3: models.chat.enable-lora: the daemon gives it to models that have adapters: "
         'write [models.ID.adapters.NAME] with path = "a folder, or a hub id"')),
        (f"{CHAT}lora_modules = ['sql=/sql']", ("3: models.chat.lora_modules: clients could not ask for these: "
         'write [models.ID.adapters.sql] with path = "/sql" instead')),
        (f"{CHAT}tp = 2", "3: models.chat.tp: unknown key; did you mean tensor_parallel_size?"),
        (f"{CHAT}dp = 2", "3: models.chat.dp: unknown key; did you mean args.data_parallel_size?"),
        (f"{CHAT}device_memory_utilization = 0.5",
         "3: models.chat.device_memory_utilization: unknown key; did you mean gpu_memory_utilization?"),
        (f"{CHAT}data_parallel_size = 2",
         "3: models.chat.data_parallel_size: unknown key; an option of vLLM itself goes into args"),
        (f"{CHAT}keep_alive = '5m'", "3: models.chat.keep_alive: unknown key; did you mean idle_timeout?"),
        (f"{CHAT}ttl = 300", "3: models.chat.ttl: unknown key; did you mean idle_timeout?"),
        *((f"{CHAT}{key} = 4096", f"3: models.chat.{key}: unknown key; did you mean max_model_len?")
          for key in ("context_length", "n_ctx", "num_ctx", "ctx_size")),
        (f"{CHAT}[models.chat.restart]\nmax_failure = 1",
         "4: models.chat.restart.max_failure: unknown key; did you mean max_failures?"),
        (f"{CHAT}restart = {{ zzz = 1 }}",
         "3: models.chat.restart.zzz: unknown key; expected one of max_failures, backoff, max_backoff"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_an_error_that_names_the_nearest_known_one(text: str, expected: str) -> None:
    """At every level; where nothing is near, it says what there is."""
    assert problems(text) == [expected]


@pytest.mark.parametrize("model", ["", "replicas = 2", "[models.chat.args]\nseed = 1"])
def test_a_missing_model_is_told_at_its_table(model: str) -> None:
    """`model` is the only required key; without it there is no line but the table's."""
    text = f"\n[models.chat]\n{model}" if "[" not in model else f"\n{model}"
    assert problems(text) == [
        '2: models.chat.model: missing: every model needs model = "a Hugging Face id, path or URL"'
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model = 5", "model: expected a string, got 5"),
        ('model = ""', 'model: expected a string that is not empty, got ""'),
        ('model = "a\\u0000b"',
         "model: expected text without NUL characters, which no command line or environment can hold"),
        ('model = "--help"', 'model: expected a model, got "--help", which vLLM would take for an option'),
        ("replicas = 0", "replicas: expected at least 1, got 0"),
        ("replicas = 1.0", "replicas: expected a whole number, got 1.0"),
        ("replicas = true", "replicas: expected a whole number, got true"),
        ('replicas = "2"', 'replicas: expected a whole number, got "2"'),
        ("replicas = []", "replicas: expected a whole number, got []"),
        ("enabled = 1", "enabled: expected true or false, got 1"),
        ('enabled = "true"', 'enabled: expected true or false, got "true"'),
        ("gpu_memory_utilization = 0", "gpu_memory_utilization: expected more than 0.0, got 0"),
        ("gpu_memory_utilization = 1.1", "gpu_memory_utilization: expected at most 1.0, got 1.1"),
        ("gpu_memory_utilization = nan", "gpu_memory_utilization: expected at most 1.0, got nan"),
        ('gpu_memory_utilization = "0.9"', 'gpu_memory_utilization: expected a number, got "0.9"'),
        ("max_model_len = 0", 'max_model_len: expected a number of tokens such as 8192, "8k" or "auto", got 0'),
        ("max_model_len = true", 'max_model_len: expected a number of tokens such as 8192, "8k" or "auto", got true'),
        ('max_model_len = "8 k"', 'max_model_len: expected a number of tokens such as 8192, "8k" or "auto", got "8 k"'),
        ('start = "on_demand"', 'start: expected one of "always", "warm", "on-demand", got "on_demand"'),
        ('dtype = "int8"',
         'dtype: expected one of "auto", "half", "float16", "bfloat16", "float", "float32", got "int8"'),
        ('dtype = "a\\nb"',
         'dtype: expected one of "auto", "half", "float16", "bfloat16", "float", "float32", got "a\\nb"'),
        ("replace = true", 'replace: expected one of "auto", "surge", "drain", got true'),
        ('queue_timeout = "5"', 'queue_timeout: expected a duration such as 90, "90s", "5m" or "1h30m", got "5"'),
        ("queue_timeout = -1", 'queue_timeout: expected a duration such as 90, "90s", "5m" or "1h30m", got -1'),
        ("queue_size = -1", "queue_size: expected at least 0, got -1"),
        ("devices = 0", "devices: expected a list, got 0: write [0]"),
        ("devices = true", "devices: expected a list, got true"),
        ('devices = "0, 1"', 'devices: expected a list, got "0, 1": write [0, 1]'),
        ('devices = "GPU-a"', 'devices: expected a list, got "GPU-a": write ["GPU-a"]'),
        ('devices = ""', 'devices: expected a list, got ""'),
        ("devices = [true]", "devices.0: expected a GPU index or UUID, got true"),
        ("devices = [0, -1]", "devices.1: expected a GPU index or UUID, got -1"),
        ('devices = ["0,1"]', 'devices.0: expected a GPU index or UUID, got "0,1"'),
        ('devices = [0, "0"]', "devices: expected each device once"),
        ('command = "vllm serve"', 'command: expected a list, got "vllm serve": write ["vllm", "serve"]'),
        ("command = []", "command: expected at least one item, got []"),
        ('command = ["vllm", ""]', 'command.1: expected a string that is not empty, got ""'),
        ('aliases = "x"', 'aliases: expected a list, got "x"'),
        ("aliases = [1]", "aliases.0: expected a string, got 1"),
        ("env = 1", "env: expected a table, got 1"),
        ("env = { A = true }", "env.A: expected a string, got true"),
        ("env = { A = [1] }", "env.A: expected a string, got a list"),  # never what it holds: it may be a credential
        ('env = "HF_TOKEN=hf_x"', "env: expected a table, got a string"),
        ('env = { A = "\\u0000" }',
         "env.A: expected text without NUL characters, which no command line or environment can hold"),
        ('env = { "A=B" = "1" }', 'env."A=***": cannot name an environment variable "A=***"'),
        ('env = { "" = "1" }', 'env."": cannot name an environment variable ""'),
        ("metadata = []", "metadata: expected a table, got []"),
        ("restart = 5", "restart: expected a table, got 5"),
        ("restart = { max_failures = 0 }", "restart.max_failures: expected at least 1, got 0"),
        ("args = 5", "args: expected a table, got 5"),
        ('args = ["--seed=1"]', ('args: expected a table, got ["--seed=1"]: '
         'write args = { kv_cache_dtype = "fp8", max_num_batched_tokens = 8192 }')),
        ('args = "--seed 1"', ('args: expected a table, got "--seed 1": '
         'write args = { kv_cache_dtype = "fp8", max_num_batched_tokens = 8192 }')),
        ("args = { headless = true }", "args.headless: --headless belongs to the daemon and cannot be set"),
        ("args = { enable_lora = true, lora_modules = ['sql=/srv/lora/sql'] }",
         ("args.lora_modules: clients could not ask for these: "
         'write [models.ID.adapters.sql] with path = "/srv/lora/sql" instead')),
        ("args = { -tp = 2 }",
         "args.-tp: unknown option; did you mean tensor_parallel_size, which is written outside args?"),
        ("args = { max_num_seqs = 1 }", "args.max_num_seqs: has a key of its own: write max_num_seqs outside args"),
        ("args = { a_date = 1979-05-27 }",
         "args.a_date: expected a string, number, boolean, list or table, got 1979-05-27"),
        ("args = { x_y = 1, x-y = 2 }", 'args.x-y: the same option as "x_y"; keep one of them'),
        ("args = { x_y = 1, no_x_y = true }", 'args.no_x_y: the same option as "x_y"; keep one of them'),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_once_with_its_line(line: str, message: str) -> None:
    """In a model as in the defaults, the message says what was expected and what is there, in one line."""
    before = "" if line.startswith("model =") else 'model = "x"'
    assert problems(f"[models.chat]\n{before}\n{line}") == [f"3: models.chat.{message}"]
    two_models = '\n[models.a]\nmodel = "x"\n[models.b]\nmodel = "y"'
    inherited = "\n[models.a]\n[models.b]" if line.startswith("model =") else two_models
    assert problems(f"[defaults]\n{line}{inherited}") == [f"2: defaults.{message}"]
    assert problems(f"[defaults]\n{line}") == [f"2: defaults.{message}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server = 5", "1: server: expected a table, got 5"),
        ("[[server]]", "1: server: expected a table, got [{}]"),
        ("engine = 'x'", '1: engine: expected a table, got "x"'),
        ("defaults = []", "1: defaults: expected a table, got []"),
        ("models = true", "1: models: expected a table, got true"),
        ("[[models]]", "1: models: expected a table, got [{}]: write [models.NAME]"),
        ("devices = '0'", '1: devices: expected a table, got "0"'),
        ("\n[models]\nchat = 'x'", '3: models.chat: expected a table: write [models.chat] with model = "..."'),
        ("models.'a/b' = 1", '1: models."a/b": expected a table: write [models."a/b"] with model = "..."'),
        ("[[models.chat]]", '1: models.chat: expected a table: write [models.chat] with model = "..."'),
        ("[server]\nport = 0", "2: server.port: expected at least 1, got 0"),
        ("[server]\nport = 65536", "2: server.port: expected at most 65535, got 65536"),
        ("[server]\nhost = ''", '2: server.host: expected a string that is not empty, got ""'),
        ("[server]\ncors_origins = '*'", '2: server.cors_origins: expected a list, got "*"'),
        ("[server]\nmax_body_size = '1 mb'",
         '2: server.max_body_size: expected a size such as 1048576 or "64MiB", got "1 mb"'),
        ("[server]\non_exit = 'leave'", '2: server.on_exit: expected one of "stop", "keep", got "leave"'),
        ("[engine]\ncommand = 'vllm serve'",
         '2: engine.command: expected a list, got "vllm serve": write ["vllm", "serve"]'),
        ("[engine.env]\nA = true", "2: engine.env.A: expected a string, got true"),
        ("[engine]\nport_start = 9\nport_end = 8", "3: engine.port_end: expected at least port_start (9), got 8"),
        ("[engine]\nport_start = 9000", "1: engine.port_end: expected at least port_start (9000), got 8899"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_told_with_its_line(text: str, expected: str) -> None:
    """The other tables are checked as the models are."""
    assert problems(text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[models.Qwen2.5-7B]\nmodel = "x"',
         ['1: models.Qwen2.5-7B: an id with a dot needs quotes: write [models."Qwen2.5-7B"]']),
        ('\n[models.Qwen2.5-VL-7B.1]\nmodel = "x"\n[models.gpt-4.1.args]\nseed = 1',
         ['2: models.Qwen2.5-VL-7B.1: an id with a dot needs quotes: write [models."Qwen2.5-VL-7B.1"]',
          '4: models.gpt-4.1: an id with a dot needs quotes: write [models."gpt-4.1"]']),
        ('[models.v1]\nmodel = "x"\n[models.v1.5]\nmodel = "y"',
         ['3: models.v1.5: an id with a dot needs quotes: write [models."v1.5"]']),
        ("[models.Qwen2.5-7B]", ['1: models.Qwen2.5-7B: an id with a dot needs quotes: write [models."Qwen2.5-7B"]']),
        ('[models]\nQwen2.5-7B = { model = "x" }',
         ['2: models.Qwen2.5-7B: an id with a dot needs quotes: write [models."Qwen2.5-7B"]']),
        ('[models.chat]\nmodel = "x"\n[models.chat.arg]\nseed = 1',
         ["3: models.chat.arg: unknown key; did you mean args?"]),
        ("[models.chat.arg]\nseed = 1",
         ["1: models.chat.arg: unknown key; did you mean args?",
          '1: models.chat.model: missing: every model needs model = "a Hugging Face id, path or URL"']),
    ],
)  # fmt: skip
def test_an_id_with_a_dot_and_no_quotes_is_explained(text: str, expected: list[str]) -> None:
    """TOML takes it for tables in each other; the mistake is told once, and no other problem that follows from it."""
    assert problems(text) == expected


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("[models.Qwen/Qwen3-0.6B]",
         'an id with other characters than letters, digits, _ and - needs quotes: write [models."Qwen/Qwen3-0.6B"]'),
        ("  [ models.org:7b.args ] # mine",
         'an id with other characters than letters, digits, _ and - needs quotes: write [models."org:7b".args]'),
        ("[models.my chat]", '"my chat": expected an id of 1 to 200 letters, digits and . _ : @ / -'),
        ('org/chat = { model = "x" }',
         'a key with other characters than letters, digits, _ and - needs quotes: write "org/chat" ='),
        ("model = Qwen/Qwen3-0.6B", 'text needs quotes: write model = "Qwen/Qwen3-0.6B"'),
        ("max_model_len = 8k # tokens", 'text needs quotes: write max_model_len = "8k"'),
        ("idle_timeout = 5m", 'text needs quotes: write idle_timeout = "5m"'),
        ("aliases = [gpt-4o, 'b']", 'text needs quotes: "gpt-4o"'),
        ("enabled = True", "write enabled = true"),
        ("enabled = off", "write enabled = false"),
        ("model = # which one?", "model has no value: write one, or leave model out"),
        ("dtype = None", "there is no such value: leave dtype out"),
        ("replicas: 2", "write replicas = 2"),
        ("models:", "this is TOML, not YAML: write [models]"),
    ],
)  # fmt: skip
def test_what_is_no_toml_is_told_with_what_was_probably_meant(line: str, hint: str) -> None:
    """Behind Python's own words, at its line."""
    (found,) = problems(f"# first\n{line}\n")
    assert found.startswith("2: this is no TOML: ")
    assert found.endswith(f"; {hint}")


@pytest.mark.parametrize("line", ["a = 1 b = 2", "[models.chat", "= 1", 'a = "x', "a = [1", "[models.a]]", "x" * 1000])
def test_what_cannot_be_guessed_is_not_guessed(line: str) -> None:
    """Python's own words have to do."""
    (found,) = problems(line)
    assert found.startswith("1: this is no TOML: ")
    assert ";" not in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[model.chat]\nmodel = "x"', "1: model: unknown table; a model has one of its own: write [models.chat]"),
        ('[Models."a/b"]\nmodel = "x"', '1: Models: unknown table; a model has one of its own: write [models."a/b"]'),
        ('[chat]\nmodel = "x"', "1: chat: unknown table; a model has one of its own: write [models.chat]"),
        ("[default]\nreplicas = 1", "1: default: unknown key; did you mean defaults?"),
        ('model = "x"',
         "1: model: unknown key; model belongs into the table of a model, such as [models.chat], or into [defaults]"),
        ("[models.chat]\nmodel = 'x'\n[models.chat.aliases]\ngpt-4.1 = true",
         '3: models.chat.aliases: expected a list, got {"gpt-4": {"1": true}}'),
    ],
)  # fmt: skip
def test_a_table_in_the_wrong_place_is_told_with_the_right_one(text: str, expected: str) -> None:
    """With the header to write."""
    assert problems(text) == [expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('host = "localhost:8000"', 'host: expected "localhost", without port and brackets, got "localhost:8000"'),
        ('host = "[::1]:80"', 'host: expected "::1", without port and brackets, got "[::1]:80"'),
        ('host = "http://a.example"', 'host: expected an address or a name of a machine, got the URL "http://a.example"'),
        ('host = "*"', 'host: expected the address or the name of one machine, without *, got "*"'),
        ('host = "my host"',
         'host: expected an address or a name such as "127.0.0.1", "::" or "gpu.example.org", got "my host"'),
        ('host = "127.0.0.256"',
         'host: expected an address or a name such as "127.0.0.1", "::" or "gpu.example.org", got "127.0.0.256"'),
        ('allowed_hosts = ["a", "b:80"]', 'allowed_hosts.1: expected "b", without port and brackets, got "b:80"'),
        ('allowed_hosts = ["*.lan"]',
         'allowed_hosts.0: expected the address or the name of one machine, without *, got "*.lan"'),
        ('cors_origins = ["https://ui.lan/"]',
         'cors_origins.0: expected an origin as browsers send it, "https://ui.lan", got "https://ui.lan/"'),
        ('cors_origins = ["https://UI.lan:443/app"]',
         'cors_origins.0: expected an origin as browsers send it, "https://ui.lan", got "https://UI.lan:443/app"'),
        ('cors_origins = ["https://ui.lan:443"]',
         'cors_origins.0: expected "https://ui.lan", since browsers leave out port 443, got "https://ui.lan:443"'),
        ('cors_origins = ["http://ui.lan:70000"]',
         'cors_origins.0: expected a port of at most 65535, got "http://ui.lan:70000"'),
        ('cors_origins = ["ui.lan"]',
         'cors_origins.0: expected "*" or an origin such as "https://ui.example.org", got "ui.lan"'),
        ('cors_origins = ["https://*.lan"]',
         'cors_origins.0: expected "*" or an origin such as "https://ui.example.org", got "https://*.lan"'),
        ('cors_origins = [""]', 'cors_origins.0: expected a string that is not empty, got ""'),
    ],
)  # fmt: skip
def test_a_host_or_an_origin_that_cannot_work_is_refused(line: str, message: str) -> None:
    """Nothing could listen there, or no client would ever send it; the message has the spelling that works."""
    assert problems(f"[server]\n{line}") == [f"2: server.{message}"]


@pytest.mark.parametrize(
    "line",
    [
        *(f'host = "{host}"' for host in ("::", "fe80::1%eth0", "0.0.0.0", "gpu-7.example.org.", "a_b", "b\u00fccher")),
        'allowed_hosts = ["Proxy.LAN", "192.168.0.7", "fd00::7", "proxy"]',
        'cors_origins = ["*"]',
        'cors_origins = ["null", "http://localhost:3000", "http://[::1]:8080", "https://a.example:8443"]',
        'cors_origins = ["tauri://localhost", "app://obsidian.md", "vscode-webview://1-2", "chrome-extension://abc"]',
    ],
)
def test_a_host_or_an_origin_that_may_work_is_taken(line: str) -> None:
    """Addresses, names, and what browsers and programs with a browser in them send."""
    assert refusal(f"[server]\n{line}".encode()) is None


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\n\nx = '\xff'", "3: expected UTF-8, got other bytes"),
        ("models = {}".encode("utf-16"), "1: expected UTF-8, got other bytes"),
        (b"\xef\xbb\xbf[models]", "1: expected UTF-8 without a byte order mark"),
        (b"a = 1\nb = '\0'", "2: this is no TOML: Found invalid character '\\x00'"),
        (b"a = 1\na = 2\n", "2: this is no TOML: Cannot overwrite a value"),
        (b"[a]\n[a]\n", "2: this is no TOML: Cannot declare ('a',) twice"),
        (b'a = """\n\n', "3: this is no TOML: Unterminated string"),
        (b"replicas", "1: this is no TOML: Expected '=' after a key in a key/value pair"),
        (b"a = 1\rb = 2", "1: this is no TOML: Expected newline or end of document after a statement"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, " cannot read this TOML: nested too deeply"),
        (b"a = " + b"9" * 5000, " cannot read this TOML: a number has too many digits"),
        (b"\nmodels." + b".".join([b"a"] * 48) + b".b = 1", "2: cannot read this TOML: a key has too many parts"),
        (b"\n[" + b".".join([b"a"] * 90_000) + b"]", "2: cannot read this TOML: a key has too many parts"),
        (b"a = {b = 1, " + b" . ".join([b'"\\"a"'] * 90_000) + b" = 1}",
         "1: cannot read this TOML: a key has too many parts"),
        (b"[models]\n" + b"a." * 40 + b"b." + b"c = {" + b"a." * 40 + b"a = 1}", "2: models.a.a: nested too deeply"),
        (b"\nmodels.a.metadata.a = " + b"[" * 100 + b"]" * 100, "2: models.a.metadata: nested too deeply"),
        (b"[server]\nport = 0x" + b"f" * 5000, "2: server.port: expected a whole number of at most 64 bits"),
        (b"\n[models.a.metadata]\nx = [1, 9223372036854775808]",
         "3: models.a.metadata.x: expected a whole number of at most 64 bits"),
    ],
)  # fmt: skip
def test_bytes_that_cannot_be_read_are_one_problem_with_a_line(data: bytes, expected: str) -> None:
    """Whatever the bytes, the answer is a sentence, never a traceback."""
    assert problems(data) == [expected]


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_bytes_make_parsing_fail_in_another_way(data: bytes) -> None:
    """There is a configuration or there are problems, and each problem is one line."""
    error = refusal(data)
    assert error is None or error.problems
    assert all(len(line.split("\n")) == 1 for line in (error.lines() if error else ()))


_anything = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.dates(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)


@given(st.sampled_from([*Server.model_fields, "nonsense"]), _anything)
def test_no_value_from_outside_makes_parsing_fail_in_another_way(key: str, value: object) -> None:
    """An override of any type is accepted or told, named by where it came from."""
    error = refusal(b"", **{key: Override(value, "SOURCE")})
    assert error is None or {(problem.line, problem.path) for problem in error.problems} == {(0, "SOURCE")}


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    """Whoever mends a file sees everything that is wrong with it, each at its own line."""
    text = """\
[server]
prot = 1
[engine]
port_start = "x"
[defaults]
replicas = 0
[defaults.args]
host = "x"
[models.a]
max_model_len = -1
[models.b]
model = "x"
aliases = ["a"]
[models.b.args]
lora_modules = []
Bad = 1
[models."c/stop"]
model = 5
"""
    assert [line.split(": ")[:2] for line in problems(text)] == [
        ["2", "server.prot"],
        ["4", "engine.port_start"],
        ["6", "defaults.replicas"],
        ["8", "defaults.args.host"],
        ["9", "models.a.model"],
        ["10", "models.a.max_model_len"],
        ["13", "models.b.aliases"],
        ["15", "models.b.args.lora_modules"],
        ["16", "models.b.args.Bad"],
        ["17", 'models."c/stop"'],
        ["18", 'models."c/stop".model'],
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ('["b"]', "[]", '3: models.a.aliases: "b" is taken by model "b"'),
        ('["a"]', "[]", '3: models.a.aliases: "a" is taken by model "a"'),
        ('["x", "x"]', "[]", '3: models.a.aliases: "x" is taken by model "a"'),
        ('["x"]', '["y", "x"]', '6: models.b.aliases: "x" is taken by model "a"'),
    ],
)
def test_a_name_is_given_once(first: str, second: str, expected: str) -> None:
    """Ids and aliases share one set of names, whichever model comes first."""
    text = f"[models.a]\nmodel = 'x'\naliases = {first}\n[models.b]\nmodel = 'x'\naliases = {second}\n"
    assert problems(text) == [expected]


def test_a_default_alias_for_two_models_is_told_at_the_defaults() -> None:
    """One model may inherit it; the second cannot."""
    text = "[defaults]\naliases = ['x']\n[models.a]\nmodel = 'x'\n"
    assert parse(text).models["a"].policy.aliases == ("x",)
    assert problems(text + "[models.b]\nmodel = 'x'") == ['2: defaults.aliases: "x" is taken by model "a"']


def test_a_model_overrides_its_defaults_key_by_key_at_every_depth() -> None:
    """Tables merge, everything else is replaced whole; what is written stays as it was written."""
    config = parse("""
[engine]
command = ["base"]
env = { A = "engine", B = "engine", C = "engine" }
[defaults]
replicas = 3
devices = [0, 1]
env = { B = "defaults", C = "defaults" }
restart = { max_failures = 9, backoff = "2s" }
args.hf_overrides = { deep = { a = 1, b = 1 }, list = [1, 2] }
[models.own]
model = "x"
replicas = 2
devices = [2]
command = ["own"]
env.C = "model"
restart.backoff = 7
args.hf_overrides = { deep = { b = 2 }, list = [3] }
[models.plain]
model = "y"
""")
    own, plain = config.models["own"], config.models["plain"]
    assert (own.policy.replicas, own.engine.devices, own.engine.command) == (2, (2,), ("own",))
    assert own.engine.env == {"A": "engine", "B": "defaults", "C": "model"}
    assert (own.policy.restart.max_failures, own.policy.restart.backoff) == (9, 7.0)
    assert own.engine.args == {"hf-overrides": {"deep": {"a": 1, "b": 2}, "list": [3]}}
    assert own.written["env"] == {"C": "model"}
    assert (plain.policy.replicas, plain.engine.devices, plain.engine.command) == (3, (0, 1), ("base",))
    assert plain.engine.env == {"A": "engine", "B": "defaults", "C": "defaults"}
    assert plain.written == {"model": "y"}


def test_a_models_spelling_of_an_option_overrides_the_defaults_spelling() -> None:
    """`a-b` in a model replaces `a_b` of the defaults: the option is not passed twice."""
    text = "[defaults.args]\nkv_cache_dtype = 'auto'\nseed = 1\n[models.a]\nmodel = 'x'\nargs.kv-cache-dtype = 'fp8'\n"
    model = parse(text).models["a"]
    assert model.engine.args == {"kv-cache-dtype": "fp8", "seed": 1}
    assert model.written["args"] == {"kv-cache-dtype": "fp8"}


def test_a_model_of_the_defaults_counts() -> None:
    """`[defaults]` may hold any model key, `model` too."""
    assert parse("[defaults]\nmodel = 'x'\n[models.a]\n").models["a"].engine.model == "x"


def test_a_models_good_value_does_not_hide_a_wrong_default() -> None:
    """The default is wrong for the next model even where this one does not use it."""
    text = "[defaults]\nreplicas = 0\nargs.x_y = []\n[models.a]\nmodel = 'x'\nreplicas = 1\nargs.x-y = [1]\n"
    assert problems(text) == [
        "2: defaults.replicas: expected at least 1, got 0",
        "3: defaults.args.x_y: expected at least one item",
    ]


def test_a_models_own_wrong_value_is_told_at_the_model() -> None:
    """A fine default does not take the blame, however the option is spelled there."""
    text = "[defaults]\nreplicas = 1\nargs.x_y = [1]\n[models.a]\nmodel = 'x'\nreplicas = 0\nargs.x-y = []\n"
    assert problems(text) == [
        "6: models.a.replicas: expected at least 1, got 0",
        "7: models.a.args.x-y: expected at least one item",
    ]


def test_an_option_twice_in_the_defaults_is_told_once() -> None:
    """Not again for each model, not even for one that gives the option itself."""
    text = "[defaults.args]\na_z = 1\na-z = 2\n[models.a]\nmodel = 'x'\n[models.b]\nmodel = 'x'\nargs.a_z = 1\n"
    assert problems(text) == ['3: defaults.args.a-z: the same option as "a_z"; keep one of them']


def test_a_port_is_needed_for_each_enabled_instance() -> None:
    """Two replicas do not fit on one port; a disabled model needs none."""
    text = "[models.a]\nmodel = 'x'\nreplicas = 2\n[models.b]\nmodel = 'x'\nenabled = {}\n[engine]\nport_end = 8002\n"
    assert parse(text.format("false")).engine.port_end == 8002
    assert problems(text.format("true")) == ["8: engine.port_end: expected a port for each of 3 instances, got 2 ports"]


def test_what_comes_from_outside_beats_the_file() -> None:
    """An override replaces the file's value, a wrong one included."""
    text = "[server]\nport = 'wrong'\nhost = '1.2.3.4'"
    server = parse(text, port=Override(9000, "--port")).server
    assert (server.port, server.host) == (9000, "1.2.3.4")


@pytest.mark.parametrize(
    ("key", "override", "expected"),
    [
        ("port", Override(0, "--port"), " --port: expected at least 1, got 0"),
        ("port", Override("x", "VLLM_PROXY_PORT"), ' VLLM_PROXY_PORT: expected a whole number, got "x"'),
        (
            "cors_origins",
            Override([1], "VLLM_PROXY_CORS_ORIGINS"),
            " VLLM_PROXY_CORS_ORIGINS: expected a string, got 1",
        ),
    ],
)
def test_a_wrong_value_from_outside_is_named_by_its_source(key: str, override: Override, expected: str) -> None:
    """A line of the file would send people to the wrong place."""
    assert problems("[server]\nport = 1\n", **{key: override}) == [expected]


def test_the_revision_is_of_the_bytes() -> None:
    """The same bytes have the same revision, one more space another one."""
    assert parse(CHAT).revision == revision_of(CHAT.encode()) != parse(CHAT + " ").revision


tables = st.recursive(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3) | st.lists(st.integers(0, 1), max_size=2), max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), st.integers(0, 3) | inner, max_size=3),
    max_leaves=8,
)


@given(tables)
def test_merging_with_nothing_or_itself_changes_nothing(table: dict[str, Any]) -> None:
    """An empty table on either side, or the table itself, adds nothing."""
    assert merge(table, {}) == merge({}, table) == merge(table, table) == table


@given(tables, tables, tables)
def test_merging_three_tables_needs_no_parentheses(
    one: dict[str, Any], two: dict[str, Any], three: dict[str, Any]
) -> None:
    """Engine, defaults, model: the order counts, not who is merged first, as long as no table meets a plain value."""
    if not (clash(one, two) or clash(two, three) or clash(one, three)):
        assert merge(merge(one, two), three) == merge(one, merge(two, three))


@given(tables, tables)
def test_the_stronger_table_is_found_whole_in_the_result(base: dict[str, Any], over: dict[str, Any]) -> None:
    """Everything that the stronger one says holds, the rest is from the base, and neither was changed."""
    before = repr((base, over))
    merged = merge(base, over)
    assert repr((base, over)) == before
    assert merge(merged, over) == merged
    assert merged.keys() == base.keys() | over.keys()
    assert all(merged[key] == base[key] for key in base.keys() - over.keys())


def clash(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether a table of one is a plain value of the other."""
    return any(
        isinstance(one[key], Mapping) != isinstance(two[key], Mapping)
        or (isinstance(one[key], Mapping) and clash(one[key], two[key]))
        for key in one.keys() & two.keys()
    )


def test_what_is_said_of_devices_counts() -> None:
    """With the defaults of the contract for what is not said."""
    assert parse("").devices.model_dump() == {
        "source": "auto", "reserve": 512 * 2**20, "max_wait": 30.0, "min_residency": 10.0, "limit": {},
        "host_memory": "50%",
    }  # fmt: skip
    config = parse('[devices]\nsource = "cpu"\nmax_wait = "1m"\n[devices.limit]\n"0" = "40GiB"\n')
    assert (config.devices.source, config.devices.max_wait, config.devices.limit) == ("cpu", 60.0, {"0": 40 * 2**30})


def test_bytes_of_a_device_need_to_know_how_large_it_is() -> None:
    """With `source = "none"` nobody does; no bytes at all are known anyway."""
    nobody = '[devices]\nsource = "none"\n'
    (told,) = problems(CHAT + 'memory = "20GiB"\n' + nobody)
    assert told.startswith("3: models.chat.memory: expected gpu_memory_utilization: with [devices] source")
    (told,) = problems(CHAT + '[defaults]\nmemory = "20GiB"\n' + nobody)
    assert told.startswith("4: defaults.memory: expected gpu_memory_utilization")
    assert parse(CHAT + 'memory = "0B"\n' + nobody).models["chat"].engine.memory == 0


def test_memory_and_a_share_are_two_ways_to_say_one_thing() -> None:
    """In one table that is a problem; a model's own way beats the other one in the defaults."""
    (told,) = problems(CHAT + 'memory = "20GiB"\ngpu_memory_utilization = 0.5\n')
    assert told.startswith("3: models.chat.memory: expected either memory or gpu_memory_utilization")
    (told,) = problems('[defaults]\nmemory = "1GiB"\ngpu_memory_utilization = 0.5\n' + CHAT)
    assert "defaults.memory" in told
    share = parse("[defaults]\ngpu_memory_utilization = 0.5\n" + CHAT + 'memory = "20GiB"\n').models["chat"].engine
    assert (share.memory, share.gpu_memory_utilization) == (20 * 2**30, None)
    size = parse('[defaults]\nmemory = "1GiB"\n' + CHAT + "gpu_memory_utilization = 0.5\n").models["chat"].engine
    assert (size.memory, size.gpu_memory_utilization) == (None, 0.5)


@pytest.mark.parametrize(("written", "total", "found"), [
    ('"50%"', 1001, 500), ('"12.5 %"', 1000, 125), ('"0%"', 1000, 0), ('"100%"', 1000, 1000), ('"4GiB"', 1, 4 * 2**30),
    ("0", 1000, 0), ("5000000", 1, 5_000_000),
])  # fmt: skip
def test_host_memory_is_a_part_of_the_machines_or_a_size(written: str, total: int, found: int) -> None:
    """A percentage is of what the machine has; a size stays what it is."""
    assert parse(f"[devices]\nhost_memory = {written}\n").devices.host_bytes(total) == found


@pytest.mark.parametrize("written", ['"101%"', '"-1%"', '"%"', "0.5", "true", '"half"'])
def test_host_memory_is_nothing_else(written: str) -> None:
    """More than all of it is none, and a share without its sign would be read as bytes."""
    (told,) = problems(f"[devices]\nhost_memory = {written}\n")
    assert told.startswith('2: devices.host_memory: expected a size such as "64GiB", or a percentage such as "50%"')


@pytest.mark.parametrize(("key", "written"), [
    ("host_memory", '"50"'), ("host_memory", "50"), ("reserve", "512"), ('limit."0"', '"70"'),
])  # fmt: skip
def test_no_memory_of_devices_is_a_few_bytes(key: str, written: str) -> None:
    """A unit, or the sign of a percentage, was forgotten."""
    (told,) = problems(f"[devices]\n{key} = {written}\n")
    assert told.startswith(f"2: devices.{key}: expected a size such as ".replace('"0"', "0"))
    assert told.endswith("bytes")


def test_a_model_takes_back_that_it_may_sleep() -> None:
    """With 0 in its own table, and so its engine is that of a model that never said so."""
    config = parse(f"[defaults]\nsleep = 1\n{CHAT}sleep = 0\n")
    assert config.models["chat"].engine == parse(CHAT).models["chat"].engine
    assert config.models["chat"].effective()["sleep"] is None
    assert parse(f"{CHAT}sleep = 0\n[models.chat.args]\nkv_offloading_size = 4\n")


@pytest.mark.parametrize("written", ["3", "-1", "true", "false", "0.0", "1.0", '"1"', "[1]"])
def test_a_depth_of_sleep_is_one_of_three_numbers(written: str) -> None:
    """`true` says not which, and 1.0 is no level."""
    (told,) = problems(f"{CHAT}sleep = {written}\n")
    assert told.startswith("3: models.chat.sleep: expected one of 0, 1, 2, got ")


@pytest.mark.parametrize("option", [
    'kv_transfer_config = { kv_role = "kv_both" }', '"kv-transfer-config.kv_role" = "kv_both"',
    "kv_offloading_size = 4", 'kv-offloading-backend = "native"',
])  # fmt: skip
def test_who_shares_its_kv_cache_does_not_sleep(option: str) -> None:
    """Each of the two alone is fine. It is said of the option, where that stands."""
    args = f"[models.chat.args]\n{option}\n"
    assert parse(CHAT + args).models["chat"].engine.sleep is None
    (told,) = problems(f"{CHAT}sleep = 1\n{args}")
    assert told.startswith("5: models.chat.args.")
    assert "cannot be given together with sleep" in told
    (told,) = problems(f"[defaults]\nsleep = 2\n[defaults.args]\n{option}\n")
    assert told.startswith("4: defaults.args.")


def test_who_may_sleep_needs_no_port() -> None:
    """Its engines listen at sockets of their own, so there may be more of them than ports."""
    assert parse(f"[engine]\nport_start = 9000\nport_end = 9000\n{CHAT}replicas = 2\nsleep = 1\n")
    assert problems(f"[engine]\nport_start = 9000\nport_end = 9000\n{CHAT}replicas = 2\n")
