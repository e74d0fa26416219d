"""A machine with systemd as its first process, in namespaces: it boots in a fraction of a second and leaves nothing.

Its network is its own. Files are read and written through /proc; commands run inside.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BOOT = Path(__file__).parent / "boot.sh"
WAIT_SECONDS = 180.0  # beside real vLLM, which may take every processor
RUN_SECONDS = 500.0  # an installation compiles what it installs
CONTROL = "/run/vllm-proxy/control.sock"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--cgroup", "--net")


class Machine:
    """A booted machine. `root` is its file system, seen from outside."""

    def __init__(self, pid: int, cgroup: Path) -> None:
        self.pid = pid
        self.root = Path(f"/proc/{pid}/root")
        self._cgroup = cgroup

    def path(self, name: str) -> Path:
        """One of its files."""
        return self.root / name.lstrip("/")

    def start(self, command: Sequence[str], *, online: bool = False, **options: Any) -> subprocess.Popen[str]:  # noqa: ANN401 - Popen's
        """A process in it, as root. `online`: with the network of this machine instead of its own."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-C", *([] if online else ["-n"]), "-r", "-w"]
        join = 'echo $$ >"$0/init.scope/cgroup.procs" && exec "$@"'
        env = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", **(_package_index() if online else {})}
        return subprocess.Popen(
            ["bash", "-c", join, self._cgroup, *enter, "--", *command], text=True, env=env, **options
        )

    def run(
        self, *command: str, status: int | None = 0, online: bool = False, seconds: float = RUN_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. `status`: what it must exit with; None: whatever."""
        process = self.start(command, online=online, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{command} runs for more than {seconds} s: {out}{err}") from None
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
        assert status is None or done.returncode == status, f"{command}: {done.returncode}\n{out}{err}{self.journal()}"
        return done

    def shell(self, line: str, status: int | None = 0, **options: Any) -> str:  # noqa: ANN401 - as `run`
        """Run a line of shell; returns its output."""
        return self.run("sh", "-ec", line, status=status, **options).stdout

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        lines = self.run("systemctl", "show", unit, *(f"--property={name}" for name in properties)).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines)

    def until(self, unit: str, **wanted: str) -> None:
        """Wait until properties of a unit have these values."""
        for within in _looks(WAIT_SECONDS):
            if (found := self.show(unit, *wanted)) == wanted:
                return
            assert within, f"{unit}: {found} instead of {wanted}\n{self.journal()}"

    def until_status(self, part: str, unit: str = "vllm-proxy") -> None:
        """Wait until a unit's STATUS= has this in it."""
        for within in _looks(WAIT_SECONDS):
            if part in (found := self.show(unit, "StatusText")["StatusText"]):
                return
            assert within, f"{unit}: {found!r}\n{self.journal()}"

    def entries(self, *match: str, having: str = "MESSAGE", unit: str = "vllm-proxy") -> list[dict[str, str]]:
        """The journal's entries of a unit that match `FIELD=value` and have a field; waits until there is one.

        The daemon writes its lines from a thread of its own, and journald takes them up when it comes to it.
        """
        found: list[dict[str, str]] = []
        for within in _looks(WAIT_SECONDS):
            lines = self.run("journalctl", "--no-pager", "-o", "json", "-u", unit, *match).stdout.splitlines()
            if found := [entry for entry in map(json.loads, lines) if having in entry]:
                break
            assert within, f"{unit}: nothing has {having} and {match}\n{self.journal()}"
        return found

    def journal(self, unit: str = "vllm-proxy") -> str:
        """What a unit and systemd about it have logged."""
        command = ("journalctl", "--no-pager", "-o", "cat", "-u", unit)
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return process.communicate()[0]

    def get(self, path: str, *, control: bool = False) -> Any:  # noqa: ANN401 - JSON
        """The daemon's answer on port 8000, without a key; `control`: on the control socket, which needs none."""
        way = ["--unix-socket", CONTROL] if control else []
        return json.loads(self.run("curl", "-sS", "--fail-with-body", *way, f"http://127.0.0.1:8000{path}").stdout)

    def eventually(
        self, path: str, key: str, value: object, seconds: float = WAIT_SECONDS, *, control: bool = False
    ) -> Any:  # noqa: ANN401 - JSON
        """Ask as `get` does until the answer has this at `key`, a path with dots; returns the answer."""
        answer = None
        for within in _looks(seconds):
            found = answer = self.get(path, control=control)
            for part in key.split("."):
                found = found[int(part)] if part.isdigit() else found[part]
            if found == value:
                break
            assert within, f"{path}: {key} is {found}, not {value}\n{self.journal()}"
        return answer


@contextlib.contextmanager
def booted(*trees: Path, shown: Mapping[str, Path] | None = None) -> Iterator[Machine]:
    """A machine whose root is this machine's, with a copy of what is in the folders `trees` over it.

    `shown`: folders of this machine, by where they are there.
    """
    folder = Path(tempfile.mkdtemp(prefix="machine-"))
    cgroup = _cgroup_root() / folder.name
    cgroup.mkdir()
    # All of it dies with this process, however that ends.
    join = 'echo 0 >"$0/cgroup.procs" && exec setsid setpriv --pdeathsig KILL unshare "$@"'
    flags = [*_NAMESPACES, "--fork", "--kill-child", "--propagation", "private"]
    binds = [f"{source}={place}" for place, source in (shown or {}).items()]
    boot = [str(BOOT), str(folder), sys.base_prefix, *map(str, trees), *binds]
    outer = subprocess.Popen(
        ["bash", "-c", join, cgroup, *flags, "--", "bash", *boot], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        machine = Machine(_first_process(outer), cgroup)
        machine.run("systemctl", "is-system-running", "--wait", status=None)
        yield machine
    finally:
        outer.kill()
        with outer:
            pass
        _remove(cgroup)
        shutil.rmtree(folder)


def _looks(seconds: float) -> Iterator[bool]:
    """When to look again: whether there is time left. Each look starts processes, so the longer it took the fewer."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) < seconds:
        yield True
        time.sleep(min(waited / 10, 0.5))
    yield False


def _package_index() -> dict[str, str]:
    """Where uv and pip get packages from on this machine, if not from PyPI itself."""
    prefixes = ("PIP_", "UV_INDEX", "UV_DEFAULT_INDEX", "UV_FIND_LINKS", "SSL_CERT", "HTTP_PROXY", "HTTPS_PROXY")
    return {name: value for name, value in os.environ.items() if name.upper().startswith(prefixes)}


def _cgroup_root() -> Path:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    return next(Path(mount[1]) for mount in mounts if mount[2] == "cgroup2")


def _first_process(outer: subprocess.Popen[str]) -> int:
    """The process that is number 1 inside, once systemd can be asked."""
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline and outer.poll() is None:
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):  # it is on its way to another root
                if Path(f"/proc/{pid}/root/run/systemd/private").is_socket():
                    return int(pid)
        time.sleep(0.01)
    outer.kill()
    assert outer.stdout is not None
    raise AssertionError(f"the machine does not boot: {outer.stdout.read()}")


def _remove(cgroup: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while cgroup.exists():
        for folder, _, _ in os.walk(cgroup, topdown=False):
            with contextlib.suppress(OSError):  # what was killed is not reaped yet
                Path(folder).rmdir()
        assert time.monotonic() < deadline, f"{cgroup} is still in use"
