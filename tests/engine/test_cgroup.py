"""Cgroups for engines, as far as files tell; tests/systemd has the kernel's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_proxy.engine import cgroup
from vllm_proxy.engine.cgroup import Cgroups, delegated, own_cgroup

HYBRID = "42 30 0:38 / /sys/fs/cgroup/unified rw,nosuid shared:5 - cgroup2 cgroup2 rw\n"
V1 = "31 30 0:29 / /sys/fs/cgroup/memory rw,nosuid shared:6 - cgroup cgroup rw,memory\n"
UNIT = "/system.slice/vllm-proxy.service"


NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: cgroups and owners; CI runs it")
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
os.write(1, b"1\\n")
time.sleep(999)
"""


def proc(folder: Path, cgroup_lines: str, mounts: str) -> Path:
    """A /proc/self."""
    (folder / "cgroup").write_text(cgroup_lines)
    (folder / "mountinfo").write_text(mounts)
    return folder


@pytest.mark.parametrize(
    ("cgroup_lines", "mounts", "expected"),
    [
        (f"0::{UNIT}\n", V1 + HYBRID, f"/sys/fs/cgroup/unified{UNIT}"),
        (f"8:pids:/x\n0::{UNIT}/daemon\n", HYBRID, f"/sys/fs/cgroup/unified{UNIT}/daemon"),
        ("0::/\n", HYBRID, "/sys/fs/cgroup/unified"),
        (f"0::/outer{UNIT}\n", HYBRID.replace(" / ", " /outer "), f"/sys/fs/cgroup/unified{UNIT}"),
        ("0::/../elsewhere\n", HYBRID.replace(" / ", " /inner "), None),
        ("8:pids:/x\n", V1 + HYBRID, None),
        (f"0::{UNIT}\n", V1, None),
    ],
)
def test_the_own_group_is_found_where_version_2_is_mounted(
    tmp_path: Path, cgroup_lines: str, mounts: str, expected: str | None
) -> None:
    """Alone, beside version 1, or as a part of another machine's tree."""
    found = own_cgroup(proc(tmp_path, cgroup_lines, mounts))
    assert found == (Path(expected) if expected else None)


def test_without_proc_there_is_none(tmp_path: Path) -> None:
    """As in a sandbox that hides it."""
    assert own_cgroup(tmp_path / "none") is None


@NEEDS_ROOT
def test_only_what_systemd_delegates_is_divided(tmp_path: Path) -> None:
    """What it marks, the own group or the one above; without marks a system service's that belongs to its user."""
    unit = tmp_path / "vllm-proxy.service"
    daemon = unit / "daemon"
    daemon.mkdir(parents=True)
    owner = unit.stat().st_uid
    assert delegated(None, lambda _: True, 0) is None
    assert delegated(unit, lambda group: group == unit, 0) == unit
    assert delegated(daemon, lambda group: group == unit, 0) == unit
    assert delegated(unit, lambda _: False, owner + 1) is None
    os.chown(unit, 4711, -1)
    assert delegated(unit, lambda _: False, 4711) == unit
    assert delegated(unit, lambda _: False, 4712) is None
    session = tmp_path / "user@4711.service" / "app.slice"
    session.mkdir(parents=True)
    os.chown(session, 4711, -1)
    assert delegated(session, lambda _: False, 4711) is None


def test_an_engine_does_without_a_group_that_cannot_be_made(tmp_path: Path) -> None:
    """No delegation, and one that is gone."""
    assert Cgroups(None).create_group("chat", os.getpid()) == ""
    assert Cgroups(tmp_path / "gone").create_group("chat", os.getpid()) == ""


def test_memory_is_what_no_file_backs(tmp_path: Path) -> None:
    """Anonymous and shared pages, not the page cache of the weights; 0 where the kernel does not count."""
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 99999\nkernel 5\nshmem 300\nfile_mapped 7\nanon_thp 64\n")
    assert cgroup.memory_bytes(str(tmp_path)) == 1300
    assert cgroup.memory_bytes(str(tmp_path / "none")) == 0
    assert cgroup.memory_bytes("") == 0


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of the kernel's."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    folder = Path(next(mount[1] for mount in mounts if mount[2] == "cgroup2"), f"test-{os.getpid()}")
    folder.mkdir()
    yield folder
    for left in (*folder.glob("*/"), folder):
        left.rmdir()


@NEEDS_ROOT
async def test_a_group_ends_with_what_left_its_session(group: Path) -> None:
    """Also what ignores SIGTERM; the group is gone then, and a second end is a success too."""
    wait = ["sh", "-c", 'read -r go && exec "$0" "$@"', sys.executable, "-c", STUBBORN]
    with subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:  # noqa: ASYNC220 - nobody waits
        assert child.stdin is not None
        assert child.stdout is not None
        path = Cgroups(group).create_group("chat%2F0.12345678", child.pid)
        assert Path(path).parent == group
        child.stdin.write(b"go\n")
        child.stdin.close()
        assert child.stdout.readline() + child.stdout.readline() == b"1\n1\n"
        assert await cgroup.end(path)
        assert not Path(path).exists()
        assert await cgroup.end(path)
