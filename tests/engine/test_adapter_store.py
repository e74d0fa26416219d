"""Snapshots of adapters: what is copied, what stays, what goes, and what becomes of disks and files that fail."""

import asyncio
import errno
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import structlog

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.engine import adapter_store
from vllm_proxy.engine.adapter_source import AdapterError
from vllm_proxy.engine.adapter_store import AdapterStore

SPEC = EngineSpec(model="org/chat")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Anywhere:
    """Every path is a folder's."""

    async def find(self, spec: EngineSpec, path: str, *, is_hub_id: bool) -> Path:
        """That one."""
        assert (spec, is_hub_id) == (SPEC, False)
        return Path(path)


def adapter(folder: Path, weights: bytes = b"weights", name: str = WEIGHTS) -> str:
    """A folder as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"r": 8}))
    (folder / name).write_bytes(weights)
    (folder / "README.md").write_text("about it")
    return str(folder)


@pytest.fixture
async def store(tmp_path: Path) -> AdapterStore:
    """An empty one."""
    made = AdapterStore(tmp_path / "adapters", Anywhere())
    await made.open()
    return made


async def snapshot(store: AdapterStore, path: str) -> Path:
    """That of a path, which nobody holds any more."""
    async with store.held(SPEC, path, is_hub_id=False) as folder:
        return folder


def listed(tmp_path: Path) -> list[str]:
    """All that is in the store."""
    return sorted(os.listdir(tmp_path / "adapters"))  # noqa: PTH208 - hidden ones too


async def test_a_snapshot_holds_what_vllm_reads_under_its_digest(tmp_path: Path, store: AdapterStore) -> None:
    """Nothing else; the same content is the same path, another content is another, wherever it lies."""
    first = await snapshot(store, adapter(tmp_path / "a"))
    assert sorted(file.name for file in first.iterdir()) == [CONFIG, WEIGHTS]
    assert (first / WEIGHTS).read_bytes() == b"weights"
    assert first.is_absolute()
    assert store.is_own(first)
    assert not store.is_own(tmp_path / "a")
    assert await snapshot(store, adapter(tmp_path / "b")) == first
    other = await snapshot(store, adapter(tmp_path / "a", b"other weights"))
    assert other != first
    assert listed(tmp_path) == sorted([first.name, other.name])


async def test_a_snapshot_is_untouched_by_what_becomes_of_its_source(tmp_path: Path, store: AdapterStore) -> None:
    """Written in place, truncated, removed: a training script does all of that."""
    path = adapter(tmp_path / "a")
    folder = await snapshot(store, path)
    with (tmp_path / "a" / WEIGHTS).open("r+b") as file:
        file.write(b"CHANGED")
    (tmp_path / "a" / CONFIG).unlink()
    assert (folder / WEIGHTS).read_bytes() == b"weights"
    assert (folder / CONFIG).is_file()


async def test_links_are_followed_as_the_hubs_cache_has_them(tmp_path: Path, store: AdapterStore) -> None:
    """The snapshot holds files."""
    path = adapter(tmp_path / "a")
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "a" / WEIGHTS).unlink()
    (tmp_path / "a" / WEIGHTS).symlink_to(tmp_path / "blob")
    folder = await snapshot(store, path)
    assert not (folder / WEIGHTS).is_symlink()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
async def test_weights_of_the_older_kinds_count_where_there_are_no_newer(
    tmp_path: Path, store: AdapterStore, name: str
) -> None:
    """In vLLM's order."""
    folder = await snapshot(store, adapter(tmp_path / "a", b"old", name))
    assert (folder / name).read_bytes() == b"old"
    newer = await snapshot(store, adapter(tmp_path / "a", b"new"))
    assert not (newer / name).exists()


async def test_where_blocks_cannot_be_shared_bytes_are_copied(
    tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between file systems, say."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    folder = await snapshot(store, adapter(tmp_path / "a", b"x" * 3_000_000))
    assert (folder / WEIGHTS).stat().st_size == 3_000_000


async def test_a_sweep_removes_what_nobody_uses_or_holds(tmp_path: Path, store: AdapterStore) -> None:
    """Blocks may nest; what is in use is asked for once, at the moment of the decision."""
    used, held, gone = [await snapshot(store, adapter(tmp_path / name, name.encode())) for name in ("a", "b", "c")]
    asked: list[None] = []

    def in_use() -> Iterable[Path]:
        asked.append(None)
        return [used, tmp_path / "elsewhere"]

    async with store.held(SPEC, str(tmp_path / "b"), is_hub_id=False) as again:
        assert again == held
        async with store.held(SPEC, str(tmp_path / "b"), is_hub_id=False):
            pass
        await store.sweep(in_use)
        assert listed(tmp_path) == sorted([used.name, held.name])
    await store.sweep(in_use)
    assert listed(tmp_path) == [used.name]
    assert len(asked) == 2
    assert not gone.exists()


async def test_one_that_is_asked_for_while_it_is_swept_is_made_anew(tmp_path: Path) -> None:
    """It is never handed out on its way out."""
    going, go = threading.Event(), threading.Event()
    store = AdapterStore(tmp_path / "adapters", Anywhere())
    await store.open()
    path = adapter(tmp_path / "a")
    folder = await snapshot(store, path)
    hide = store._hide

    def slowly(folders: Iterable[Path]) -> list[Path]:
        going.set()
        go.wait()
        return hide(folders)

    store._hide = slowly  # type: ignore[method-assign]
    sweep = asyncio.create_task(store.sweep(list))
    await asyncio.to_thread(going.wait)
    entering = asyncio.create_task(snapshot(store, path))
    while not store._holders:
        await asyncio.sleep(0.001)
    go.set()
    await sweep
    assert await entering == folder
    assert (folder / WEIGHTS).read_bytes() == b"weights"


async def test_what_is_half_made_goes_at_the_next_start(tmp_path: Path, store: AdapterStore) -> None:
    """A daemon that was killed meanwhile leaves it; what is whole stays."""
    folder = await snapshot(store, adapter(tmp_path / "a"))
    (tmp_path / "adapters" / ".0123").mkdir()
    (tmp_path / "adapters" / ".0123" / WEIGHTS).write_bytes(b"half")
    await AdapterStore(tmp_path / "adapters", Anywhere()).open()
    assert listed(tmp_path) == [folder.name]


def without(name: str) -> Any:  # noqa: ANN401 - a function
    """One of its files is gone."""
    return lambda folder: (folder / name).unlink()


def as_folder(folder: Path) -> None:
    """Something else lies there."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def as_fifo(folder: Path) -> None:
    """It would be waited for."""
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def as_large(folder: Path) -> None:
    """No configuration is so large."""
    os.truncate(folder / CONFIG, 2**21)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (without(CONFIG), "there is no adapter_config.json"),
        (without(WEIGHTS), "there is no adapter_model.safetensors"),
        (as_folder, "it is a directory; expected a regular file"),
        (as_fifo, "it is a pipe or FIFO"),
        (as_large, "adapter_config.json is larger than 1 MiB"),
    ],
)
async def test_files_that_are_none_are_told(
    tmp_path: Path,
    store: AdapterStore,
    damage: Any,  # noqa: ANN401 - a function
    why: str,
) -> None:
    """In a sentence with the folder; nothing is left behind."""
    path = adapter(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(AdapterError) as caught:
        await snapshot(store, path)
    assert str(caught.value).startswith(f"cannot read the adapter in {path}: {why}")
    assert listed(tmp_path) == []


async def test_a_folder_that_is_not_there_is_told(tmp_path: Path, store: AdapterStore) -> None:
    """It is that adapter's failure."""
    with pytest.raises(AdapterError, match="there is no such folder"):
        await snapshot(store, str(tmp_path / "missing"))


@pytest.mark.parametrize("call", ["fsync", "copy_file_range"])
async def test_a_disk_that_fails_leaves_nothing_behind(
    tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Full, or broken: the next attempt begins anew."""
    path = adapter(tmp_path / "a")

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(AdapterError, match="No space left on device"):
            await snapshot(store, path)
        assert listed(tmp_path) == []
    assert (await snapshot(store, path) / WEIGHTS).exists()


async def test_a_disk_that_is_nearly_full_is_not_filled(
    tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of engines lies on it too."""
    monkeypatch.setattr(adapter_store, "_SPARE_BYTES", 2**60)
    with pytest.raises(AdapterError, match="no room on the disk"):
        await snapshot(store, adapter(tmp_path / "a"))
    assert listed(tmp_path) == []


async def test_snapshots_are_bounded_in_number(
    tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are there go on being found."""
    monkeypatch.setattr(adapter_store, "_MOST_SNAPSHOTS", 1)
    folder = await snapshot(store, adapter(tmp_path / "a", b"a"))
    with pytest.raises(AdapterError, match="there are 1 snapshots"):
        await snapshot(store, adapter(tmp_path / "b", b"b"))
    assert await snapshot(store, str(tmp_path / "a")) == folder


async def test_a_file_that_changes_while_it_is_read_is_no_snapshot(
    tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half old and half new would be given a name that is not its own."""
    path = adapter(tmp_path / "a")
    copy = os.copy_file_range

    def change(*args: Any) -> int:  # noqa: ANN401
        (tmp_path / "a" / WEIGHTS).write_bytes(b"changed")
        return copy(*args)

    monkeypatch.setattr(os, "copy_file_range", change)
    with pytest.raises(AdapterError, match="it changes while it is read"):
        await snapshot(store, path)
    assert listed(tmp_path) == []


async def test_whoever_is_cancelled_leaves_nothing_half_made(
    tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread notices between two pieces."""
    copying, go = threading.Event(), threading.Event()

    def slowly(*_: object) -> int:
        copying.set()
        go.wait()
        raise OSError(errno.EXDEV, "x")

    monkeypatch.setattr(os, "copy_file_range", slowly)
    task = asyncio.create_task(snapshot(store, adapter(tmp_path / "a")))
    await asyncio.to_thread(copying.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(listed(tmp_path)) == 1
    go.set()
    while listed(tmp_path):
        await asyncio.sleep(0.001)


async def test_a_sweep_that_fails_is_logged_and_raises_nothing(tmp_path: Path, store: AdapterStore) -> None:
    """The next one tries again."""
    (tmp_path / "adapters").rmdir()
    with structlog.testing.capture_logs() as logs:
        await store.sweep(list)
    assert "cannot be removed" in logs[0]["event"]
