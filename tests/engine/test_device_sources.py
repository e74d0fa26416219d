"""What a machine's own memory, AMD's driver and a file say of devices, from fabricated files."""

import os
from pathlib import Path

import pytest

from vllm_proxy.domain.inventory import Seen
from vllm_proxy.domain.ledger import Kind
from vllm_proxy.engine.amdgpu import AmdGpu
from vllm_proxy.engine.device_file import DeviceFile
from vllm_proxy.engine.device_source import SourceError
from vllm_proxy.engine.machine_memory import MachineMemory

GIB = 2**30
NODE = """\
Node 0 MemTotal:       16777216 kB
Node 0 MemFree:         4194304 kB
Node 0 MemUsed:        12582912 kB
Node 0 Active(anon):     999999 kB
Node 0 Active(file):    1048576 kB
Node 0 Inactive(file):  2097152 kB
Node 0 SReclaimable:     524288 kB
Node 0 HugePages_Total:     0
"""
MEMINFO = "MemTotal:       8388608 kB\nMemFree:        1048576 kB\nMemAvailable:   6291456 kB\n"


def write(root: Path, files: dict[str, str]) -> None:
    """Below a folder that stands for /."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


# The machine's memory


def memory(root: Path) -> tuple[int, int | None]:
    """Total and free, of the only device."""
    (seen,) = MachineMemory(root).look({}).devices
    assert (seen.name, seen.kind, seen.visible) == ("cpu", Kind.MEMORY, None)
    return seen.total, seen.free


def node(root: Path, text: str = NODE) -> None:
    """What the kernel says of node 0; of the machine as a whole it says something else."""
    write(root, {"sys/devices/system/node/node0/meminfo": text, "proc/meminfo": MEMINFO})


def test_the_memory_of_node_0_is_counted_as_vllm_does(tmp_path: Path) -> None:
    """What is cached or can be reclaimed counts as free."""
    node(tmp_path)
    assert memory(tmp_path) == (16 * GIB, 7.5 * GIB)


def test_without_numa_it_is_the_machines_memory(tmp_path: Path) -> None:
    """As vLLM does where the kernel knows no nodes."""
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert memory(tmp_path) == (8 * GIB, 6 * GIB)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"memory.max": str(8 * GIB), "memory.current": str(3 * GIB)}, (8 * GIB, 5 * GIB)),
        ({"memory.max": str(12 * GIB), "memory.current": str(GIB)}, (12 * GIB, 7.5 * GIB)),
        ({"memory.max": str(8 * GIB), "memory.current": str(9 * GIB)}, (8 * GIB, 0)),
        ({"memory.max": str(32 * GIB), "memory.current": str(31 * GIB)}, (16 * GIB, 7.5 * GIB)),
        ({"memory.max": "max"}, (16 * GIB, 7.5 * GIB)),
        ({"memory.max": str(8 * GIB)}, (8 * GIB, 7.5 * GIB)),
        ({"memory/memory.limit_in_bytes": str(8 * GIB), "memory/memory.usage_in_bytes": "0"}, (8 * GIB, 7.5 * GIB)),
        ({"memory/memory.limit_in_bytes": str(2**63 - 4096)}, (16 * GIB, 7.5 * GIB)),
    ],
)
def test_the_limit_of_a_cgroup_is_the_total(tmp_path: Path, files: dict[str, str], found: tuple[int, int]) -> None:
    """In both versions of cgroups, where it is lower; "max" and the largest number are none."""
    node(tmp_path)
    write(tmp_path, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert memory(tmp_path) == found


@pytest.mark.parametrize(
    "text", ["", "Node 0 MemTotal: lots kB\n", NODE.replace("16777216", "0"), NODE.replace("SReclaimable", "S")]
)
def test_figures_that_make_no_sense_are_no_device(tmp_path: Path, text: str) -> None:
    """A total of nothing, and figures that are missing, are a failed look."""
    node(tmp_path, text)
    with pytest.raises(SourceError):
        MachineMemory(tmp_path).look({})


# AMD


def card(root: Path, number: int, **files: object) -> None:
    """What the driver shows of one card."""
    write(root, {f"sys/class/drm/card{number}/device/{name}": f"{text}\n" for name, text in files.items()})


def amd(root: Path) -> tuple[Seen, ...]:
    """What is found."""
    return AmdGpu(root).look({}).devices


def test_amd_gpus_are_counted_in_the_drivers_order(tmp_path: Path) -> None:
    """By the number of the card, not by its text; what is no card of this driver's is not counted."""
    card(tmp_path, 10, mem_info_vram_total=16 * GIB, mem_info_vram_used=GIB, device="0x744c", mem_info_vram_vendor="a")
    card(tmp_path, 2, mem_info_vram_total=192 * GIB, mem_info_vram_used=0, unique_id="d4fe", product_name="MI300X")
    card(tmp_path, 0, device="0x2000")  # a server's own display
    write(tmp_path, {"sys/class/drm/card2-DP-1/status": "", "sys/class/drm/renderD128/dev": "", "sys/class/drm/v": ""})
    assert amd(tmp_path) == (
        Seen("0", "GPU-d4fe", 0, "MI300X", Kind.GPU, unified=False, total=192 * GIB, free=192 * GIB, visible="0"),
        Seen("1", "1", 1, "AMD GPU 0x744c", Kind.GPU, unified=False, total=16 * GIB, free=15 * GIB, visible="1"),
    )


def test_an_apu_has_what_it_may_map_of_the_machines_memory(tmp_path: Path) -> None:
    """Of which no more is free than the machine has available."""
    gtt = {"mem_info_gtt_total": 64 * GIB, "mem_info_gtt_used": 4 * GIB}
    card(tmp_path, 0, mem_info_vram_total=GIB // 2, mem_info_vram_used=0, device="0x1586", **gtt)
    write(tmp_path, {"proc/meminfo": MEMINFO})
    (seen,) = amd(tmp_path)
    assert (seen.unified, seen.total, seen.free) == (True, 64 * GIB, 6 * GIB)
    write(tmp_path, {"proc/meminfo": MEMINFO.replace("6291456", "99999999")})
    assert amd(tmp_path)[0].free == 60 * GIB


def test_a_card_whose_memory_is_its_own_is_no_apu(tmp_path: Path) -> None:
    """Though it may map more of the machine's than it has: it is told by its number, or by who made its memory."""
    vram = {"mem_info_vram_total": 8 * GIB, "mem_info_vram_used": 0}
    gtt = {"mem_info_gtt_total": 64 * GIB, "mem_info_gtt_used": 0}
    card(tmp_path, 0, **vram, **gtt, mem_info_vram_vendor="samsung")
    card(tmp_path, 1, **vram, **gtt, unique_id="d4fe")
    assert [(seen.unified, seen.total) for seen in amd(tmp_path)] == [(False, 8 * GIB)] * 2


def test_without_the_driver_there_is_no_amd_gpu(tmp_path: Path) -> None:
    """That is no failure."""
    assert amd(tmp_path) == ()


@pytest.mark.parametrize("text", ["", "many", "0", "-1", "\u0663"])
def test_an_amd_gpu_without_memory_is_a_failed_look(tmp_path: Path, text: str) -> None:
    """A torn answer must not make a device vanish, or be one of 0 bytes."""
    card(tmp_path, 0, mem_info_vram_total=text, mem_info_vram_used=0, unique_id="d4fe")
    with pytest.raises(SourceError):
        amd(tmp_path)


def test_an_amd_gpu_that_does_not_answer_is_a_failed_look(tmp_path: Path) -> None:
    """One that was taken out while it was looked at."""
    card(tmp_path, 0, mem_info_vram_total=GIB)
    with pytest.raises(OSError, match="mem_info_vram_used"):
        amd(tmp_path)


# A file


def test_a_file_says_what_devices_there_are_and_is_read_anew(tmp_path: Path) -> None:
    """In bytes or as people write sizes; what is free may change, and may be left out."""
    file = tmp_path / "devices.toml"
    source = DeviceFile(file)
    file.write_text('"0" = {total = "80GiB", free = 1024}\n[1]\ntotal = 4096\n', encoding="utf-8")
    first, second = source.look({}).devices
    assert first == Seen(
        "0", "0", 0, "as the file says", Kind.GPU, unified=False, total=80 * GIB, free=1024, visible="0"
    )
    assert (second.name, second.index, second.free) == ("1", 1, None)
    file.write_text('"0" = {total = "80GiB", free = 0}\n', encoding="utf-8")
    assert [seen.free for seen in source.look({}).devices] == [0]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"# nothing\n",
        b'"0" = {total = "80GiB", fr',
        b"\xff",
        b"x = " + b"[" * 5000,
        b"x = " + b"9" * 5000,
        b'"0" = 80',
        b'"0" = {free = 1}',
        b'"0" = {total = 0}',
        b'"0" = {total = -1}',
        b'"0" = {total = true}',
        b'"0" = {total = "much"}',
        b'"0" = {total = 1, free = 2}',
        b'"0" = {total = 1, used = 1}',
        b'"" = {total = 1}',
        b'"0,1" = {total = 1}',
    ],
)
def test_a_file_that_is_torn_or_invalid_is_a_failed_look(tmp_path: Path, text: bytes) -> None:
    """It counts whole or not at all; the message names the file."""
    file = tmp_path / "devices.toml"
    file.write_bytes(text)
    with pytest.raises(SourceError, match=str(file)):
        DeviceFile(file).look({})


def test_what_stands_in_a_file_is_not_repeated(tmp_path: Path) -> None:
    """It may be another file than was meant."""
    file = tmp_path / "keys.toml"
    file.write_text('[ci]\ntotal = "sk-verysecret"\n', encoding="utf-8")
    with pytest.raises(SourceError) as raised:
        DeviceFile(file).look({})
    assert "verysecret" not in str(raised.value)


def test_a_file_that_is_gone_or_none_is_a_failed_look(tmp_path: Path) -> None:
    """A pipe too, which would block its reader for ever."""
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("gone", "No such file"), (".", "a directory"), ("pipe", "a pipe")):
        with pytest.raises(SourceError, match=why):
            DeviceFile(tmp_path / name).look({})
