"""Fakes share the memory of devices, and start, fail and end over it as vLLM does."""

import math
import os
import signal
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.fake_ledger import Ledger
from tests.fakes.ledger import GIB, Devices
from tests.fakes.running import LISTENS, Engine, core_of, engine, meanwhile
from tests.harness import PAUSE_SECONDS
from vllm_proxy.domain.diagnose import Exit, diagnose
from vllm_proxy.domain.lifecycle import Reason

CONTEXT = int(0.6 * GIB)
TOTAL = 80 * GIB
FIRST = {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Devices]:
    """Two."""
    with Devices(tmp_path / "devices.toml", {"0": TOTAL, "1": TOTAL}) as found:
        yield found


def on(devices: Devices, share: float = 0.5, *flags: str) -> list[str]:
    """The options of an engine that wants so much of these devices."""
    return [f"--fake-ledger={devices.file}", f"--gpu-memory-utilization={share}", *flags]


def free(devices: Devices, device: str = "0") -> int:
    """What the file says, as the daemon reads it: without a lock."""
    found: int = tomllib.loads(devices.file.read_text())[device]["free"]
    return found


def comes_back(devices: Devices, wanted: int = TOTAL, device: str = "0") -> None:
    """Wait until the file says that so much is free, which nobody asked the ledger for."""
    while free(devices, device) != wanted:
        time.sleep(PAUSE_SECONDS)


def test_an_engine_takes_what_it_asked_for_and_its_context(devices: Devices) -> None:
    """Of its device alone: first the context, then weights, at last the KV cache, of which its log tells."""
    with engine(*on(devices), env={"CUDA_VISIBLE_DEVICES": "1"}) as running:
        running.until(LISTENS)
        assert free(devices, "1") == TOTAL - CONTEXT - TOTAL // 2
        assert free(devices, "0") == TOTAL
        parts = {"context": CONTEXT, "weights": 10 * GIB, "kv": 30 * GIB}
        assert devices.holders() == [("chat", {"1": parts})]
        assert b"Available KV cache memory: 30.0 GiB\n" in running.output
    comes_back(devices, device="1")
    assert devices.most() == {"0": 0, "1": CONTEXT + TOTAL // 2}
    assert devices.starts() == {"chat": 1}
    assert not devices.events()


def test_an_engine_that_does_not_fit_dies_as_vllm_does(devices: Devices) -> None:
    """Its context is made first; then vLLM's line says what is free, and the daemon's diagnosis reads it."""
    with devices.taken("0", 41 * GIB), engine(*on(devices), env=FIRST) as running:
        output = running.rest().decode()
        assert running.code() == 1
    assert (
        "ValueError: Free memory on device cuda:0 (38.4/80.0 GiB) on startup is less than desired GPU memory "
        "utilization (0.5, 40.0 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.\n"
    ) in output
    found = diagnose(Exit(1, None), output.splitlines(), was_ready=False)
    assert found.reason == Reason.INSUFFICIENT_MEMORY
    assert found.message.startswith(
        "38.4 of 80.0 GiB are free on device cuda:0, and gpu_memory_utilization 0.5 asks for"
    )
    assert not devices.starts()
    missing = 41 * GIB + CONTEXT + 40 * GIB - TOTAL
    assert devices.events() == [{"what": "refused", "model": "chat", "device": "0", "bytes": missing}]
    comes_back(devices)


def test_what_is_exactly_enough_is_enough(devices: Devices) -> None:
    """The share rounded up to a byte, beside the context; one byte less is not."""
    room = TOTAL - math.ceil(TOTAL * 0.333) - CONTEXT
    with devices.taken("0", room), engine(*on(devices, 0.333), env=FIRST) as running:
        running.until(LISTENS)
        assert free(devices) == 0
    comes_back(devices)
    with devices.taken("0", room + 1), engine(*on(devices, 0.333), env=FIRST) as running:
        running.rest()
        assert running.code() == 1


def profiling(tmp_path: Path, devices: Devices, *flags: str) -> list[str]:
    """The options of an engine that profiles until there is a file."""
    return on(devices, 0.5, f"--fake-phase-until=profile={tmp_path}/go", *flags)


def reaches_profiling(running: Engine) -> None:
    """Wait until it does."""
    running.until(b"Model loading took")


def test_who_takes_memory_shrinks_the_cache_of_who_profiles(devices: Devices, tmp_path: Path) -> None:
    """By as much, on that device; it is noted, and the other one keeps what it has."""
    with engine(*profiling(tmp_path, devices), env=FIRST) as running:
        reaches_profiling(running)
        with devices.taken("0", GIB), devices.taken("1", GIB, "elsewhere"):
            (tmp_path / "go").touch()
            running.until(LISTENS)
            assert b"Available KV cache memory: 29.0 GiB\n" in running.output
            assert free(devices) == TOTAL - CONTEXT - 40 * GIB
    assert devices.events() == [{"what": "shrunk", "model": "chat", "device": "0", "bytes": GIB}]


def test_a_program_that_frees_memory_ends_who_profiles(devices: Devices, tmp_path: Path) -> None:
    """The assertion of vLLM, and exit code 1; memory of another device does not matter."""
    go = tmp_path / "go"
    with engine(*profiling(tmp_path, devices), env=FIRST) as running:
        with devices.taken("1", GIB):
            reaches_profiling(running)
        go.touch()
        running.until(LISTENS)
    go.unlink()
    comes_back(devices)
    with engine(*profiling(tmp_path, devices), env=FIRST) as running:
        with devices.taken("0", GIB):
            reaches_profiling(running)
        go.touch()
        line = (
            b"AssertionError: Error in memory profiling. Initial free memory 78.4 GiB, current free memory 79.4 GiB. "
        )
        assert line in running.rest()
        assert running.code() == 1
    assert devices.events() == [{"what": "disturbed", "model": "chat", "device": "0", "bytes": GIB}]


def test_an_engine_that_dies_ends_who_profiles(devices: Devices, tmp_path: Path) -> None:
    """One that is killed while another one measures: why only one may move on a device at a time."""
    with engine(*on(devices, 0.25), env=FIRST) as other:
        other.until(LISTENS)
        with engine(*profiling(tmp_path, devices), env=FIRST) as running:
            reaches_profiling(running)
            os.killpg(other.pid, signal.SIGKILL)
            comes_back(devices, TOTAL - CONTEXT - 10 * GIB)
            (tmp_path / "go").touch()
            running.rest()
            assert running.code() == 1
    (event,) = devices.events()
    assert (event["what"], event["bytes"]) == ("disturbed", CONTEXT + 20 * GIB)


def test_an_engine_without_a_cache_keeps_little(devices: Devices, tmp_path: Path) -> None:
    """It must find its share free, keeps what it is told to, and profiles nothing, so that nobody can disturb it."""
    flags = on(devices, 0.9, f"--fake-hold={GIB}", f"--fake-phase-until=profile={tmp_path}/go")
    with engine(*flags, env=FIRST) as running:
        with devices.taken("0", GIB):
            reaches_profiling(running)
        (tmp_path / "go").touch()
        running.until(LISTENS)
        assert free(devices) == TOTAL - CONTEXT - GIB
        assert not devices.events()
        with engine(*flags, env=FIRST) as other:
            other.until(LISTENS)
        with engine(*on(devices, 0.98, f"--fake-hold={GIB}"), env=FIRST) as other:
            other.rest()
            assert other.code() == 1


def test_memory_comes_back_some_time_after_a_death(devices: Devices) -> None:
    """Whoever killed it, and though nobody looks: at once, or so many seconds later."""
    with engine(*on(devices), "--fake-release-delay=0.05", env=FIRST) as running:
        running.until(LISTENS)
        os.killpg(running.pid, signal.SIGKILL)
        comes_back(devices)
    with engine(*on(devices), "--fake-release-delay=1000", env=FIRST) as running:
        running.until(LISTENS)
        os.killpg(running.pid, signal.SIGKILL)
        running.rest()
        meanwhile()
        assert free(devices) == TOTAL - CONTEXT - TOTAL // 2


def test_memory_is_the_core_s(devices: Devices) -> None:
    """The server's SIGKILL sets nothing free while the core survives it; in order, both end, and all is free."""
    with engine(*on(devices), env=FIRST) as running:
        running.until(LISTENS)
        os.kill(running.pid, signal.SIGKILL)
        running.code()
        meanwhile()
        assert free(devices) == TOTAL - CONTEXT - TOTAL // 2
        os.kill(core_of(running.output), signal.SIGKILL)
        comes_back(devices)
    with engine(*on(devices), env=FIRST) as running:
        running.until(LISTENS)
        os.kill(running.pid, signal.SIGTERM)
        comes_back(devices)


def test_each_worker_has_a_device(devices: Devices) -> None:
    """With tensor parallelism each device is asked for its own share; a worker that survives keeps what it has."""
    flags = on(devices, 0.5, "--tensor-parallel-size=2", "--fake-grandchildren=2")
    with engine(*flags, env={"CUDA_VISIBLE_DEVICES": "1,0"}) as running:
        workers = running.state()["workers"]
        used = TOTAL - CONTEXT - TOTAL // 2
        assert devices.free() == {"0": used, "1": used}
        os.kill(workers[0], signal.SIGKILL)
        comes_back(devices, device="1")  # the first of its devices
        assert free(devices, "0") == used
    comes_back(devices)
    with devices.taken("0", TOTAL // 2), engine(*flags, env={"CUDA_VISIBLE_DEVICES": "1,0"}) as running:
        assert b"Free memory on device cuda:1 (" in running.rest()


@pytest.mark.parametrize(("visible", "there"), [("1", 1), ("0,7", 1), ("7", 0)])
def test_there_must_be_as_many_devices_as_it_computes_on(devices: Devices, visible: str, there: int) -> None:
    """Of those that it sees, and that there are."""
    flags = on(devices, 0.5, "--tensor-parallel-size=2")
    with engine(*flags, env={"CUDA_VISIBLE_DEVICES": visible}) as running:
        said = f"World size (2) is larger than the number of available GPUs ({there}) in this node."
        assert said.encode() in running.rest()
        assert running.code() == 1


def test_an_engine_that_sees_no_device_uses_none(devices: Devices) -> None:
    """It serves, whatever its share."""
    with devices.taken("0", TOTAL), engine(*on(devices), env={"CUDA_VISIBLE_DEVICES": ""}) as running:
        running.until(LISTENS)


def test_what_was_not_free_at_first_is_somebody_else_s(tmp_path: Path) -> None:
    """The file is written by hand, or by whoever has the devices."""
    file = tmp_path / "devices.toml"
    file.write_text('"0" = {total = 1000, free = 400}')
    with Ledger(str(file)).changed(wakes=False) as state:
        assert state.free("0") == 400
        assert [(one["model"], one["has"]) for one in state.holders.values()] == [("others", {"0": {"other": 600}})]


def test_the_file_is_whole_whenever_it_is_read(devices: Devices) -> None:
    """By a reader without a lock, while it changes again and again."""
    over = threading.Event()

    def change() -> None:
        for _ in range(300):
            with devices.taken("0", GIB):
                pass
        over.set()

    changing = threading.Thread(target=change)
    changing.start()
    found = set()
    while not over.is_set():
        found.add(free(devices))
    changing.join()
    assert found == {TOTAL, TOTAL - GIB}


def test_a_ledger_that_nobody_keeps_is_a_bad_option(tmp_path: Path) -> None:
    """Nothing would give back what the dead had."""
    with Devices(tmp_path / "devices.toml", {"0": TOTAL}) as devices:
        pass
    with engine(*on(devices), env=FIRST) as running:
        assert b"error: nobody keeps " in running.rest()
        assert running.code() == 2
