"""What pyproject.toml, the lock and the change log say of the project: the same, and of this version."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

from vllm_proxy import __version__

ROOT = Path(__file__).parents[1]


def toml(name: str) -> Any:  # noqa: ANN401 - TOML
    """A file of the checkout's top level."""
    return tomllib.loads((ROOT / name).read_text(encoding="utf-8"))


def test_the_version_is_that_of_pyproject_and_of_the_newest_entry() -> None:
    """It stands in pyproject.toml; the package asks its own metadata, the Nix package reads the file."""
    project = toml("pyproject.toml")["project"]
    assert __version__ == project["version"], "the environment is older than pyproject.toml: `uv sync`"
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", log, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(__version__)} - \d{{4}}-\d\d-\d\d", headings[1])
    (locked,) = (package for package in toml("uv.lock")["package"] if package["name"] == project["name"])
    assert locked["version"] == __version__


def test_every_python_that_is_claimed_is_locked_for_both_machines() -> None:
    """3.13 and 3.14, on x86_64 and aarch64: whatever has a wheel for one machine and Python has it for the other."""
    project, lock = toml("pyproject.toml"), toml("uv.lock")
    claimed = [one.rpartition(" ")[2] for one in project["project"]["classifiers"] if "Python :: 3." in one]
    assert claimed == ["3.13", "3.14"]
    assert project["project"]["requires-python"] == lock["requires-python"] == ">=3.13"
    assert len(lock["supported-markers"]) == 2
    names = {re.split(r"[<>=]", one)[0] for one in project["project"]["dependencies"]}
    packages = [package for package in lock["package"] if package["name"] in names]
    assert {package["name"] for package in packages} == names
    for package in packages:
        if "wheels" not in package:  # its source is Python alone
            continue
        wheels = [wheel["url"].rpartition("/")[2] for wheel in package["wheels"]]
        for python in ("cp313-cp313", "cp314-cp314"):
            fitting = [wheel for wheel in wheels if python in wheel or "-abi3-" in wheel]
            machines = {one for one in ("x86_64", "aarch64") for wheel in fitting if one in wheel}
            universal = any(wheel.endswith("-none-any.whl") for wheel in wheels)
            assert universal or machines == {"x86_64", "aarch64"}, (package["name"], python)


def test_uv_is_had_from_a_checkout_where_it_is_not_on_path(tmp_path: Path) -> None:
    """`packaging/dev uv` looks where its installers put it, and passes on what it is told."""
    uv = tmp_path / ".local/bin/uv"
    uv.parent.mkdir(parents=True)
    uv.write_text('#!/bin/sh\necho "uv was told: $*"\n')
    uv.chmod(0o755)
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "UV_PYTHON": "3.13"}
    done = subprocess.run(
        ["sh", str(ROOT / "packaging/dev"), "uv", "sync", "--locked"],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "uv was told: sync --locked\n"
