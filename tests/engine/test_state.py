"""The state directory: its lock, and the record of engines that outlives the daemon."""

import os
import stat
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tomli_w
from structlog.testing import capture_logs

from vllm_proxy.domain.adapters import Lora
from vllm_proxy.domain.address import UnixAddress
from vllm_proxy.domain.canary import COMPLETIONS, Canary
from vllm_proxy.domain.devices import Allocation
from vllm_proxy.engine.proc import boot_id
from vllm_proxy.engine.state import EngineRecord, StateDirectory, given
from vllm_proxy.errors import StartupError
from vllm_proxy.runtime.files import remove_tree, replace_file

CHAT = EngineRecord("chat/0", "engine-1", 4242, 99, "127.0.0.1:8001", "secret", "/run/vp-1", "")
EMBED = EngineRecord("embed/0", "engine-2", 4243, 100, "127.0.0.1:8002", "secret", "/run/vp-2", "")
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: other users' files; CI runs it")
NOBODY = 65534


def next_daemon(path: Path) -> list[EngineRecord]:
    """What the next daemon finds; where logs lie it knows itself."""
    with StateDirectory(path) as state:
        found = state.orphans()
    assert all(record.log == str(state.log_file(record.instance)) for record in found)
    return [replace(record, log="") for record in found]


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
        b"boot_id = " + b"[" * 100_000,
    ],
)
def test_a_garbage_file_is_logged_and_set_aside_and_the_daemon_starts(tmp_path: Path, garbage: bytes) -> None:
    """A file that cannot be understood is no reason not to serve; whoever can understand it finds it."""
    text = garbage.replace(b"HERE", boot_id().encode())
    (tmp_path / "engines.toml").write_bytes(text)
    with capture_logs() as logs:
        assert next_daemon(tmp_path) == []
    assert [entry["log_level"] for entry in logs] == ["error"]
    assert logs[0]["kept_as"] == "engines.toml.unreadable"
    assert (tmp_path / "engines.toml.unreadable").read_bytes() == text


def change_file(folder: Path, /, **fields: object) -> None:
    """Change the first record in the file; a field that is None goes."""
    file = folder / "engines.toml"
    document = tomllib.loads(file.read_text())
    entry = document["engines"][0] | fields
    document["engines"][0] = {key: value for key, value in entry.items() if value is not None}
    file.write_text(tomli_w.dumps(document))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("instance", "chat"), ("instance", ""), ("instance", "chat/x"), ("instance", "/0"), ("instance", "a b/0"),
        ("instance", 5), ("own_name", ""), ("own_name", "a b"), ("credential", "a\r\nb"), ("credential", ""),
        ("pid", 0), ("pid", 1), ("pid", -5), ("pid", 2**22 + 1), ("pid", 2**31), ("pid", 2**80), ("pid", None),
        ("pid", "4242"), ("pid", True), ("pid", 4242.5), ("started", 0), ("started", -1), ("started", 2**63),
        ("address", "127.0.0.1:0"), ("address", "127.0.0.1:65536"), ("address", "127.0.0.1:08001"), ("address", "8001"),
        ("address", "unix:x.sock"), ("address", "unix:/run/docker.sock"), ("address", "unix:/run/vp-2/http.sock"),
        ("address", "unix:/run/vp-1/../docker.sock"), ("address", 8001),
        ("launched", "ray"), ("launched", ""), ("launched", 5),
        ("log_start", -1), ("started_at", "yesterday"), ("started_at", "2026-01-01"),
        ("spec", 5), ("folder", 5),
        ("segments", ["/etc/passwd"]), ("segments", ["/dev/shm/../../etc/passwd"]), ("segments", "/dev/shm/psm_1"),
        ("cgroup", "/sys/fs/cgroup/system.slice/ssh.service"), ("cgroup", "chat%2F0.engine-1"),
        ("cgroup", "/sys/fs/cgroup/x/embed%2F0.01234567"),
        ("asleep", -1), ("asleep", 3), ("asleep", True), ("canary", "{}"), ("canary", "["), ("canary", 5),
        ("gpus", 1), ("unified", "no"), ("visible", "0"), ("visible", ["a\0b"]),
        ("weights", -1), ("weights", 2**63), ("before_sleep", -1), ("before_sleep", 2**63),
    ],
)  # fmt: skip
def test_a_record_that_no_daemon_writes_is_reported_and_left_alone(tmp_path: Path, field: str, value: object) -> None:
    """The others are used; it stays in the file as it was, whatever is written there, and is reported again."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
        state.record(EMBED)
    change_file(tmp_path, **{field: value})
    before = tomllib.loads((tmp_path / "engines.toml").read_text())["engines"][0]
    for _ in range(2):
        with capture_logs() as logs, StateDirectory(tmp_path) as state:
            assert [record.own_name for record in state.orphans()] == ["engine-2"]
            assert state.unusable == 1
            state.record(EMBED)
        assert [(entry["log_level"], "secret" in str(entry)) for entry in logs] == [("error", False)]
        assert field in logs[0]["error"]
        assert before in tomllib.loads((tmp_path / "engines.toml").read_text())["engines"]


@pytest.mark.parametrize(
    "place",
    ["/", "/home/x/vp-1", "/tmp/models", "/tmp/../home/vp-1", "/run/../home/vp-1", "vp-1", "/tmp/vp-1/a", "."],
)
def test_an_engine_whose_folder_is_none_that_a_daemon_makes_is_known_without_it(tmp_path: Path, place: str) -> None:
    """Its processes are its own by other proofs, and are adopted or ended; that folder is left alone and told."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    change_file(tmp_path, folder=place)
    with capture_logs() as logs, StateDirectory(tmp_path) as state:
        assert [(record.own_name, record.folder) for record in state.orphans()] == [(CHAT.own_name, "")]
        assert state.unusable == 0
    assert [(entry["log_level"], entry["folder"]) for entry in logs] == [("warning", place)]


def test_what_is_no_record_at_all_is_left_alone_too(tmp_path: Path) -> None:
    """A word, a number, a list among the engines."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    file = tmp_path / "engines.toml"
    document = tomllib.loads(file.read_text())
    document["engines"] += ["x", 5, [1], {}]
    file.write_text(tomli_w.dumps(document))
    with capture_logs() as logs, StateDirectory(tmp_path) as state:
        assert [record.own_name for record in state.orphans()] == ["engine-1"]
        state.forget("engine-1")
    assert len(logs) == 4
    assert tomllib.loads(file.read_text())["engines"] == ["x", 5, [1], {}]


def test_two_records_with_one_own_name_are_one_engine(tmp_path: Path) -> None:
    """The second one is reported: to forget the first would lose it."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    file = tmp_path / "engines.toml"
    document = tomllib.loads(file.read_text())
    document["engines"] *= 2
    file.write_text(tomli_w.dumps(document))
    with capture_logs() as logs:
        assert next_daemon(tmp_path) == [CHAT]
    assert "own_name" in logs[0]["error"]


def test_records_of_another_pid_namespace_are_reported_and_kept_and_not_acted_on(tmp_path: Path) -> None:
    """The numbers are those of a container that is no more, or of one that lives beside this one."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
        state.record(EMBED)
    change_file(tmp_path, pid_namespace="pid:[4]")
    with capture_logs() as logs, StateDirectory(tmp_path) as state:
        assert [record.own_name for record in state.orphans()] == ["engine-2"]
        state.forget("engine-2")
    assert [(entry["log_level"], entry["instances"]) for entry in logs] == [("warning", ["chat/0"])]
    (kept,) = tomllib.loads((tmp_path / "engines.toml").read_text())["engines"]
    assert (kept["own_name"], kept["pid_namespace"]) == ("engine-1", "pid:[4]")


def test_records_of_other_pid_namespaces_do_not_grow_without_end(tmp_path: Path) -> None:
    """A container that is killed every hour leaves some each time: the last hundred are kept."""
    with StateDirectory(tmp_path) as state:
        for number in range(120):
            state.record(replace(CHAT, own_name=f"engine-{number}"))
    file = tmp_path / "engines.toml"
    file.write_text(file.read_text().replace("pid:[", "pid:[9"))
    with StateDirectory(tmp_path) as state:
        assert state.orphans() == []
        state.record(EMBED)
    kept = tomllib.loads(file.read_text())["engines"]
    assert [entry["own_name"] for entry in kept] == ["engine-2", *(f"engine-{number}" for number in range(20, 120))]


def test_the_log_of_an_engine_is_where_logs_are_whatever_is_on_record(tmp_path: Path) -> None:
    """The file is read, and cut when it is long: no record can name another one."""
    with StateDirectory(tmp_path) as state:
        state.record(replace(CHAT, log="/etc/passwd"))
        assert [record.log for record in state.orphans()] == [str(tmp_path / "logs/chat%2F0.log")]


# What others could have put there


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/hostname")])
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A pipe that nobody writes into would hold the daemon for good; a link leads to what is somebody else's."""
    make(tmp_path / "engines.toml")
    with capture_logs() as logs:
        assert next_daemon(tmp_path) == []
    assert [entry["event"][:32] for entry in logs] == ["the record of engines cannot be "]


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """Neither at the file's own name nor at one that could be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "state"
    folder.mkdir()
    for name in ("engines.toml", ".engines.toml.new", "lock.new"):
        (folder / name).symlink_to(victim)
    with StateDirectory(folder) as state:
        state.record(CHAT)
    assert victim.read_text() == "precious"
    assert stat.S_ISREG((folder / "engines.toml").lstat().st_mode)


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """It would be made, and locked, wherever it leads to."""
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StartupError, match="cannot use the state directory"), StateDirectory(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_what_a_killed_daemon_left_of_a_write_is_removed(tmp_path: Path) -> None:
    """Temporary names are random: without that they would pile up."""
    left = tmp_path / ".engines.toml.0123456789abcdef.new"
    left.touch()
    with StateDirectory(tmp_path):
        assert not left.exists()


def test_a_folder_that_others_may_write_is_warned_of(tmp_path: Path) -> None:
    """A volume of a container is often open to all: that is used, but not in silence."""
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o777)
    with capture_logs() as logs:
        assert next_daemon(folder) == []
    assert [(entry["log_level"], entry["mode"]) for entry in logs] == [("warning", "0777")]


@ROOT
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """What that user wrote there would be acted on with this one's rights."""
    os.chown(tmp_path, NOBODY, -1)
    with pytest.raises(StartupError, match="it belongs to nobody, and this is root; run as its owner"):
        next_daemon(tmp_path)


@ROOT
def test_a_file_of_another_user_is_not_believed(tmp_path: Path) -> None:
    """In a folder that others may write."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    os.chown(tmp_path / "engines.toml", NOBODY, -1)
    with capture_logs() as logs:
        assert next_daemon(tmp_path) == []
    assert "it belongs to nobody" in logs[0]["error"]


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_root(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python that first becomes the owner of a folder."""
    become = f"files.become_owner(Path({str(folder)!r}))"
    script = f"import os; from pathlib import Path; from vllm_proxy.runtime import files\n{become}\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@ROOT
def test_root_becomes_the_owner_of_a_folder_for_good(open_path: Path) -> None:
    """All three ids, its groups too; there is no way back."""
    os.chown(open_path, NOBODY, NOBODY)
    open_path.chmod(0o700)
    found = as_root(open_path, "print(os.getresuid(), os.getresgid(), os.getgroups())\nos.setuid(0)")
    assert found.stdout == f"{(NOBODY,) * 3} {(NOBODY,) * 3} {[NOBODY]}\n"
    assert "PermissionError" in found.stderr


@ROOT
def test_a_folder_that_its_owner_cannot_reach_is_told_as_such(open_path: Path) -> None:
    """Below one of root's alone: a sentence, before anything is read."""
    folder = open_path / "state"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    open_path.chmod(0o700)
    assert "its owner, nobody, may not; look at the folders above it" in as_root(folder, "print('went on')").stderr


@ROOT
def test_root_stays_root_in_a_folder_of_its_own_and_where_there_is_none(tmp_path: Path) -> None:
    """As in a container, and where no daemon has ever run."""
    tmp_path.chmod(0o700)
    for folder in (tmp_path, tmp_path / "none"):
        assert as_root(folder, "print(os.geteuid())").stdout == "0\n"


@ROOT
def test_root_does_not_act_on_what_others_may_have_written(tmp_path: Path) -> None:
    """A folder of root's that is open to others, and another user's link to one that is not."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(folder)
    os.chown(link, NOBODY, -1, follow_symlinks=False)
    assert "cannot act as root" in as_root(link, "print('went on')").stderr
    folder.chmod(0o777)
    assert "cannot act as root" in as_root(folder, "print('went on')").stderr


def test_only_a_folder_of_this_users_is_removed(tmp_path: Path) -> None:
    """A link to one is left alone, with what it leads to; so are links inside one."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    folder = tmp_path / "vp-1"
    folder.mkdir()
    (folder / "link").symlink_to(precious)
    (tmp_path / "vp-2").symlink_to(precious)
    for name in ("vp-1", "vp-2", "vp-3"):
        remove_tree(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "vp-2"]
    assert (precious / "file").exists()


@ROOT
def test_a_folder_of_another_users_is_not_removed(tmp_path: Path) -> None:
    """Whoever is root could."""
    folder = tmp_path / "vp-1"
    folder.mkdir()
    os.chown(folder, NOBODY, -1)
    with capture_logs() as logs:
        remove_tree(folder)
    assert folder.exists()
    assert len(logs) == 1


def test_a_record_that_cannot_be_written_is_logged_and_does_not_raise(tmp_path: Path) -> None:
    """A directory in the file's way does to root what a read-only directory does to others."""
    with StateDirectory(tmp_path) as state:
        (tmp_path / "engines.toml").mkdir()
        with capture_logs() as logs:
            state.record(CHAT)
            state.forget("engine-1")
        assert state.problem == f"cannot write {tmp_path}/engines.toml: Is a directory"
    assert [entry["event"] for entry in logs] == ["the state cannot be written"]


def test_what_could_not_be_written_is_written_with_the_next_record(tmp_path: Path) -> None:
    """A full disk that is emptied again loses no engine."""
    with StateDirectory(tmp_path) as state:
        (tmp_path / "engines.toml").mkdir()
        state.record(CHAT)
        (tmp_path / "engines.toml").rmdir()
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


def test_what_is_in_the_way_within_a_state_directory_is_named(tmp_path: Path) -> None:
    """Where there should be a folder."""
    (tmp_path / "logs").touch()
    with pytest.raises(StartupError, match=f"{tmp_path / 'logs'}: File exists"), StateDirectory(tmp_path):
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
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left beside it"
    replace_file(tmp_path / "other", b"new")
    assert (tmp_path / "other").read_bytes() == b"new"


def test_what_is_learnt_of_an_engine_later_is_put_on_record(tmp_path: Path) -> None:
    """That it serves, and its shared memory."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
        state.record(replace(CHAT, ready=True, segments=("/dev/shm/psm_1",)))
    assert next_daemon(tmp_path) == [replace(CHAT, ready=True, segments=("/dev/shm/psm_1",))]


def test_a_record_of_an_older_daemon_is_still_read(tmp_path: Path) -> None:
    """It knew a port, no address. What it did not know is empty: such an engine matches no spec, is ended, not lost."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    file = tmp_path / "engines.toml"
    old = ("instance", "own_name", "pid", "started", "port", "credential", "folder", "log", "boot_id", "[")
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith(old)))
    assert next_daemon(tmp_path) == [CHAT]


@pytest.mark.parametrize("port", [0, 2**16, -1, True, "8001", None])
def test_a_port_that_no_older_daemon_writes_is_reported(tmp_path: Path, port: object) -> None:
    """Where there is no address: nobody knows where such an engine listens."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    change_file(tmp_path, address=None, port=port)
    with capture_logs() as logs, StateDirectory(tmp_path) as state:
        assert state.orphans() == []
    assert "address" in logs[0]["error"]


def test_an_older_daemon_finds_the_port_where_it_looks_for_it(tmp_path: Path) -> None:
    """Whoever goes back to one keeps the engines; one that listens at a Unix socket has none."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
        state.record(replace(EMBED, address="unix:/run/vp-2/http.sock"))
    chat, embed = tomllib.loads((tmp_path / "engines.toml").read_text())["engines"]
    assert (chat["port"], "port" in embed) == (8001, False)
    assert [record.place.may_sleep for record in next_daemon(tmp_path)] == [False, True]
    assert next_daemon(tmp_path)[1].place.address == UnixAddress("/run/vp-2/http.sock")


def test_who_was_to_sleep_is_on_record_with_what_it_answered_awake(tmp_path: Path) -> None:
    """The next daemon wakes it, and knows then whether its weights are right."""
    asleep = replace(CHAT, asleep=1, canary=str(Canary(COMPLETIONS, " G")), before_sleep=0)
    with StateDirectory(tmp_path) as state:
        state.record(asleep)
    assert next_daemon(tmp_path) == [asleep]


@pytest.mark.parametrize("visible", [None, (), ("GPU-1", "0")])
def test_all_that_an_engine_was_given_is_known_to_the_next_daemon(
    tmp_path: Path, visible: tuple[str, ...] | None
) -> None:
    """Whatever an allocation says: it is measured by that, and started anew where it was."""
    allocation = Allocation({"0": 7, "1": 9}, visible, share=0.5, gpus=False, unified=True)
    default = Allocation()
    names = {field.name for field in fields(Allocation)} - {"visible"}
    assert all(getattr(allocation, name) != getattr(default, name) for name in names), "else it shows nothing"
    with StateDirectory(tmp_path) as state:
        state.record(replace(CHAT, **given(allocation)))
    (found,) = next_daemon(tmp_path)
    assert found.place.allocation == allocation


def test_left_behind_engines_stay_on_record_until_they_are_gone(tmp_path: Path) -> None:
    """A daemon that is killed before it has ended what it found loses none of it."""
    with StateDirectory(tmp_path) as state:
        state.record(CHAT)
    with StateDirectory(tmp_path) as state:
        state.orphans()
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


def test_what_an_engine_had_of_its_devices_is_kept_over_daemons(tmp_path: Path) -> None:
    """The last of each spec, beside the durations of starts; two hundred specs, those that were measured last."""
    with StateDirectory(tmp_path) as state:
        state.add_start("abc", 5)
        for size in (2**40 + 1, 2**40 + 3):
            state.note_memory("abc", size)
    with StateDirectory(tmp_path) as state:
        assert (state.memory("abc"), state.memory("def"), state.starts("abc")) == (2**40 + 3, None, [5])
        for number in range(200):
            state.note_memory(f"spec-{number}", 1)
        assert (state.memory("abc"), state.memory("spec-0")) == (None, 1)


def test_what_an_engine_keeps_asleep_is_known_to_the_next_daemon(tmp_path: Path) -> None:
    """Beside what it has awake, in a file of its own; garbage there counts as nothing."""
    with StateDirectory(tmp_path) as state:
        state.note_memory("abc", 70)
        for size in (5, 7):
            state.note_residue("abc", size)
    with StateDirectory(tmp_path) as state:
        assert (state.memory("abc"), state.residue("abc"), state.residue("def")) == (70, 7, None)
    (tmp_path / "residues.toml").write_bytes(b"bytes.abc = [nan]")
    with StateDirectory(tmp_path) as state:
        assert (state.memory("abc"), state.residue("abc")) == (70, None)


def test_what_is_known_already_is_not_written_again(tmp_path: Path) -> None:
    """An engine has as much at every start: the disk is left alone."""
    with StateDirectory(tmp_path) as state:
        state.note_memory("abc", 7)
        (tmp_path / "memory.toml").unlink()
        state.note_memory("abc", 7)
        assert not (tmp_path / "memory.toml").exists()


def test_memory_that_cannot_be_written_is_logged_and_counts_for_this_daemon(tmp_path: Path) -> None:
    """Such as on a full disk: the engine serves all the same."""
    with StateDirectory(tmp_path) as state, capture_logs() as logs:
        (tmp_path / "memory.toml").mkdir()
        (tmp_path / "memory.toml/file").touch()
        state.note_memory("abc", 7)
        assert state.memory("abc") == 7
    assert [entry["log_level"] for entry in logs] == ["error"]


@pytest.mark.parametrize("garbage", [b"", b"\xff", b"bytes = 5", b"[bytes]\na = 'x'", b"bytes.abc = [nan, inf, -1]"])
def test_garbage_in_the_record_of_memory_is_no_matter(tmp_path: Path, garbage: bytes) -> None:
    """The next engine of each spec is measured anew."""
    (tmp_path / "memory.toml").write_bytes(garbage)
    with StateDirectory(tmp_path) as state:
        assert state.memory("abc") is None
        state.note_memory("abc", 3)
        assert state.memory("abc") == 3


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff", b"seconds = 5", b"[seconds]\na = 'x'", b"seconds.abc = [nan, inf, -1]"]
)
def test_garbage_in_the_record_of_starts_is_no_matter(tmp_path: Path, garbage: bytes) -> None:
    """An estimate is lost, nothing else."""
    (tmp_path / "starts.toml").write_bytes(garbage)
    with StateDirectory(tmp_path) as state:
        assert state.starts("abc") == []
        state.add_start("abc", 3)
        assert state.starts("abc") == [3]


def test_what_an_engine_can_hold_of_adapters_is_on_record(tmp_path: Path) -> None:
    """So the next daemon keeps it where that is enough."""
    able = replace(CHAT, lora=Lora(64, 4, 16))
    with StateDirectory(tmp_path) as state:
        state.record(able)
    assert next_daemon(tmp_path) == [able]
