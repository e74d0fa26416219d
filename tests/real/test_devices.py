"""The machine's memory is counted as vLLM itself counts it, by its own function, from the same files."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from vllm_proxy.engine.machine_memory import node_memory

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

VLLM = "vllm.utils.cpu_resource_utils"
NODE = "sys/devices/system/node/node0/meminfo"
GIB = 2**30
HUGE = 2**63 - 4096  # what version 1 says where there is no limit


@pytest.mark.parametrize(
    "group",
    [
        {},
        {"memory.max": "max", "memory.current": GIB},
        {"memory.max": 2 * GIB, "memory.current": GIB},
        {"memory.max": 2 * GIB, "memory.current": 3 * GIB},
        {"memory.max": 2 * GIB},
        {"memory.max": HUGE, "memory.current": GIB},
        {"memory/memory.limit_in_bytes": 2 * GIB, "memory/memory.usage_in_bytes": GIB},
        {"memory/memory.limit_in_bytes": HUGE, "memory/memory.usage_in_bytes": GIB},
    ],
    ids=str,
)
def test_memory_is_counted_as_vllm_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: dict[str, object]
) -> None:
    """To the byte: this machine's NUMA node 0, below every kind of limit that a cgroup may have."""
    vllm = importlib.import_module(VLLM)
    if not Path("/", NODE).exists():
        pytest.skip("this kernel has no NUMA nodes")
    (tmp_path / NODE).parent.mkdir(parents=True)
    shutil.copyfile(Path("/", NODE), tmp_path / NODE)
    for name, text in group.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")

    def copy_of(path: str) -> Path:
        return tmp_path / path.lstrip("/")

    def open_copy(path: str) -> IO[Any]:
        return copy_of(path).open(encoding="utf-8")

    paths = SimpleNamespace(exists=lambda path: copy_of(path).exists())
    monkeypatch.setattr(vllm, "open", open_copy, raising=False)
    monkeypatch.setattr(vllm, "os", SimpleNamespace(path=paths))
    vllm.get_cgroup_memory_limit.cache_clear()
    theirs, ours = vllm.get_memory_node_info(0), node_memory(tmp_path)
    assert (ours.total, ours.available) == (theirs.total_memory, theirs.available_memory)


def test_the_machine_is_looked_at_where_vllm_looks() -> None:
    """Its total, of this very machine."""
    vllm = importlib.import_module(VLLM)
    vllm.get_cgroup_memory_limit.cache_clear()
    assert node_memory().total == vllm.get_memory_node_info(0).total_memory
