"""Adapters in models.toml: what they mean, and what is said of those that cannot be."""

import json
from pathlib import Path

import pytest

from vllm_proxy.domain.adapters import Adapter, Lora, Most
from vllm_proxy.domain.config import Config, ModelSpec
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.errors import ConfigError
from vllm_proxy.runtime.referenced import ReferencedFiles

CHAT = '[models.chat]\nmodel = "org/chat"\n'
SUPPORT_PATH = "models.chat.adapters.support.path"
SUPPORT = CHAT + '[models.chat.adapters.support]\npath = "adapters/support"\n'


def make_folder(folder: Path, **keys: object) -> None:
    """The folder of an adapter, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **keys}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the file is, with one good adapter beside it."""
    make_folder(tmp_path / "adapters" / "support")
    return tmp_path


def config(text: str, folder: Path) -> Config:
    """As `check` reads it."""
    return parse_config(text.encode(), "models.toml", files=ReferencedFiles(folder, None))


def chat(text: str, folder: Path) -> ModelSpec:
    """The model of it."""
    return config(text, folder).models["chat"]


def problems(text: str, folder: Path) -> dict[str, str]:
    """What is wrong, by where."""
    with pytest.raises(ConfigError) as error:
        config(text, folder)
    return {problem.path: problem.message for problem in error.value.problems}


def test_an_adapter_says_what_it_is_and_what_its_engines_hold(folder: Path) -> None:
    """Its rank is that of its folder, and the model's engines are started with room for it."""
    found = chat(SUPPORT + 'description = "d"', folder)
    (adapter,) = found.adapters.values()
    assert adapter.revision
    assert adapter == Adapter("support", "adapters/support", "d", rank=8, revision=adapter.revision)
    assert found.lora == found.engine.lora == Lora(8, 1, 16)
    assert found.effective()["adapters"] == {
        "support": {"path": "adapters/support", "description": "d", "enabled": True}
    }
    assert found.effective()["adapters_max"] == {"rank": 8, "loras": 1, "cpu_loras": 16}
    assert "lora" not in found.effective()


def test_a_model_without_adapters_has_no_room_for_any(folder: Path) -> None:
    """Whatever `adapters_max` says."""
    found = chat(CHAT + "adapters_max.rank = 64", folder)
    assert (found.adapters, found.lora, found.adapters_max) == ({}, None, Most(64))
    assert found.effective()["adapters_max"] == {"rank": 64, "loras": None, "cpu_loras": None}


def test_a_path_with_one_slash_and_no_folder_is_a_hub_id(folder: Path) -> None:
    """Nothing of it is known; a folder of that name wins."""
    assert chat(SUPPORT.replace("adapters/support", "org/support"), folder).adapters["support"] == Adapter(
        "support", "org/support", is_hub_id=True
    )
    assert not chat(SUPPORT, folder).adapters["support"].is_hub_id


def test_what_was_read_counts_in_the_fingerprint(folder: Path) -> None:
    """Other weights, another configuration, a folder that comes where a hub id was: each is another one."""
    seen = {config(SUPPORT, folder).fingerprint}
    (folder / "adapters/support/adapter_model.safetensors").write_bytes(b"weights")
    seen.add(config(SUPPORT, folder).fingerprint)
    make_folder(folder / "adapters/support", r=16)
    found = config(SUPPORT, folder)
    seen.add(found.fingerprint)
    assert len(seen) == 3
    assert found.attached.keys() == {"adapters/support"}
    hub = SUPPORT.replace("adapters/support", "org/support")
    assert (before := config(hub, folder)).attached == {"org/support": ""}
    make_folder(folder / "org" / "support")
    assert config(hub, folder).fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        (SUPPORT.replace("adapters/support", "adapters/no/such"), SUPPORT_PATH, "no such folder"),
        (SUPPORT.replace("adapters/support", "adapters/suport"), SUPPORT_PATH, "no such folder"),
        (SUPPORT.replace("adapters/support", "./none"), SUPPORT_PATH, "no such folder"),
        (SUPPORT.replace("adapters/support", "adapters"), SUPPORT_PATH, "adapter_config.json"),
        (SUPPORT.replace("adapters/support", "dora"), SUPPORT_PATH, "DoRA"),
        (SUPPORT.replace("adapters/support", "credential:x"), SUPPORT_PATH, "expected a folder"),
        (SUPPORT.replace('"adapters/support"', '""'), SUPPORT_PATH, "not empty"),
        (CHAT + "[models.chat.adapters.support]\n", SUPPORT_PATH, "every adapter needs path"),
        (SUPPORT + "pth = 1", "models.chat.adapters.support.pth", "did you mean path?"),
        (SUPPORT + "enabled = 1", "models.chat.adapters.support.enabled", "true or false"),
        (CHAT + "adapters = 1", "models.chat.adapters", "expected a table"),
        (CHAT + "adapters.x = 1", "models.chat.adapters.x", "expected a table"),
        (CHAT + 'adapters.x = "org/x"', "models.chat.adapters.x",
         'expected a table, got "org/x": write { path = "org/x" }'),
        (CHAT + 'adapters.args = "org/x"', "models.chat.adapters.args",
         'expected a table, got "org/x": write { path = "org/x" }'),
        (CHAT + '[models.chat.adapters."a b"]\npath = "org/x"', 'models.chat.adapters."a b"', "expected an id"),
        (CHAT + '[models.chat.adapters.a.b]\npath = "org/x"', "models.chat.adapters.a.b",
         'write [models.chat.adapters."a.b"]'),
        (CHAT + '[models.chat.adapters.chat]\npath = "org/x"', "models.chat.adapters.chat", 'taken by model "chat"'),
        (SUPPORT + '[models.b]\nmodel = "m"\nadapters.support.path = "org/x"', "models.b.adapters.support", "taken by"),
        (SUPPORT + '[models.b]\nmodel = "m"\naliases = ["support"]', "models.b.aliases", "taken by"),
        (SUPPORT + '[models.support]\nmodel = "m"', "models.chat.adapters.support", "taken by"),
        ('[defaults.adapters.x]\npath = "org/x"\n' + CHAT, "defaults.adapters", "belongs to one model"),
        (SUPPORT + "[models.chat.adapters_max]\nrank = 7", "models.chat.adapters_max.rank", "expected one of 1, 8, 16"),
        (SUPPORT + "[models.chat.adapters_max]\nrank = 1", "models.chat.adapters_max.rank", "expected at least 8"),
        (SUPPORT + "[models.chat.adapters_max]\nloras = 0", "models.chat.adapters_max.loras", "at least 1"),
        (SUPPORT + "[models.chat.adapters_max]\nloras = 4\ncpu_loras = 2", "models.chat.adapters_max.cpu_loras",
         "at least loras (4)"),
        (SUPPORT + '[models.chat.args]\nlora_modules = ["a=b"]', "models.chat.args.lora_modules",
         'write [models.ID.adapters.a] with path = "b" instead'),
        *((SUPPORT + f"[models.chat.args]\n{key} = {value}", f"models.chat.args.{key}", "beside adapters")
          for key, value in {"enable_lora": "true", "enable-lora": "false", "no-enable-lora": "true",
                             "max_lora_rank": "8", "max-loras": "1", "max_cpu_loras": "4",
                             "data_parallel_size": "2", "api-server-count": "2"}.items()),
    ],
)  # fmt: skip
def test_what_cannot_be_an_adapter_is_a_problem_at_its_place(text: str, path: str, says: str, folder: Path) -> None:
    """With what was expected."""
    make_folder(folder / "dora", use_dora=True)
    found = problems(text, folder)
    assert says in found[path]


def test_options_of_lora_are_anybodys_without_adapters(folder: Path) -> None:
    """Who loads them by hand goes on; and beside adapters one engine is what there is anyway."""
    found = chat(CHAT + "[models.chat.args]\nenable_lora = true\ndata_parallel_size = 2", folder)
    assert found.engine.args == {"enable-lora": True, "data-parallel-size": 2}
    assert chat(SUPPORT + "[models.chat.args]\ndata_parallel_size = 1\nlora_dtype = 'auto'", folder).lora is not None


def test_a_disabled_adapter_is_not_looked_at(folder: Path) -> None:
    """So a broken one can be kept in the file."""
    found = config(SUPPORT.replace("adapters/support", "adapters/no/such") + "enabled = false", folder)
    assert (found.models["chat"].lora, found.attached) == (None, {})


def test_a_folder_that_is_gone_is_forgiven_where_the_reader_says_so(folder: Path) -> None:
    """A daemon that starts, or reads its file anew, has the adapter alone fail; one that vLLM refuses is a problem."""
    files = ReferencedFiles(folder, None).lenient()
    gone = SUPPORT.replace("adapters/support", "adapters/no/such")
    found = parse_config(gone.encode(), "", files=files)
    assert found.models["chat"].adapters["support"] == Adapter("support", "adapters/no/such")
    assert found.models["chat"].lora == Lora(16, 1, 16)
    (folder / "adapters/support/adapter_config.json").unlink()
    assert parse_config(SUPPORT.encode(), "", files=files).models["chat"].adapters["support"].rank is None
    make_folder(folder / "adapters/support", bias="all")
    with pytest.raises(ConfigError) as error:
        parse_config(SUPPORT.encode(), "", files=files)
    assert "bias" in error.value.problems[0].message


def test_only_those_folders_are_looked_at_that_may_be(folder: Path) -> None:
    """Who sends a text to be planned does not learn what else lies on the machine."""
    files = ReferencedFiles(folder, None).limited_to(())
    found = parse_config(SUPPORT.replace("adapters/support", "/etc").encode(), "", files=files)
    assert (found.attached, found.models["chat"].adapters["support"].rank) == ({}, None)


def test_a_key_for_an_adapter_is_not_warned_of(folder: Path) -> None:
    """Its globs match ids of adapters as they do others."""
    key = f'[keys.ci]\nhash = "sha256:{"0" * 64}"\nmodels = ["supp*"]\n'
    assert config(key + SUPPORT, folder).warnings() == []
    assert config(key + CHAT, folder).warnings() != []


def test_engines_that_have_enough_keep_what_they_have(folder: Path) -> None:
    """An adapter that goes, or a smaller rank, gives another spec and the same engine."""
    running = chat(SUPPORT, folder).engine.lora
    many = Lora(64, 4, 32)
    assert chat(SUPPORT, folder).with_lora(many).lora == many
    assert chat(CHAT, folder).with_lora(running).lora == running
    assert chat(SUPPORT, folder).with_lora(Lora(1, 1, 16)).lora == Lora(8, 1, 16)
    assert chat(SUPPORT, folder).with_lora(None).lora == Lora(8, 1, 16)
