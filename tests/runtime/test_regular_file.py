"""Only regular files are read, and nobody waits for anything else."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_proxy.places import short_name
from vllm_proxy.runtime.regular_file import MOST_BYTES, UnusableFileError, is_missing, read_regular_file


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_may_not_be_looked_at_is_not_said_to_be_missing(tmp_path: Path) -> None:
    """It may be there; whoever reads it is told what stands in the way."""
    assert is_missing(tmp_path / "none")
    assert not is_missing(tmp_path)
    assert not is_missing(tmp_path / ("x" * 300))


def device(path: Path) -> None:
    """It would never end."""
    path.symlink_to("/dev/zero")


def bound(path: Path) -> None:
    """A socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as listener, short_name(path) as name:
        listener.bind(name)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "a pipe or FIFO"), (device, "a device"), (bound, "a socket"), (Path.mkdir, "a directory")],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    """With what it is, and what was expected. No descriptor is left open."""
    make(tmp_path / "file")
    before = descriptors()
    with pytest.raises(UnusableFileError) as raised:
        read_regular_file(tmp_path / "file")
    assert raised.value.strerror is not None
    assert raised.value.strerror.startswith(f"it is {kind}")
    assert "expected a regular file" in raised.value.strerror
    assert descriptors() == before


def test_a_fifo_that_somebody_writes_to_is_refused_too(tmp_path: Path) -> None:
    """What it gives once, it does not give again."""
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "fifo", os.O_WRONLY)
    os.write(writer, b"x")
    with pytest.raises(UnusableFileError):
        read_regular_file(tmp_path / "fifo")
    assert os.read(reader, 10) == b"x"
    os.close(reader)
    os.close(writer)


def test_a_regular_file_is_read_through_links_and_from_proc(tmp_path: Path) -> None:
    """Files of /proc say that they are empty."""
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_regular_file(tmp_path / "link") == b"abc"
    assert read_regular_file(Path("/proc/self/stat")).startswith(str(os.getpid()).encode())


def test_a_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    """One byte more is too much, and says so."""
    file = tmp_path / "file"
    file.touch()
    os.truncate(file, MOST_BYTES)
    assert len(read_regular_file(file)) == MOST_BYTES
    os.truncate(file, MOST_BYTES + 1)
    with pytest.raises(UnusableFileError) as raised:
        read_regular_file(file)
    assert raised.value.strerror == "it is larger than 16 MiB"


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    """As the system says it."""
    with pytest.raises(FileNotFoundError):
        read_regular_file(tmp_path / "file")
