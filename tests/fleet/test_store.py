"""The configuration file is replaced whole or not at all. On real file systems: root may mount tiny ones."""

import contextlib
import errno
import fcntl
import os
import pwd
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_proxy.errors import RequestError
from vllm_proxy.fleet import store as store_module
from vllm_proxy.fleet.store import Store
from vllm_proxy.runtime.regular_file import MOST_BYTES

OLD, NEW = b"# old\n", b"# new\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in a folder of its own."""
    (tmp_path / "conf").mkdir()
    path = tmp_path / "conf" / "models.toml"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def mounts() -> Iterator[list[Path]]:
    """Mount points, unmounted in the end."""
    made: list[Path] = []
    yield made
    for path in reversed(made):
        subprocess.run(["umount", path], check=True)


def mount(mounts: list[Path], *arguments: str | Path) -> None:
    """Mount something; the last argument is where."""
    subprocess.run(["mount", *arguments], check=True)
    mounts.append(Path(arguments[-1]))


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as filling:
        while filling.write(b"x" * 4096):
            pass


def refused(file: Path, store: Store | None = None, data: bytes = NEW, *, before: bytes | None = None) -> RequestError:
    """How a write is refused; nothing has changed, and nothing is left over. `before`: what its writer has read."""
    text, beside = file.read_bytes(), set(file.resolve().parent.iterdir())
    with pytest.raises(RequestError) as error:
        (store or Store(file)).replace(data, text if before is None else before)
    assert file.read_bytes() == text
    assert set(file.resolve().parent.iterdir()) == beside
    assert str(file) in error.value.message
    if store is None:
        asked = Store(file).read_only()
        assert asked == (error.value.message if error.value.code == "config_read_only" else None)
        assert set(file.resolve().parent.iterdir()) == beside
    return error.value


def test_a_file_is_replaced_with_its_mode_and_owner(file: Path) -> None:
    """Whoever the daemon is, the file stays its owner's; there is no other file beside it."""
    file.chmod(0o640)
    os.chown(file, 12345, 23456)
    before = file.stat()
    assert Store(file).read_only() is None
    Store(file).replace(NEW, OLD)
    after = file.stat()
    assert file.read_bytes() == NEW
    assert (stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid) == (0o640, 12345, 23456)
    assert after.st_ino != before.st_ino, "who has the old one open reads it to its end"
    assert list(file.parent.iterdir()) == [file]


def test_attributes_are_kept(file: Path) -> None:
    """Access control lists and labels are such."""
    os.setxattr(file, "user.note", b"kept")
    Store(file).replace(NEW, OLD)
    assert os.getxattr(file, "user.note") == b"kept"


def test_a_chain_of_links_stays_and_its_target_is_written(file: Path, tmp_path: Path) -> None:
    """A link to a link, in other folders."""
    (tmp_path / "one").symlink_to("conf/models.toml")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    assert Store(tmp_path / "two").read_only() is None
    Store(tmp_path / "two").replace(NEW, OLD)
    assert (tmp_path / "two").is_symlink()
    assert (tmp_path / "one").is_symlink()
    assert file.read_bytes() == NEW


def test_a_file_that_is_missing_is_made(tmp_path: Path) -> None:
    """Not readable by all: it may come to hold keys."""
    assert Store(tmp_path / "models.toml").read_only() is None
    Store(tmp_path / "models.toml").replace(NEW, b"")
    assert (tmp_path / "models.toml").read_bytes() == NEW
    assert stat.S_IMODE((tmp_path / "models.toml").stat().st_mode) == 0o640


def test_the_umask_may_narrow_the_mode_of_a_new_file(tmp_path: Path) -> None:
    """Whoever keeps his files to himself keeps this one too; a wide umask opens nothing."""
    for umask, mode in (0o077, 0o600), (0o000, 0o640):
        file = tmp_path / f"{umask}.toml"
        before = os.umask(umask)
        try:
            Store(file).replace(NEW, b"")
        finally:
            os.umask(before)
        assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_file_without_a_write_bit_is_read_only_for_root_too(file: Path) -> None:
    """The system would let root replace it; whoever took the bit away meant it."""
    file.chmod(0o444)
    error = refused(file)
    assert error.code == "config_read_only"
    assert "chmod u+w" in error.message


def test_the_nix_store_is_read_only(tmp_path: Path) -> None:
    """Whatever its modes say; the message says where to change it."""
    (tmp_path / "models.toml").symlink_to("/nix/store/abc-models.toml")
    with pytest.raises(RequestError) as error:
        Store(tmp_path / "models.toml").replace(NEW, OLD)
    assert error.value.code == "config_read_only"
    assert "Nix" in error.value.message
    assert Store(tmp_path / "models.toml").read_only() == error.value.message


def test_a_read_only_file_system_is_read_only(file: Path, mounts: list[Path]) -> None:
    """EROFS."""
    mount(mounts, "--bind", file.parent, file.parent)
    subprocess.run(["mount", "-o", "remount,ro,bind", file.parent], check=True)
    assert refused(file).code == "config_read_only"


def test_a_file_that_is_mounted_alone_says_to_mount_its_folder(file: Path, tmp_path: Path, mounts: list[Path]) -> None:
    """EBUSY: containers do that."""
    (tmp_path / "other.toml").write_bytes(OLD)
    mount(mounts, "--bind", tmp_path / "other.toml", file)
    error = refused(file)
    assert error.code == "config_read_only"
    assert "mount its folder" in error.message


@contextlib.contextmanager
def being(user: pwd.struct_passwd) -> Iterator[None]:
    """Be another user than root for a while."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.mark.parametrize(
    ("roots", "told"),
    [
        (["file"], "it belongs to root; `chown nobody {file}` lets the daemon replace it"),
        (["folder"], "its folder belongs to root; `chown nobody {folder}` lets the daemon replace it"),
        (["folder", "file"], "its folder and it belong to root; `chown nobody {folder} {file}` lets the daemon"),
        ([], "its folder has no write bit; `chmod u+wx {folder}`"),
    ],
)
def test_what_root_left_in_the_daemons_folder_is_told_with_its_owner(roots: list[str], told: str) -> None:
    """Who edits as root, or restores a backup, leaves a file that the daemon may read and not replace."""
    user = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as made:  # pytest's own folders are closed to others
        places = {"folder": Path(made), "file": Path(made, "models.toml")}
        places["file"].write_bytes(OLD)
        for name, place in places.items():
            os.chown(place, *((0, 0) if name in roots else (user.pw_uid, user.pw_gid)))
        places["folder"].chmod(0o755 if roots else 0o555)
        places["file"].chmod(0o644)
        with being(user):
            error = refused(places["file"])
    assert error.code == "config_read_only"
    assert told.format(**places) in error.message


def test_a_group_that_the_daemon_is_not_in_is_told() -> None:
    """It could not give the new file to that group, as who may read the old one expects."""
    user = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as made:
        file = Path(made, "keys.toml")
        file.write_bytes(OLD)
        os.chown(made, user.pw_uid, user.pw_gid)
        os.chown(file, user.pw_uid, 0)
        with being(user):
            error = refused(file)
    assert "it belongs to the group root; `chgrp " in error.message


@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_is_immutable_is_read_only_for_root_too(file: Path, mounts: list[Path], which: str) -> None:
    """EPERM, and `lsattr` shows why; it is told before anybody writes."""
    mount(mounts, "-t", "tmpfs", "tmpfs", file.parent)
    file.write_bytes(OLD)
    place = {"file": file, "folder": file.parent}[which]
    if subprocess.run(["chattr", "+i", place], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("this kernel's tmpfs knows no immutable files")
    try:
        error = refused(file)
    finally:
        subprocess.run(["chattr", "-i", place], check=True)
    assert error.code == "config_read_only"
    assert "immutable" in error.message


def test_what_the_system_forbids_for_no_reason_of_ownership_may_be_immutable(file: Path) -> None:
    """EPERM where all of it is ours."""

    def forbidden(_: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    error = refused(file, Store(file, forbidden))
    assert error.code == "config_read_only"
    assert "immutable" in error.message


def test_a_full_disk_leaves_the_old_file(file: Path, mounts: list[Path]) -> None:
    """507, with the reason; when there is room again it is written."""
    mount(mounts, "-t", "tmpfs", "-o", "size=64k", "tmpfs", file.parent)
    file.write_bytes(OLD)
    hog = file.parent / "hog"
    with pytest.raises(OSError, match="No space"):
        fill(hog)
    error = refused(file, data=b"#" * 5000)
    assert error.code == "config_not_written"
    assert "room" in error.message
    hog.unlink()
    Store(file).replace(NEW, OLD)
    assert file.read_bytes() == NEW


def test_an_error_of_fsync_leaves_the_old_file(file: Path) -> None:
    """What may not be durable must not be the file."""

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    assert refused(file, Store(file, broken)).code == "config_not_written"


def test_a_folder_that_cannot_be_synced_has_the_new_file_all_the_same(file: Path) -> None:
    """Everybody reads it already: to call that a failure would be a lie."""

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    Store(file, only_files).replace(NEW, OLD)
    assert file.read_bytes() == NEW


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    """Something is in the way."""
    target = tmp_path / "models.toml"
    target.mkdir()
    with pytest.raises(RequestError) as error:
        Store(target).replace(NEW, OLD)
    assert error.value.code == "config_not_written"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_missing_is_told(tmp_path: Path) -> None:
    """It is not made: a volume may be missing."""
    with pytest.raises(RequestError, match="No such file") as error:
        Store(tmp_path / "none" / "models.toml").replace(NEW, OLD)
    assert error.value.code == "config_not_written"


def test_what_is_no_regular_file_is_not_written_over(tmp_path: Path) -> None:
    """A FIFO stays one, and nobody waits at it."""
    os.mkfifo(tmp_path / "models.toml")
    with pytest.raises(RequestError, match="no regular file") as error:
        Store(tmp_path / "models.toml").replace(NEW, OLD)
    assert error.value.code == "config_not_written"
    assert stat.S_ISFIFO((tmp_path / "models.toml").stat().st_mode)


def test_nothing_is_written_that_could_not_be_read(file: Path) -> None:
    """More than the bound of what is read."""
    assert refused(file, data=b"#" * (MOST_BYTES + 1)).code == "config_not_written"


def test_what_another_program_has_just_written_is_not_written_over(file: Path) -> None:
    """Two daemons may have one file: who comes second is told, and loses nobody's change."""
    Store(file).replace(NEW, OLD)
    error = refused(file, before=OLD, data=b"# another\n")
    assert error.code == "revision_mismatch"


def test_writers_take_turns(file: Path) -> None:
    """Of many that write what they have read with a line more, each that is told that it has written did."""

    def add(number: int) -> bool:
        before = file.read_bytes()
        try:
            Store(file).replace(before + b"# %d\n" % number, before)
        except RequestError:
            return False
        return True

    with ThreadPoolExecutor(8) as writers:
        done = [number for number, wrote in enumerate(writers.map(add, range(200))) if wrote]
    assert done
    assert sorted(file.read_bytes().removeprefix(OLD).splitlines()) == sorted(b"# %d" % number for number in done)


def test_a_stranger_who_holds_the_lock_holds_nobody_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may read the folder can have it for ever; what was read is compared all the same."""
    monkeypatch.setattr(store_module, "_LOCK_SECONDS", 0.02)
    folder = os.open(file.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    Store(file).replace(NEW, OLD)
    assert refused(file, before=OLD, data=b"# another\n").code == "revision_mismatch"
    os.close(folder)


def test_what_a_killed_writer_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """By its exact name, also of a file whose name looks like a pattern."""
    file = tmp_path / "models[1].toml"
    file.write_bytes(OLD)
    kept = [file, tmp_path / ".models[1].toml.mydraft.new", tmp_path / ".models1.toml.0123456789abcdef.new"]
    for name in (*kept[1:], tmp_path / ".models[1].toml.0123456789abcdef.new"):
        name.touch()
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # somebody writes
    Store(file).tidy()
    assert len([*tmp_path.iterdir()]) == 4
    os.close(folder)
    Store(file).tidy()
    assert sorted(tmp_path.iterdir()) == sorted(kept)
