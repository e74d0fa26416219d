"""Temporary folders of engines whose record is lost."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from vllm_proxy.engine import scratch

OLD = 1_000_000_000  # of an age that no folder in use has just been made


class Place:
    """A folder for engines' folders, and a state directory."""

    def __init__(self, path: Path) -> None:
        self.scratch, self.state = path / "run", path / "state"
        self.scratch.mkdir()
        self.state.mkdir()

    def folder(self, name: str, state: Path | None = None, *, old: bool = True) -> Path:
        """One of an engine, with something in it."""
        made = self.scratch / name
        made.mkdir(mode=0o700)
        (made / "deep").mkdir()
        (made / "deep" / "file").write_text("x")
        scratch.sign(made, state or self.state)
        if old:
            os.utime(made / ".vllm-proxy", (OLD, OLD))
        return made

    def sweep(self) -> list[str]:
        """Which folders are there afterwards."""
        scratch.sweep(self.scratch, self.state)
        return sorted(each.name for each in self.scratch.iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty one."""
    return Place(tmp_path)


def change(**fields: str) -> Callable[[Path], None]:
    """Another signature in an old file."""

    def work(folder: Path) -> None:
        file = folder / ".vllm-proxy"
        file.write_bytes(msgspec.json.encode(msgspec.json.decode(file.read_bytes()) | fields))
        os.utime(file, (OLD, OLD))

    return work


def unsigned(folder: Path) -> None:
    """As an older daemon makes it, or somebody else."""
    (folder / ".vllm-proxy").unlink()


def spoilt(folder: Path) -> None:
    """No signature, but something in its place."""
    (folder / ".vllm-proxy").write_text("{")


def linked(folder: Path) -> None:
    """A link to a signature."""
    (folder / ".vllm-proxy").rename(folder / "real")
    (folder / ".vllm-proxy").symlink_to(folder / "real")


def opened(folder: Path) -> None:
    """Others may look in."""
    folder.chmod(0o755)


def test_a_folder_that_no_record_names_goes_with_all_that_is_in_it(place: Place) -> None:
    """The state directory was removed under a daemon that was killed, and another one started there."""
    place.folder("vp-lost")
    assert place.sweep() == []


def test_a_folder_that_a_record_names_stays(place: Place) -> None:
    """In use or not, and also where that record cannot be used, or was set aside."""
    for name, file in (("vp-a", "engines.toml"), ("vp-b", "engines.toml.unreadable")):
        (place.state / file).write_text(f'rubbish "{place.folder(name)}"')
    assert place.sweep() == ["vp-a", "vp-b"]


@pytest.mark.parametrize(
    "spoil", [unsigned, spoilt, linked, opened, change(state="/another"), change(namespace="pid:[1]")]
)
def test_a_folder_that_may_be_somebody_elses_stays(place: Place, spoil: Callable[[Path], None]) -> None:
    """Without a signature that can be trusted, of another daemon's, or whose processes are not seen from here."""
    spoil(place.folder("vp-other"))
    assert place.sweep() == ["vp-other"]


def test_what_is_no_folder_of_an_engine_is_not_looked_at(place: Place) -> None:
    """Another name, and a link to a folder that would go."""
    place.folder("mine")
    (place.scratch / "vp-link").symlink_to(place.folder("else"))
    assert place.sweep() == ["else", "mine", "vp-link"]


def test_a_folder_of_an_earlier_boot_goes_wherever_its_processes_were(place: Place) -> None:
    """None of them lives."""
    change(boot="an-earlier-one", namespace="pid:[1]")(place.folder("vp-lost"))
    assert place.sweep() == []


def test_a_folder_that_has_just_been_made_stays(place: Place) -> None:
    """Its engine may be about to start."""
    place.folder("vp-young", old=False)
    assert place.sweep() == ["vp-young"]


def test_an_engine_that_nobody_knows_is_reported_and_keeps_its_folder(place: Place) -> None:
    """It lives, and its record is lost: only a person can end it, whom the log tells its process."""
    folder = place.folder("vp-lost")
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(
        command, env={"TMPDIR": str(folder)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as engine:
        assert engine.stdout is not None
        engine.stdout.readline()
        with capture_logs() as logs:
            assert place.sweep() == ["vp-lost"]
        assert [(entry["log_level"], entry["pid"]) for entry in logs] == [("warning", engine.pid)]
        engine.communicate(b"\n")
    assert place.sweep() == []


@pytest.mark.parametrize("variable", ["TMPDIR", "VLLM_RPC_BASE_PATH", "ANY"])
def test_whatever_variable_leads_to_a_folder_it_is_in_use(place: Place, variable: str) -> None:
    """The `env` of a model may set TMPDIR to another folder; what lies beside it with a longer name is another one."""
    folder = place.folder("vp-used")
    place.folder("vp-use")
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(
        command, env={variable: f"{folder}/deep"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as engine:
        assert engine.stdout is not None
        engine.stdout.readline()
        assert place.sweep() == ["vp-used"]
        engine.communicate(b"\n")


def test_a_folder_with_a_socket_that_is_open_is_in_use(place: Place) -> None:
    """Also of a process whose environment nobody may read."""
    folder = place.folder("vp-lost")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "rpc"))
        assert place.sweep() == ["vp-lost"]
    assert place.sweep() == []


def test_a_folder_that_cannot_be_signed_is_told_and_used(place: Place) -> None:
    """A full disk costs no model."""
    with capture_logs() as logs:
        scratch.sign(place.scratch / "vp-none", place.state)
    assert [entry["log_level"] for entry in logs] == ["warning"]


def test_without_the_folder_of_folders_it_is_told(place: Place) -> None:
    """The daemon starts all the same."""
    place.scratch.rmdir()
    with capture_logs() as logs:
        scratch.sweep(place.scratch, place.state)
    assert [entry["log_level"] for entry in logs] == ["warning"]
