"""What is valid in a file and does not do what it looks like: at the place of each, and nothing of what is meant so."""

from pathlib import Path

import pytest

from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.toml import dotted
from vllm_proxy.fleet.oversights import ineffective, oversights
from vllm_proxy.runtime.referenced import ReferencedFiles

CHAT = '[models.chat]\nmodel = "org/chat"\n'
SAYS_IDLE = 'does nothing: start is "always"; write start = "on-demand"'


def found(text: str, folder: Path) -> dict[str, str]:
    """What has no effect on any machine, by place."""
    return {dotted(path): message for path, message in ineffective(parse_config(text.encode(), ""), folder)}


def lacking(text: str, folder: Path) -> dict[str, str]:
    """What this machine has not, by place; the folders of adapters are read as `check` does."""
    config = parse_config(text.encode(), "", files=ReferencedFiles(folder, None).lenient())
    found = {dotted(path): message for path, message in oversights(config, folder, {}, shares=True)}
    found.pop("engine.command", None)  # a vLLM, where the tests run without one (tests/test_cli_check.py)
    return found


def test_a_model_without_any_device_is_told_where_the_processors_memory_is_managed(tmp_path: Path) -> None:
    """An empty CUDA_VISIBLE_DEVICES is usual for vLLM on a CPU, and takes it out of the plan."""
    none = '[devices]\nsource = "cpu"\n[models.chat]\nmodel = "org/chat"\nenv = { CUDA_VISIBLE_DEVICES = "" }\n'
    place = "models.chat.env.CUDA_VISIBLE_DEVICES"
    assert 'remove it where [devices] has source = "cpu"' in lacking(none, tmp_path)[place]
    assert place not in lacking(none.replace('"cpu"', '"auto"'), tmp_path)
    assert place not in lacking(none.replace('= ""', '= "0"'), tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CHAT + 'idle_timeout = "5m"', {"models.chat.idle_timeout": SAYS_IDLE}),
        (CHAT + 'idle_timeout = "15m"', {"models.chat.idle_timeout": SAYS_IDLE}),
        (CHAT + 'idle_timeout = "5m"\nstart = "warm"',
         {"models.chat.idle_timeout": 'does nothing: start is "warm"; write start = "on-demand"'}),
        (CHAT + 'idle_timeout = "5m"\nstart = "on-demand"', {}),
        ('[defaults]\nstart = "on-demand"\n' + CHAT + 'idle_timeout = "5m"', {}),
        (CHAT + "idle_timeout = 0", {}),
        (CHAT + 'idle_timeout = "5m"\nenabled = false', {}),
        ('[defaults]\nidle_timeout = "5m"\n' + CHAT + '[models.b]\nmodel = "b"',
         {"defaults.idle_timeout": 'does nothing: no model has start = "on-demand"'}),
        ('[defaults]\nidle_timeout = "5m"\n' + CHAT + '[models.b]\nmodel = "b"\nstart = "on-demand"', {}),
    ],
)  # fmt: skip
def test_an_idle_timeout_is_for_models_that_start_on_demand(
    text: str, expected: dict[str, str], tmp_path: Path
) -> None:
    """Others are never unloaded for it, as the defaults and the model together say."""
    assert found(text, tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "of_others"),
    [("llama3.2:latest", "; names of Ollama are not known here"), ("Qwen 3", ""), ("org/chat\\t", "")],
)
def test_what_is_neither_an_id_nor_a_folder_is_no_model(name: str, of_others: str, tmp_path: Path) -> None:
    """A start would fail for it after a while."""
    shown = name.replace("\\\\", "\\")
    message = f'"{shown}" is no Hugging Face id and no folder{of_others}: write one such as "Qwen/Qwen3-8B"'
    assert found(f'[models.a]\nmodel = "{name}"', tmp_path) == {"models.a.model": message}


@pytest.mark.parametrize("name", ["org/chat", "gpt2", "org/chat:Q4_K_M", "s3://bucket/chat", "my models/a", "tag:1"])
def test_ids_urls_and_folders_that_are_there_are_models(name: str, tmp_path: Path) -> None:
    """A folder may be called as it likes."""
    (tmp_path / "my models/a").mkdir(parents=True)
    (tmp_path / "tag:1").mkdir()
    assert found(f'[models.a]\nmodel = "{name}"', tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (CHAT + 'env.VLLM_API_KEY = "x"', "models.chat.env.VLLM_API_KEY"),
        ('[defaults.env]\nVLLM_API_KEY = "x"\n' + CHAT + '[models.b]\nmodel = "b"', "defaults.env.VLLM_API_KEY"),
        ('[engine.env]\nVLLM_API_KEY = "x"\n' + CHAT + '[models.b]\nmodel = "b"', "engine.env.VLLM_API_KEY"),
    ],
)
def test_the_key_of_an_engine_is_the_daemons(text: str, place: str, tmp_path: Path) -> None:
    """Told once where it stands, and never its value."""
    assert found(text, tmp_path) == {
        place: "does nothing: each engine gets a key of its own; [keys.NAME] says who may ask the daemon"
    }


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["vllm", "serve", "-tp", "2"], "gives -tp: write tensor_parallel_size"),
        (["vllm", "serve", "-dp=2"], "gives -dp: write args.data_parallel_size"),
        (["vllm", "serve", "--tensor-parallel-size=2"], "gives --tensor-parallel-size: write tensor_parallel_size"),
        (["vllm", "serve", "--no-trust_remote_code"], "gives --no-trust_remote_code: write trust_remote_code"),
        (["python", "-m", "x.api_server", "--model", "org/chat"], "gives --model: write model"),
        (["vllm", "serve", "--port", "1"], ("gives --port: --port belongs to the daemon: write port in [server], "
         "where clients come in; engines get ports of their own")),
        (["./start", "--api-key=secret"], ("gives --api-key: --api-key belongs to the daemon: "
         "`vllm-proxy keys add` writes one")),
    ],
)  # fmt: skip
def test_options_in_a_command_are_told_with_their_keys(command: list[str], expected: str, tmp_path: Path) -> None:
    """The daemon does not know of them: it weighs and routes by the keys. No value is shown."""
    assert found(f"{CHAT}command = {command}", tmp_path) == {"models.chat.command": expected}
    assert found(f"[engine]\ncommand = {command}\n{CHAT}[models.b]\nmodel = 'b'", tmp_path) == {
        "engine.command": expected
    }
    assert found(f"[defaults]\ncommand = {command}\n{CHAT}", tmp_path) == {"defaults.command": expected}


@pytest.mark.parametrize(
    "command",
    [
        ["vllm", "serve"],
        ["/opt/vllm", "serve", "--enable-prefix-caching", "-O3"],
        ["numactl", "-q", "--host", "0", "vllm", "serve"],
        ["python", "-m", "vllm.entrypoints.openai.api_server"],
        ["podman", "run", "--config=/c", "image", "--model", "{model}"],
    ],
)
def test_what_belongs_into_a_command_is_not_told(command: list[str], tmp_path: Path) -> None:
    """Options of other programs that start vLLM, those that have no key, and the place of the model."""
    assert found(f"{CHAT}command = {command}", tmp_path) == {}


def test_adapters_without_a_folder_are_told(tmp_path: Path) -> None:
    """As the file is valid, and a daemon would only have the adapter fail; ids on the hub are not looked for."""
    (tmp_path / "adapters/empty").mkdir(parents=True)
    lines = {
        "gone": "/srv/none",
        "v1.5": "adapters/none",
        "home": "~/sql",
        "empty": "adapters/empty",
        "hub": "org/sql",
    }
    text = CHAT + "".join(f'[models.chat.adapters."{name}"]\npath = "{path}"\n' for name, path in lines.items())
    off = '[models.chat.adapters.off]\npath = "/srv/none"\nenabled = false\n'
    assert lacking(text + off, tmp_path) == {
        "models.chat.adapters.gone.path": "there is no folder /srv/none",
        'models.chat.adapters."v1.5".path': "there is no folder adapters/none",
        "models.chat.adapters.home.path": "no shell replaces the ~ of ~/sql: write the whole path",
        "models.chat.adapters.empty.path": "there is no adapter_config.json in adapters/empty",
    }
