"""The state directory: its lock, and the record of engines that outlives the daemon."""

from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from vllm_proxy.engine.process import boot_id
from vllm_proxy.engine.state import EngineRecord, StateDirectory, replace_file
from vllm_proxy.errors import StartupError

CHAT = EngineRecord("chat/0", "engine-1", 4242, 99, 8001, "secret", "/run/vp-1", "/var/log/chat")
EMBED = EngineRecord("embed/0", "engine-2", 4243, 100, 8002, "secret", "/run/vp-2", "/var/log/embed")


def next_daemon(path: Path) -> list[EngineRecord]:
    """What the next daemon finds."""
    with StateDirectory(path) as state:
        return state.left_behind()


def test_what_is_on_record_is_left_behind_for_the_next_daemon(tmp_path: Path) -> None:
    """Every field of every engine comes back, in the same boot."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
        state.record(EMBED)
    assert next_daemon(tmp_path) == [CHAT, EMBED]


def test_what_is_forgotten_is_not_left_behind(tmp_path: Path) -> None:
    """Only the engine of that name goes; one that was never on record is no error."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
        state.record(EMBED)
        state.forget("engine-1")
        state.forget("engine-unknown")
    assert next_daemon(tmp_path) == [EMBED]


def test_two_engines_of_one_instance_are_both_on_record(tmp_path: Path) -> None:
    """An engine that could not be ended is not lost from the record when its successor starts."""
    successor = replace(CHAT, own_name="engine-9", pid=5000)
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
        state.record(successor)
    assert next_daemon(tmp_path) == [CHAT, successor]


def test_a_new_state_directory_has_nothing_left_behind(tmp_path: Path) -> None:
    """The first daemon makes the directory, readable by nobody else, and says nothing."""
    with capture_logs() as logs:
        assert next_daemon(tmp_path / "a" / "b") == []
    assert logs == []
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_records_of_another_boot_mean_nothing(tmp_path: Path) -> None:
    """After a reboot the pids are other people's."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    file = tmp_path / "engines.toml"
    file.write_text(file.read_text().replace(boot_id(), "another-boot"))
    assert next_daemon(tmp_path) == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe",
        b"engines = [",
        b"engines = []",
        b'boot_id = "HERE"',
        b'boot_id = "HERE"\nengines = 5',
        b'boot_id = "HERE"\nengines = ["x"]',
        b'boot_id = "HERE"\n[[engines]]\npid = 1',
    ],
)
def test_a_garbage_record_is_logged_and_the_daemon_starts(tmp_path: Path, garbage: bytes) -> None:
    """A file that cannot be understood is no reason not to serve."""
    (tmp_path / "engines.toml").write_bytes(garbage.replace(b"HERE", boot_id().encode()))
    with capture_logs() as logs:
        assert next_daemon(tmp_path) == []
    assert [entry["log_level"] for entry in logs] == ["error"]


def test_a_record_that_cannot_be_written_is_logged_and_does_not_raise(tmp_path: Path) -> None:
    """A directory in the file's way does to root what a read-only directory does to others."""
    with StateDirectory(tmp_path) as state:
        (tmp_path / ".engines.toml.new").mkdir()
        with capture_logs() as logs:
            state.record(CHAT)
            state.forget("engine-1")
    assert [entry["event"] for entry in logs] == ["the state cannot be written"] * 2


def test_what_could_not_be_written_is_written_with_the_next_record(tmp_path: Path) -> None:
    """A full disk that is emptied again loses no engine."""
    with StateDirectory(tmp_path) as state:
        (tmp_path / ".engines.toml.new").mkdir()
        state.record(CHAT)
        (tmp_path / ".engines.toml.new").rmdir()
        state.record(EMBED)
    assert next_daemon(tmp_path) == [CHAT, EMBED]


def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    """One state directory, one daemon; the error says what to do."""
    with (
        StateDirectory(tmp_path),
        pytest.raises(StartupError, match="another daemon does; choose another with --state-dir"),
        StateDirectory(tmp_path),
    ):
        pass


def test_the_lock_ends_with_the_block(tmp_path: Path) -> None:
    """The next daemon gets in, also when the block raised."""
    with pytest.raises(KeyError), StateDirectory(tmp_path):
        raise KeyError
    assert next_daemon(tmp_path) == []


def test_a_state_directory_that_cannot_be_made_is_a_startup_error(tmp_path: Path) -> None:
    """A file where the directory should be gives a sentence, not a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="cannot use the state directory"), StateDirectory(tmp_path / "file"):
        pass


def test_the_record_is_for_its_owner_alone(tmp_path: Path) -> None:
    """It holds the engines' credentials; the lock is private too."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.is_file()} == {
        "engines.toml": 0o600,
        "lock": 0o600,
    }


def test_log_files_of_ids_with_slashes_are_apart_and_inside(tmp_path: Path) -> None:
    """No id reaches another folder, and no two share a file."""
    state = StateDirectory(tmp_path)
    files = {state.log_file(instance) for instance in ("a/b/0", "a%2Fb/0", "a-b/0", "../x/0")}
    assert len(files) == 4
    assert {file.parent for file in files} == {tmp_path / "logs"}


def test_a_replaced_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    """A write that fails half-way, here for want of the last rename, leaves the old file as it was."""
    target = tmp_path / "file"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(OSError, match="directory"):
        replace_file(target, b"new")
    assert [path.name for path in target.iterdir()] == ["old"]
    replace_file(tmp_path / "other", b"new")
    assert (tmp_path / "other").read_bytes() == b"new"


def test_what_is_learnt_of_an_engine_later_is_put_on_record(tmp_path: Path) -> None:
    """That it serves, and its shared memory."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
        state.record(replace(CHAT, ready=True, segments=("/dev/shm/psm_1",)))
    assert next_daemon(tmp_path) == [replace(CHAT, ready=True, segments=("/dev/shm/psm_1",))]


def test_a_record_of_an_older_daemon_is_still_read(tmp_path: Path) -> None:
    """What it did not know is empty: such an engine matches no spec and is ended, not lost."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    file = tmp_path / "engines.toml"
    old = ("instance", "own_name", "pid", "started", "port", "credential", "folder", "log", "boot_id", "[")
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith(old)))
    assert next_daemon(tmp_path) == [CHAT]


def test_left_behind_engines_stay_on_record_until_they_are_gone(tmp_path: Path) -> None:
    """A daemon that is killed before it has ended what it found loses none of it."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    with StateDirectory(tmp_path) as state:
        state.left_behind()
        state.record(EMBED)
    assert next_daemon(tmp_path) == [CHAT, EMBED]


def test_the_last_starts_of_a_spec_are_kept_over_daemons(tmp_path: Path) -> None:
    """The last five of each spec, in their order."""
    with StateDirectory(tmp_path) as state:
        for seconds in range(7):
            state.add_start("abc", seconds)
        state.add_start("def", 1.26)
    with StateDirectory(tmp_path) as state:
        assert (state.starts("abc"), state.starts("def"), state.starts("ghi")) == ([2, 3, 4, 5, 6], [1.3], [])


def test_starts_of_specs_that_nobody_starts_any_more_are_forgotten(tmp_path: Path) -> None:
    """Two hundred specs are kept, those that were started last."""
    with StateDirectory(tmp_path) as state:
        state.add_start("first", 1)
        state.add_start("second", 1)
        for number in range(198):
            state.add_start(f"spec-{number}", 1)
        state.add_start("first", 2)
        state.add_start("one-more", 1)
        assert (state.starts("first"), state.starts("second"), state.starts("spec-0")) == ([1, 2], [], [1])


@pytest.mark.parametrize("garbage", [b"", b"\xff", b"seconds = 5", b"[seconds]\na = 'x'"])
def test_garbage_in_the_record_of_starts_is_no_matter(tmp_path: Path, garbage: bytes) -> None:
    """An estimate is lost, nothing else."""
    (tmp_path / "starts.toml").write_bytes(garbage)
    with StateDirectory(tmp_path) as state:
        assert state.starts("abc") == []
        state.add_start("abc", 3)
        assert state.starts("abc") == [3]
