"""How devices are followed: the cadence and failures in virtual time, hanging looks with real threads."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from vllm_proxy.domain.inventory import Foreign, Seen
from vllm_proxy.domain.ledger import Kind
from vllm_proxy.engine import devices
from vllm_proxy.engine.device_source import Sight, SourceError
from vllm_proxy.engine.devices import Inventory
from vllm_proxy.engine.ownership import Identity, Owned
from vllm_proxy.runtime.background import spawn
from vllm_proxy.runtime.threads import running

from .virtual import now, passes, settle, virtual


def gpu(free: int | None, name: str = "0") -> Seen:
    """One that our engine and another program use, as long as that can be measured."""
    held = {} if free is None else {"chat/0": 10}
    foreign = () if free is None else (Foreign(7, "python3", 5),)
    return Seen(name, name, int(name), "a GPU", Kind.GPU, unified=False, total=100, free=free, held=held,
                foreign=foreign, visible=name)  # fmt: skip


class FakeSource:
    """Says what a test lets it say, and notes when it was asked."""

    def __init__(self) -> None:
        self.sight = Sight((gpu(80),))
        self.error: Exception | None = None
        self.asked_at: list[float] = []
        self.engines: Mapping[str, Owned] = {}
        self.closed = 0

    def look(self, engines: Mapping[str, Owned], /) -> Sight:
        """As a driver."""
        self.asked_at.append(now())
        self.engines = engines
        if self.error:
            raise self.error
        return self.sight

    def close(self) -> None:
        """Count it."""
        self.closed += 1


class AtOnce:
    """What a thread would do, in virtual time: `seconds` later."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def __call__[**P, T](self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it."""
        await asyncio.sleep(self.seconds)
        return function(*args, **kwargs)

    def close(self) -> None:
        """Nothing is there to be ended."""


class Stage:
    """An inventory whose automatic source is a fake, and who follows it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source = FakeSource()
        self.threads = AtOnce()
        monkeypatch.setattr(devices, "_Auto", lambda: self.source)
        self.engines: dict[str, Owned] = {}
        self.inventory = Inventory("auto", Path("/nowhere"), {}, lambda: self.engines, lambda: self.threads)
        self.asked = False
        self.changes: list[float] = []

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Inside the block."""
        task = spawn(self.inventory.follow(lambda: self.asked, lambda: self.changes.append(now())), "test")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    def looks(self) -> list[float]:
        """When it was looked since this was asked last, rounded."""
        times, self.source.asked_at = self.source.asked_at, []
        return [round(time, 3) for time in times]

    async def fails(self, times: int, why: str = "gone") -> None:
        """So many looks fail in a row."""
        self.source.error = SourceError(why)
        for _ in range(times):
            await self.inventory.look()
        self.source.error = None


@virtual
async def test_devices_are_looked_at_every_five_seconds_and_often_while_somebody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every 50 ms; whoever begins to wait says so, and is served at once; when nobody waits any more it is rare."""
    stage = Stage(monkeypatch)
    async with stage.following():
        await passes(11)
        assert stage.looks() == [0, 5, 10]
        stage.asked = True
        stage.inventory.wake()
        await passes(0.22)
        assert stage.looks() == [11, 11.05, 11.1, 11.15, 11.2]
        stage.asked = False
        await passes(6)
        assert stage.looks() == [11.25, 16.25]


@virtual
async def test_who_wakes_it_again_and_again_causes_a_look_every_5_ms_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wake that comes right behind a look counts, 5 ms later."""
    stage = Stage(monkeypatch)
    async with stage.following():
        await passes(0.001)
        for _ in range(100):
            stage.inventory.wake()
            await passes(0.001)
        assert 20 <= len(stage.looks()) <= 22
        await passes(4)
        assert len(stage.looks()) <= 1


@virtual
async def test_only_what_is_new_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of looks that find nothing new nobody is told; nor is a change lost that another look has found."""
    stage = Stage(monkeypatch)
    async with stage.following():
        await passes(11)
        assert stage.changes == [0]
        stage.source.sight = Sight((gpu(70),))
        await passes(10)
        assert stage.changes == [0, 15]
        assert stage.inventory.devices == {"0": gpu(70)}
        stage.source.sight = Sight((gpu(60),))
        await stage.inventory.look()
        await passes(5)
        assert stage.changes == [0, 15, 25]


@virtual
async def test_what_a_look_saw_is_dated_when_it_began_and_a_failed_one_saw_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What began later than that may not be in it."""
    stage = Stage(monkeypatch)
    stage.threads.seconds = 2
    await stage.inventory.look()
    assert (now(), stage.inventory.seen_at, stage.inventory.looked_at) == (2, 0, 0)
    await stage.fails(1)
    assert (now(), stage.inventory.seen_at, stage.inventory.looked_at) == (4, 0, 2)


@virtual
async def test_a_listener_that_fails_does_not_end_the_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged, and the next change is told again."""
    stage = Stage(monkeypatch)

    def fail() -> None:
        raise ZeroDivisionError

    with capture_logs():
        task = spawn(stage.inventory.follow(lambda: False, fail), "test")
        await passes(6)
        assert stage.looks() == [0, 5]
        task.cancel()


@virtual
async def test_what_was_seen_counts_until_three_looks_in_a_row_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is measured any more: who has what is unknown, and the total stays. It is said once, and why."""
    stage = Stage(monkeypatch)
    await stage.inventory.look()
    with capture_logs() as logs:
        await stage.fails(2)
        assert (stage.inventory.devices, stage.inventory.problem) == ({"0": gpu(80)}, None)
        await stage.inventory.look()
        await stage.fails(2)
        assert logs == [], "they were not three in a row"
        await stage.fails(7)
        assert stage.inventory.devices == {"0": gpu(None)}
        assert stage.inventory.managed
        assert "gone" in (stage.inventory.problem or "")
        assert [entry["log_level"] for entry in logs] == ["warning"]
        await stage.inventory.look()
        assert (stage.inventory.devices, stage.inventory.problem) == ({"0": gpu(80)}, None)
        assert [entry["log_level"] for entry in logs] == ["warning", "info"]


@virtual
async def test_a_first_look_that_fails_is_a_problem_and_engines_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until one works."""
    stage = Stage(monkeypatch)
    with capture_logs() as logs:
        await stage.fails(1)
        assert not stage.inventory.managed
        assert "take turns" in (stage.inventory.problem or "")
        assert len(logs) == 1
        await stage.inventory.look()
    assert stage.inventory.managed
    assert stage.inventory.problem is None


@virtual
async def test_a_bug_in_a_source_is_a_failure_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logged with where it was raised, and followed by the next look."""
    stage = Stage(monkeypatch)
    stage.source.error = AttributeError("nvmlLib")
    with capture_logs() as logs:
        await stage.inventory.look()
    assert "AttributeError" in (stage.inventory.problem or "")
    assert logs[0]["exc_info"] is stage.source.error


@virtual
async def test_what_a_source_misses_is_a_problem_and_the_rest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that was lost, say. Another problem is not logged again while there is one."""
    stage = Stage(monkeypatch)
    with capture_logs() as logs:
        stage.source.sight = Sight((gpu(80, "1"),), "GPU 0 is left out: it was lost")
        await stage.inventory.look()
        assert stage.inventory.problem == "GPU 0 is left out: it was lost"
        assert list(stage.inventory.devices) == ["1"]
        await stage.inventory.look()
    assert len(logs) == 1


@virtual
async def test_a_look_that_takes_too_long_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After five seconds; what it answers later does not count."""
    stage = Stage(monkeypatch)
    stage.threads.seconds = 60
    with capture_logs():
        began = now()
        await stage.inventory.look()
        assert now() - began == 5
    assert "nothing has answered for 5 s" in (stage.inventory.problem or "")
    await passes(60)
    assert stage.inventory.devices == {}


@virtual
async def test_a_source_knows_the_engines_of_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run when the look begins."""
    stage = Stage(monkeypatch)
    await stage.inventory.look()
    assert stage.source.engines == {}
    stage.engines["chat/0"] = Owned(Identity(7, 7))
    await stage.inventory.look()
    assert stage.source.engines == stage.engines


@virtual
async def test_another_source_counts_once_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who follows is told; the one before lets go of its driver. "none" counts at once."""
    stage = Stage(monkeypatch)
    async with stage.following():
        await passes(1)
        assert stage.looks() == [0]
        stage.inventory.use("auto")
        await passes(1)
        assert stage.looks() == [], "it is the same"
        before, stage.source = stage.source, FakeSource()
        stage.inventory.use("cpu")
        stage.source.sight = Sight((gpu(70, "1"),))
        stage.inventory.use("auto")
        assert list(stage.inventory.devices) == ["0"]
        await passes(0.1)
        assert list(stage.inventory.devices) == ["1"]
        assert before.closed == 1
        stage.inventory.use("none")
        assert not stage.inventory.managed
        await passes(10)
        assert len(stage.looks()) == 1
        assert len(stage.changes) == 3


@virtual
async def test_another_source_that_fails_leaves_nothing_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its devices may be others. That is a problem at once, and none of the source that follows."""
    stage = Stage(monkeypatch)
    await stage.inventory.look()
    stage.inventory.use("a file that is not there")
    with capture_logs():
        await stage.inventory.look()
    assert (stage.inventory.managed, stage.inventory.problem is None) == (False, False)
    stage.inventory.use("none")
    assert stage.inventory.problem is None


@virtual
async def test_an_answer_of_a_source_that_is_not_used_any_more_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does its failure."""
    stage = Stage(monkeypatch)
    for error in (None, SourceError("gone")):
        stage.source.error = error
        stage.threads.seconds = 1
        look = spawn(stage.inventory.look(), "test")
        await settle()
        stage.inventory.use("none")
        await look
        assert (stage.inventory.devices, stage.inventory.problem) == ({}, None)
        stage.inventory.use("auto")


@virtual
async def test_engines_are_placed_on_what_the_environment_shows() -> None:
    """Of the machine's memory all; of devices those that CUDA_VISIBLE_DEVICES names."""
    inherited = {"CUDA_VISIBLE_DEVICES": "1"}
    source = FakeSource()
    source.sight = Sight((gpu(80), gpu(80, "1")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_Auto", lambda: source)
        found = Inventory("auto", Path("/nowhere"), inherited, dict, AtOnce)
    assert found.usable == frozenset()
    await found.look()
    assert found.usable == {"1"}


async def test_a_file_is_found_beside_the_configuration(tmp_path: Path) -> None:
    """A relative path begins there. What it says is followed; while it is torn, what it said counts."""
    file = tmp_path / "devices.toml"
    inventory = Inventory("devices.toml", tmp_path, {}, dict)
    with contextlib.closing(inventory), capture_logs():
        await inventory.look()
        assert "devices.toml" in (inventory.problem or "")
        file.write_text('"0" = {total = 100, free = 80}', encoding="utf-8")
        await inventory.look()
        assert (inventory.devices["0"].free, inventory.problem) == (80, None)
        file.write_text('"0" = {total = 1', encoding="utf-8")
        await inventory.look()
        file.unlink()
        await inventory.look()
        assert (inventory.devices["0"].free, inventory.problem) == (80, None)
        await inventory.look()
        assert inventory.devices["0"].free is None
        inventory.use("cpu")
        await inventory.look()
        assert inventory.usable == {"cpu"}


async def test_a_machine_without_gpus_has_no_devices_and_no_problem(tmp_path: Path) -> None:
    """Engines take turns there, as they always did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "Nvml", lambda _: FakeNothing())
        patch.setattr(devices, "AmdGpu", FakeNothing)
        inventory = Inventory("auto", tmp_path, {}, dict)
    with contextlib.closing(inventory):
        await inventory.look()
    assert (inventory.devices, inventory.managed, inventory.problem) == ({}, False, None)


class FakeNothing:
    """A kind of GPU that a test puts in and takes out."""

    sight = Sight()

    def look(self, _: Mapping[str, Owned], /) -> Sight:
        """What there is."""
        return self.sight

    def close(self) -> None:
        """Nothing is open."""


async def test_gpus_that_were_there_do_not_become_none(tmp_path: Path) -> None:
    """The first kind that is found stays: where all of it vanish that is a failure, and no machine without GPUs."""
    nvidia, amd = FakeNothing(), FakeNothing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "Nvml", lambda _: nvidia)
        patch.setattr(devices, "AmdGpu", lambda: amd)
        inventory = Inventory("auto", tmp_path, {}, dict)
    with contextlib.closing(inventory), capture_logs():
        await inventory.look()
        nvidia.sight = Sight((gpu(80),))
        await inventory.look()
        assert inventory.managed, "the driver was loaded later"
        nvidia.sight, amd.sight = Sight(), Sight((gpu(80, "1"),))
        for _ in range(3):
            await inventory.look()
        assert inventory.devices == {"0": gpu(None)}
        assert "no GPU is left" in (inventory.problem or "")


class Hanging:
    """A source that answers when it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.calls = 0

    def look(self, _: Mapping[str, Owned], /) -> Sight:
        """Hang."""
        self.calls += 1
        self.go.wait()
        return Sight((gpu(80),))

    def close(self) -> None:
        """Hang as well: the driver does."""
        self.go.wait()


async def test_a_look_that_hangs_takes_one_thread_and_holds_up_no_other_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is tried, and only the first try waits for it; it comes back when the driver does.

    Another source is looked at meanwhile.
    """
    hanging = Hanging()
    monkeypatch.setattr(devices, "_Auto", lambda: hanging)
    monkeypatch.setattr(devices, "LOOK_SECONDS", 0.01)
    inventory = Inventory("auto", tmp_path, {}, dict)
    with contextlib.closing(inventory), capture_logs():
        while not hanging.calls:
            await inventory.look()
        monkeypatch.setattr(devices, "LOOK_SECONDS", 60)
        for _ in range(5):
            await inventory.look()
        assert (hanging.calls, running().count("_Watched.look")) == (1, 1)
        assert "nothing has answered" in (inventory.problem or "")
        inventory.use("cpu")
        await inventory.look()
        assert inventory.usable == {"cpu"}
        inventory.use("auto")
        look = spawn(inventory.look(), "test")
        while hanging.calls < 2:
            await asyncio.sleep(0.001)
        hanging.go.set()
        await look
    assert inventory.devices == {"0": gpu(80)}


async def test_a_source_that_hung_is_asked_again_once_it_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it answered too late does not count: that was long ago."""
    hanging = Hanging()
    monkeypatch.setattr(devices, "_Auto", lambda: hanging)
    monkeypatch.setattr(devices, "LOOK_SECONDS", 0.01)
    inventory = Inventory("auto", tmp_path, {}, dict)
    with contextlib.closing(inventory), capture_logs():
        while not hanging.calls:
            await inventory.look()
        hanging.go.set()
        while "_Watched.look" in running():
            await asyncio.sleep(0.001)
        assert inventory.devices == {}
        monkeypatch.setattr(devices, "LOOK_SECONDS", 60)
        await inventory.look()
    assert (inventory.devices, inventory.problem, hanging.calls) == ({"0": gpu(80)}, None, 2)
