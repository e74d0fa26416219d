"""What `packaging/dev test` exits with: a part that fails is tried again, and only what fails twice fails the run."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A uv whose pytest fails, and whose mypy finds something, as often as files in the folder say.
UV = """#!/bin/sh
case "$*" in
*--last-failed*) called=again ;;
*--part=beside*) called=beside ;;
*--part=alone*) called=alone ;;
*coverage*report*) called=coverage ;;
*mypy) called=mypy ;;
*) exit 0 ;;
esac
if [ $called = again ] && [ ! -e never-again ]; then
    echo '{}' >.pytest_cache/v/cache/lastfailed
elif [ -e "fails-$called" ]; then
    mkdir -p .pytest_cache/v/cache
    printf '{\\n  "tests/test_a.py::test_b": true\\n}\\n' >.pytest_cache/v/cache/lastfailed
fi
[ $called = mypy ] || echo "$called" >>calls
[ ! -e "fails-$called" ]
"""


def _checkout(folder: Path, fails: list[str]) -> dict[str, str]:
    """A checkout with that uv; returns the environment of who has nothing else to install."""
    for name in ("dev", "uv.sh"):
        (folder / "packaging").mkdir(exist_ok=True)
        shutil.copy(ROOT / "packaging" / name, folder / "packaging" / name)
    for name in ("uv.lock", "pyproject.toml", *(f"fails-{one}" for one in fails)):
        (folder / name).touch()
    programs = folder / "bin"
    programs.mkdir()
    for name in ("sh", "cat", "cksum", "sed", "rm", "mktemp", "dirname", "head", "id", "mkdir", "grep", "python3.13"):
        found = shutil.which(name) or shutil.which("python3")
        assert found is not None
        (programs / name).symlink_to(found)
    (programs / "uv").write_text(UV)
    wanted = ("chromium", "node", "npm", "nix-instantiate", "nginx", "promtool", "systemd-analyze", "dbus-daemon",
              "nsenter", "ip", "curl", "git")  # fmt: skip
    for name in wanted:
        (programs / name).write_text("#!/bin/sh\n")
    for file in programs.iterdir():
        if not file.is_symlink():
            file.chmod(0o755)
    environment = folder / ".venv-demo"
    environment.mkdir()
    return {"PATH": str(programs), "HOME": str(folder), "TMPDIR": str(folder), "UV_PYTHON": "3.13"}


@pytest.mark.parametrize(
    ("fails", "code", "ran"),
    [
        ([], 0, ["beside", "coverage", "alone"]),
        (["beside"], 0, ["beside", "again", "coverage", "alone"]),
        (["beside", "again"], 1, ["beside", "again"]),
        (["alone"], 0, ["beside", "coverage", "alone", "again"]),
        (["beside", "alone"], 0, ["beside", "again", "coverage", "alone", "again"]),
        (["alone", "again"], 1, ["beside", "coverage", "alone", "again"]),
        (["mypy"], 1, ["beside", "coverage", "alone"]),
        (["beside", "mypy"], 1, ["beside", "again", "coverage", "alone"]),
        (["coverage"], 1, ["beside", "coverage"]),
        (["beside", "coverage"], 1, ["beside", "again", "coverage"]),
    ],
)
def test_what_fails_once_passes_the_run_and_what_fails_twice_ends_it(
    fails: list[str], code: int, ran: list[str], tmp_path: Path
) -> None:
    """A flaky test is named and lands; one that fails again does not, nor do types that are wrong."""
    done = subprocess.run(
        [shutil.which("sh") or "sh", "packaging/dev", "test"],
        cwd=tmp_path, env=_checkout(tmp_path, fails), capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert (tmp_path / "calls").read_text().split() == ran, said
    assert ("flaky, passed when tried again" in said) == (
        {"beside", "alone"} & {*fails} != set() and "again" not in fails
    )
    assert ("mypy has failed" in said) == ("mypy" in fails)
