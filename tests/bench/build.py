"""Compiles the two C programs of the benchmark, and finds or installs the peers that come from PyPI."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
# Exact versions: figures stay comparable.
PACKAGES = {"vllm-router": "vllm-router==0.1.17", "litellm": "litellm[proxy]==1.106.2"}


@dataclass(frozen=True, slots=True)
class Programs:
    """The compiled programs."""

    engine: Path
    load: Path


def compiler() -> str | None:
    """The C compiler of this machine."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")


def compile_programs(folder: Path) -> Programs:
    """Compile both into `folder`, anew: it takes a second."""
    program = compiler()
    if not program:
        raise SystemExit("cannot build the benchmark: no C compiler (cc, gcc, $CC)")
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in ("mock_engine", "load"):
        found[name] = folder / name
        source = str(HERE / f"{name}.c")
        subprocess.run([program, "-O2", "-Wall", "-Wextra", "-o", str(found[name]), source], check=True)
    return Programs(found["mock_engine"], found["load"])


def cache() -> Path:
    """Where installed peers are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vllm-proxy" / "bench"


def find(name: str) -> str | None:
    """The program of a peer: on PATH, in a folder where Debian puts it, or installed by `install`."""
    places = [os.environ.get("PATH", ""), "/usr/sbin", "/sbin", str(cache() / name / "bin")]
    return shutil.which(name, path=os.pathsep.join(places))


def install(name: str) -> str | None:
    """Install a peer from PyPI into a virtual environment of its own; returns what went wrong."""
    folder = cache() / name
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        steps = [
            [uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), PACKAGES[name]],
        ]
    else:
        steps = [
            [sys.executable, "-m", "venv", str(folder)],
            [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", PACKAGES[name]],
        ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return None
