"""Logs of instances that the file has no more go, a week after their last line; no other file does."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.engine.virtual import Stage, model, virtual
from tests.fleet.test_reconciler import reconciler_of
from vllm_proxy.engine.state import file_name
from vllm_proxy.fleet.old_logs import _names_of, remove

NOW = 1_800_000_000.0
WEEK = 7 * 86_400.0
LONG = f"{'org/' * 60}model/0"


class Place:
    """A state directory with a log that was written just now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "logs").mkdir()
        self.add("chat/0", 0.0)

    def add(self, instance: str, age: float) -> Path:
        """A log whose last line is so old."""
        return self.put(f"{file_name(instance)}.log", age)

    def put(self, name: str, age: float) -> Path:
        """A file."""
        file = self.path / "logs" / name
        file.write_text("last words")
        os.utime(file, (NOW - age, NOW - age))
        return file

    def remove(self, *known: str, now: float = NOW) -> None:
        """A look. `known`: instances of the file."""
        remove(self.path, lambda: {f"{file_name(instance)}.log" for instance in ("chat/0", *known)}, now)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """One."""
    return Place(tmp_path)


@pytest.mark.parametrize("instance", ["gone/0", "org/gone/12", "chat/1", LONG])
def test_the_log_of_what_the_file_has_no_more_goes_after_a_week(place: Place, instance: str) -> None:
    """A model that is gone, or an instance of fewer replicas; until then somebody may ask why it died."""
    file = place.add(instance, WEEK - 60)
    place.remove()
    assert file.exists()
    place.remove(now=NOW + 3600)
    assert file.exists()  # the clock may be wrong: nothing has been written since
    place.add("chat/0", -3600)
    with capture_logs() as logged:
        place.remove(now=NOW + 3600)
    assert not file.exists()
    assert [line["file"] for line in logged] == [str(file)]


def test_what_the_file_has_keeps_its_log(place: Place) -> None:
    """However long it has not run."""
    file = place.add("idle/0", 100 * WEEK)
    place.remove("idle/0")
    assert file.exists()


@pytest.mark.parametrize("record", ["engines.toml", "engines.toml.unreadable"])
@pytest.mark.parametrize("instance", ["gone/0", LONG])
def test_an_engine_on_record_keeps_its_log(place: Place, record: str, instance: str) -> None:
    """It lives, or nobody knows: of another container, or in a record that cannot be read."""
    file = place.add(instance, 100 * WEEK)
    (place.path / record).write_text(f'what = "is this"\nlog = "{file}"')
    place.remove()
    assert file.exists()


@pytest.mark.parametrize(
    "name", ["notes.txt", "gone.log", "gone%2F0.log.gz", "gone%2Fx.log", "gone%2F0.log~", "a~0.log"]
)
def test_other_files_are_left_alone(place: Place, name: str) -> None:
    """Whoever put them there."""
    file = place.put(name, 100 * WEEK)
    place.remove()
    assert file.exists()


def test_what_is_no_file_is_left_alone(place: Place) -> None:
    """Links and folders, under the name of a log."""
    target = place.put("target", 100 * WEEK)
    link, folder = place.path / "logs" / "link%2F0.log", place.path / "logs" / "folder%2F0.log"
    link.symlink_to(target)
    folder.mkdir()
    for each in (link, folder):
        os.utime(each, (0, 0), follow_symlinks=False)
    place.remove()
    assert link.is_symlink()
    assert folder.is_dir()
    assert target.exists()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    """And nothing fails."""
    with capture_logs() as logged:
        remove(tmp_path, set, NOW)
    assert [line["log_level"] for line in logged] == ["warning"]


@virtual
async def test_every_instance_of_the_file_and_every_one_that_there_is_keeps_its_log(tmp_path: Path) -> None:
    """Disabled ones too, and those that are about to end."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a", replicas=2), model("b", enabled=False))
    assert _names_of(reconciler) == {"a%2F0.log", "a%2F1.log", "b%2F0.log"}
    reconciler.config = replace(reconciler.config, models={})
    assert _names_of(reconciler) == {"a%2F0.log", "a%2F1.log"}
    await reconciler.stop()
