"""What a path of the configuration leads to: revisions, and the folders of adapters."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_proxy.domain.config import revision_of
from vllm_proxy.domain.references import AdapterFolder
from vllm_proxy.runtime.watched_files import adapter_folder, revision_at


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of an adapter."""
    found = tmp_path / "adapter"
    found.mkdir()
    (found / "adapter_config.json").write_text("{}")
    (found / "adapter_model.safetensors").write_bytes(b"0" * 100)
    return found


def test_the_revision_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    """However it is called and whenever it was written; of nothing there is none."""
    (tmp_path / "a").write_text("x")
    assert revision_at(tmp_path / "a") == revision_of(b"x")
    assert revision_at(tmp_path / "none") == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"1" * 99),
        lambda folder: os.utime(folder / "adapter_model.safetensors", (1, 1)),
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        lambda folder: (folder / "more").write_text(""),
        lambda folder: (folder / "adapter_config.json").unlink(),
    ],
)
def test_the_revision_of_a_folder_is_that_of_its_files(change: Callable[[Path], None], folder: Path) -> None:
    """Their names, sizes and times; what lies in folders within it is nobody's."""
    before = revision_at(folder)
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "x").write_text("")
    (folder / "to-nowhere").symlink_to("none")
    assert revision_at(folder) == before
    change(folder)
    assert revision_at(folder) not in {before, ""}


def test_a_folder_is_read_as_far_as_it_goes(folder: Path, tmp_path: Path) -> None:
    """And what is missing is said."""
    assert adapter_folder(folder) == AdapterFolder(revision_at(folder), b"{}")
    (folder / "adapter_config.json").unlink()
    found = adapter_folder(folder)
    assert (found.is_there, found.config) == (True, None)
    assert found.problem == "cannot read adapter_config.json in it: No such file or directory"
    assert adapter_folder(tmp_path / "none") == AdapterFolder(problem="there is no such folder", has_place=True)
    assert not adapter_folder(tmp_path / "org" / "none").has_place
    os.mkfifo(folder / "adapter_config.json")
    assert "FIFO" in (adapter_folder(folder).problem or "")


def test_what_may_not_be_looked_at_is_no_folder(tmp_path: Path) -> None:
    """As in one that is closed to this user; such a question has an answer and is no failure of who asks."""
    closed = tmp_path / ("x" * 300)  # refused by the system in the same way, to root too
    for folder in (closed, closed / "adapter"):
        assert adapter_folder(folder) == AdapterFolder(
            problem="its folder cannot be looked at: File name too long", has_place=True
        )
        assert revision_at(folder) == ""


def test_a_folder_or_a_configuration_without_end_is_not_read(folder: Path) -> None:
    """Somebody's home is no adapter."""
    (folder / "adapter_config.json").write_bytes(b" " * (2**20 + 1))
    assert "larger than 1 MiB" in (adapter_folder(folder).problem or "")
    for number in range(1000):
        (folder / str(number)).touch()
    assert not adapter_folder(folder).is_there
    assert "more than 1000 files" in (adapter_folder(folder).problem or "")
