"""The folders of adapters are followed as the file is, and a broken one is nobody else's. In virtual time."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.engine.virtual import Stage, passes, virtual
from tests.fleet.test_desired import ME, at_once, desired_of
from vllm_proxy.domain.adapters import Lora
from vllm_proxy.domain.file import edit
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.engine.state import StateDirectory
from vllm_proxy.errors import ConfigError
from vllm_proxy.fleet.outcome import Outcome
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.store import Store
from vllm_proxy.runtime.referenced import ReferencedFiles

FILE = """\
[models.chat]
model = "good"

[models.chat.adapters.support]
path = "adapters/support"

[models.b]
model = "good"
"""
WEIGHTS = "adapter_model.safetensors"


def make_adapter(folder: Path, **keys: object) -> None:
    """The folder of an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **keys}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(b"0")


class Followed:
    """A file with an adapter that is followed, and the engines that run for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "models.toml"
        self.file.write_text(FILE)
        make_adapter(folder / "adapters/support")
        self.stage = Stage()
        files = ReferencedFiles(folder, None).lenient()
        config = parse_config(self.file.read_bytes(), "", files=files)
        state = StateDirectory(folder / "state")
        self.reconciler = Reconciler(config, self.stage.shared, state, lambda spec: spec.model)
        self.desired = desired_of(Store(self.file, fsync=lambda _: None), self.reconciler, at_once)
        self.reconciler.start()

    async def reload(self) -> list[tuple[str, str, str]]:
        """What follows from what is on disk."""
        outcome = await self.desired.reload()
        await passes(10)
        return told(outcome)

    async def patch(self, name: str, keys: Mapping[str, object]) -> list[tuple[str, str, str]]:
        """PATCH of a model."""
        change = lambda data: edit.patch(data.decode(), ("models", name), keys).encode()  # noqa: E731
        return told(await self.desired.write(change, None, ME))


def told(outcome: Outcome) -> list[tuple[str, str, str]]:
    """Kind, model and reason of what is done."""
    return [(action.kind, action.model, action.reason) for action in outcome.changes]


@virtual
async def test_changed_weights_are_a_live_change(tmp_path: Path) -> None:
    """Though the file is the same; what is as it was is no change at all."""
    it = Followed(tmp_path)
    assert await it.reload() == []
    assert {file.name for file in it.desired.files()} == {"models.toml", "support"}
    (tmp_path / "adapters/support" / WEIGHTS).write_bytes(b"11")
    assert await it.reload() == [("update", "chat", "adapters.support: its files changed")]
    assert await it.reload() == []


@virtual
async def test_a_folder_that_goes_is_up_to_its_adapter(tmp_path: Path) -> None:
    """The file stays in force, and others are changed as before; it is known again when it is back."""
    it = Followed(tmp_path)
    (tmp_path / "adapters/support").rename(tmp_path / "away")
    assert [kind for kind, *_ in await it.reload()] == ["update"]
    assert it.desired.rejected is None
    assert await it.patch("b", {"description": "d"}) == [("update", "b", 'description "" -> "d"')]
    (tmp_path / "away").rename(tmp_path / "adapters/support")
    assert [kind for kind, *_ in await it.reload()] == ["update"]


@virtual
async def test_a_write_brings_no_adapter_that_is_not_there(tmp_path: Path) -> None:
    """Nor one that vLLM would refuse; nothing changes then."""
    it = Followed(tmp_path)
    make_adapter(tmp_path / "dora", use_dora=True)
    for path, says in (("./none", "no such folder"), ("dora", "DoRA")):
        with pytest.raises(ConfigError) as error:
            await it.patch("chat", {"adapters": {"x": {"path": path}}})
        assert [problem.path for problem in error.value.problems] == ["models.chat.adapters.x.path"]
        assert says in error.value.problems[0].message
    assert it.file.read_text() == FILE


@virtual
async def test_an_adapter_that_becomes_one_that_vllm_refuses_is_a_rejection(tmp_path: Path) -> None:
    """What runs goes on, and follows its folder until it is mended."""
    it = Followed(tmp_path)
    make_adapter(tmp_path / "adapters/support", bias="all")
    with pytest.raises(ConfigError):
        await it.reload()
    assert it.desired.rejected is not None
    assert tmp_path / "adapters/support" in it.desired.files()
    make_adapter(tmp_path / "adapters/support")
    await it.reload()
    assert it.desired.rejected is None


@virtual
async def test_engines_with_enough_room_stay_and_others_are_replaced(tmp_path: Path) -> None:
    """Whatever goes or gets smaller is live; what needs more is a replacement, which is told before."""
    it = Followed(tmp_path)
    spec = it.reconciler.model("chat").spec
    assert spec.lora == Lora(8, 1, 16)
    assert await it.patch("chat", {"adapters": None}) == [("update", "chat", "adapters.support removed")]
    assert it.reconciler.model("chat").spec.engine == spec.engine
    assert await it.patch("chat", {"adapters": {"x": {"path": "adapters/support"}}}) == [
        ("update", "chat", "adapters.x new")
    ]
    make_adapter(tmp_path / "large", r=64)
    change = {"adapters": {"y": {"path": "large"}}}
    text = edit.patch(it.file.read_text(), ("models", "chat"), change)
    why = "adapters.y new, adapters.y: its rank 64 is more than the 8 that engines hold"
    actions, *_ = await it.desired.plan(text.encode(), trusted=True)
    assert [(action.kind, action.reason) for action in actions] == [("replace", why)]
    assert await it.patch("chat", change) == [("replace", "chat", why)]
    assert it.reconciler.model("chat").spec.lora == Lora(64, 2, 16)


@virtual
async def test_the_room_of_a_change_that_failed_is_not_kept(tmp_path: Path) -> None:
    """What runs in its place counts, so that the way back is the engine that serves."""
    it = Followed(tmp_path)
    model = it.reconciler.model("chat")
    before = model.spec
    make_adapter(tmp_path / "large", r=64)
    await it.patch("chat", {"adapters": {"y": {"path": "large"}}})
    assert [one.spec.engine for one in model.instances] == [before.engine]  # the new one is still checked
    assert it.reconciler.loras()["chat"] == before.lora
    await it.patch("chat", {"adapters": {"y": None}})
    assert model.spec.engine == before.engine
