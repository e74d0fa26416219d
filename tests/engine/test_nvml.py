"""NVIDIA's GPUs through the real bindings and a stub of the driver's library, which says what a test lets it say."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.build import compiler
from vllm_proxy.domain.inventory import Foreign, Seen
from vllm_proxy.domain.ledger import Kind
from vllm_proxy.engine.device_source import Sight, SourceError
from vllm_proxy.engine.holders import Programs, name_of
from vllm_proxy.engine.nvml import Nvml

pytestmark = pytest.mark.skipif(not compiler(), reason="no C compiler")

GIB = 2**30
LIBRARY = "libnvidia-ml.so.1"
STUB = Path(__file__).with_name("nvml_stub.c")
TWO = f"gpu GPU-a {80 * GIB} {GIB} {10 * GIB}\ngpu GPU-b {80 * GIB} {GIB} 0\n"
CODES = {"NOT_SUPPORTED": 3, "NO_PERMISSION": 4, "DRIVER_NOT_LOADED": 9, "FUNCTION_NOT_FOUND": 13, "GPU_IS_LOST": 15,
         "LIB_RM_VERSION_MISMATCH": 18, "UNKNOWN": 999}  # fmt: skip


def build(folder: Path) -> Path:
    """The stub, compiled."""
    library = folder / LIBRARY
    flags = ["-O1", "-Wall", "-Wextra", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([compiler() or "cc", *flags, "-o", str(library), str(STUB)], check=True)
    return library


@pytest.fixture(scope="module")
def _library(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loaded, so that the bindings find it by its name."""
    ctypes.CDLL(str(build(tmp_path_factory.mktemp("nvml"))))


class Driver:
    """What the stub says."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.says("")

    def says(self, text: str, *errors: tuple[str, object, str], hangs: str = "") -> None:
        """From now on. `errors`: function, index of the GPU or "*", and the name of the error."""
        lines = [f"error {function} {index} {CODES[code]}" for function, index, code in errors]
        lines += [f"hang {hangs}"] if hangs else []
        new = self._file.with_suffix(".new")
        new.write_text(text + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
        new.replace(self._file)


@pytest.fixture
def driver(_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Without GPUs."""
    file = tmp_path / "nvml"
    monkeypatch.setenv("NVML_STUB", str(file))
    return Driver(file)


@pytest.fixture
def nvml(driver: Driver, tmp_path: Path) -> Iterator[Nvml]:
    """As on a machine with 120 GiB, of which 100 are available."""
    del driver
    (tmp_path / "proc").mkdir()
    meminfo = f"MemTotal: {120 * 2**20} kB\nMemAvailable: {100 * 2**20} kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo, encoding="utf-8")
    source = Nvml(Programs(pids_are_ours=True), tmp_path)
    yield source
    source.close()


def names(sight: Sight) -> list[str]:
    """Of the devices."""
    return [seen.name for seen in sight.devices]


def test_gpus_are_counted_and_measured_as_cuda_does(driver: Driver, nvml: Nvml) -> None:
    """In total without what the driver reserves; by index, in the order of the bus."""
    driver.says(TWO)
    first, second = nvml.look({}).devices
    assert first == Seen(
        "0", "GPU-a", 0, "NVIDIA Stub", Kind.GPU, unified=False, total=79 * GIB, free=69 * GIB, visible="0"
    )
    assert (second.name, second.id, second.visible, second.free) == ("1", "GPU-b", "1", 79 * GIB)
    driver.says(TWO.replace(f"{10 * GIB}", "0"))
    assert [seen.free for seen in nvml.look({}).devices] == [79 * GIB] * 2


def test_an_old_driver_that_does_not_say_what_it_reserves_is_measured(driver: Driver, nvml: Nvml) -> None:
    """What is free is the same in both versions."""
    driver.says(TWO, ("nvmlDeviceGetMemoryInfo_v2", "*", "FUNCTION_NOT_FOUND"))
    assert [(seen.total, seen.free) for seen in nvml.look({}).devices] == [(80 * GIB, 69 * GIB), (80 * GIB, 79 * GIB)]


def test_each_mig_device_is_a_device_and_its_parent_is_none(driver: Driver, nvml: Nvml) -> None:
    """Named by UUID; the whole GPUs beside them are then named so to CUDA too, which counts them otherwise."""
    parts = f"mig MIG-x {5 * GIB} 0 {GIB}\nmig MIG-y {10 * GIB} 0 0\n"
    driver.says(f"gpu GPU-a {40 * GIB} 0 0\n{parts}gpu GPU-b {80 * GIB} 0 0\n")
    x, y, whole = nvml.look({}).devices
    assert [(seen.name, seen.id, seen.index, seen.kind, seen.visible) for seen in (x, y)] == [
        ("MIG-x", "MIG-x", None, Kind.MIG, "MIG-x"),
        ("MIG-y", "MIG-y", None, Kind.MIG, "MIG-y"),
    ]
    assert (x.total, x.free) == (5 * GIB, 4 * GIB)
    assert (whole.name, whole.index, whole.kind, whole.visible) == ("1", 1, Kind.GPU, "GPU-b")


def test_a_gpu_without_memory_of_its_own_has_the_machines(driver: Driver, nvml: Nvml) -> None:
    """GB10: both versions of the question are not supported. What its processes have is known all the same."""
    driver.says(
        f"gpu GPU-a 0 0 0\nprocess Compute {os.getppid()} {3 * GIB}\n",
        ("nvmlDeviceGetMemoryInfo_v2", 0, "NOT_SUPPORTED"),
        ("nvmlDeviceGetMemoryInfo", 0, "NOT_SUPPORTED"),
    )
    (seen,) = nvml.look({}).devices
    assert (seen.unified, seen.total, seen.free) == (True, 120 * GIB, 100 * GIB)
    assert [one.bytes for one in seen.foreign] == [3 * GIB]


def test_programs_are_listed_by_name_once_each(driver: Driver, nvml: Nvml) -> None:
    """One that computes and draws is listed by the driver twice, with all that it has; MPS lists its own."""
    pid = os.getppid()
    lists = f"process Compute {pid} {3 * GIB}\nprocess Graphics {pid} {3 * GIB}\nprocess MPSCompute {os.getpid()} 5\n"
    driver.says(TWO.splitlines()[0] + "\n" + lists)
    (seen,) = nvml.look({}).devices
    assert set(seen.foreign) == {
        Foreign(pid, name_of(pid), 3 * GIB),
        Foreign(os.getpid(), name_of(os.getpid()), 5),
    }


def test_a_process_of_unknown_size_is_not_listed(driver: Driver, nvml: Nvml) -> None:
    """An engine of ours must not seem to have nothing."""
    driver.says(f"{TWO}process Compute {os.getppid()} {2**64 - 1}\nprocess Compute {os.getpid()} 0\n")
    assert [seen.foreign for seen in nvml.look({}).devices] == [(), ()]


@pytest.mark.parametrize("code", ["NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND"])
def test_where_processes_are_not_told_devices_are_measured_all_the_same(driver: Driver, nvml: Nvml, code: str) -> None:
    """In a container, in WSL, on GeForce cards."""
    kinds = ("Compute", "Graphics", "MPSCompute")
    driver.says(
        f"{TWO}process Compute {os.getppid()} 7\n",
        *((f"nvmlDeviceGet{kind}RunningProcesses_v3", "*", code) for kind in kinds),
    )
    assert [(seen.held, seen.foreign) for seen in nvml.look({}).devices] == [({}, ())] * 2


@pytest.mark.parametrize("function", ["nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetMemoryInfo_v2"])
def test_a_lost_gpu_is_left_out_and_the_others_are_named_by_uuid(driver: Driver, nvml: Nvml, function: str) -> None:
    """To CUDA: what starts after the loss counts without it. The daemon's own names stay as they are."""
    driver.says(TWO, (function, 0, "GPU_IS_LOST"))
    sight = nvml.look({})
    assert [(seen.name, seen.visible) for seen in sight.devices] == [("1", "GPU-b")]
    assert sight.problem is not None
    assert "GPU 0" in sight.problem
    driver.says(TWO)
    assert names(nvml.look({})) == ["0", "1"]


def test_a_gpu_that_fails_for_good_does_not_hide_the_others(driver: Driver, nvml: Nvml) -> None:
    """Two looks fail whole, since it may have been a moment's trouble; from the third on it is left out."""
    fault = ("nvmlDeviceGetMemoryInfo_v2", 1, "UNKNOWN")
    driver.says(TWO, fault)
    for _ in range(2):
        with pytest.raises(SourceError, match="GPU 1 does not answer"):
            nvml.look({})
    for _ in range(2):
        sight = nvml.look({})
        assert names(sight) == ["0"]
        assert "GPU 1" in (sight.problem or "")
    driver.says(TWO)
    assert (names(nvml.look({})), nvml.look({}).problem) == (["0", "1"], None)
    driver.says(TWO, fault)
    with pytest.raises(SourceError):
        nvml.look({})


def test_a_driver_that_is_not_loaded_yet_is_found_once_it_is(driver: Driver, nvml: Nvml) -> None:
    """That it is missing is no failure."""
    driver.says(TWO, ("nvmlInitWithFlags", "*", "DRIVER_NOT_LOADED"))
    assert nvml.look({}) == Sight()
    driver.says(TWO)
    assert names(nvml.look({})) == ["0", "1"]


def test_a_driver_that_cannot_be_used_is_a_failed_look(driver: Driver, nvml: Nvml) -> None:
    """After an upgrade without a restart the library and the driver differ. There are GPUs, and nothing is known."""
    driver.says(TWO, ("nvmlInitWithFlags", "*", "LIB_RM_VERSION_MISMATCH"))
    with pytest.raises(SourceError, match="NVML cannot be used"):
        nvml.look({})


def test_a_driver_that_was_loaded_anew_is_asked_anew(driver: Driver, nvml: Nvml) -> None:
    """The first look after it fails, and the next one begins from the beginning."""
    driver.says(TWO)
    nvml.look({})
    driver.says(TWO, ("nvmlDeviceGetCount_v2", "*", "DRIVER_NOT_LOADED"), ("nvmlInitWithFlags", "*", "NO_PERMISSION"))
    for reason in ("NVML answers", "NVML cannot be used"):
        with pytest.raises(SourceError, match=reason):
            nvml.look({})
    driver.says(TWO)
    assert names(nvml.look({})) == ["0", "1"]


def test_a_gpu_of_no_bytes_is_a_failed_look(driver: Driver, nvml: Nvml) -> None:
    """A figure that cannot be is not believed."""
    driver.says("gpu GPU-a 0 0 0")
    with pytest.raises(SourceError, match="no memory"):
        nvml.look({})


def test_a_look_that_hangs_ends_when_the_driver_answers(driver: Driver, nvml: Nvml) -> None:
    """The call holds its own thread alone: others run meanwhile."""
    driver.says(TWO, hangs="nvmlDeviceGetMemoryInfo_v2")
    found: list[Sight] = []
    thread = threading.Thread(target=lambda: found.append(nvml.look({})))
    thread.start()
    assert found == []
    driver.says(TWO)
    thread.join()
    assert names(found[0]) == ["0", "1"]


ALONE = """
import sys
from pathlib import Path
from vllm_proxy.engine.holders import Programs
from vllm_proxy.engine.nvml import Nvml
if sys.argv[1] == "no bindings":
    sys.modules["pynvml"] = None
print([seen.id for seen in Nvml(Programs()).look({}).devices], "pynvml" in sys.modules)
"""


def alone(folder: Path, lacks: str) -> str:
    """What is found by a process that has nothing loaded, and finds libraries in a folder; whether it has bindings."""
    (folder / "says").write_text(TWO, encoding="utf-8")
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder), "NVML_STUB": str(folder / "says")}
    command = [sys.executable, "-c", ALONE, lacks]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout.strip()


def test_without_the_drivers_library_there_are_no_nvidia_gpus(tmp_path: Path) -> None:
    """Nor are the bindings loaded, which take memory. A library that is none, as of another machine, is none."""
    (tmp_path / LIBRARY).write_bytes(b"not a library")
    assert alone(tmp_path, "a library") == "[] False"


def test_without_the_bindings_there_are_no_nvidia_gpus(tmp_path: Path) -> None:
    """They are optional, as the library is."""
    build(tmp_path)
    assert alone(tmp_path, "no bindings") == "[] True"


def test_the_library_is_found_by_its_name(tmp_path: Path) -> None:
    """Where the system looks for libraries."""
    build(tmp_path)
    assert alone(tmp_path, "nothing") == "['GPU-a', 'GPU-b'] True"
