"""The wheel, alone in an environment of its own: nothing of the checkout is needed to run it."""

import asyncio
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.harness import clean_environment, fake_engines, free_port
from vllm_proxy import __version__
from vllm_proxy.help import TOPICS

pytestmark = pytest.mark.slow  # and it asks the package index

ROOT = Path(__file__).parents[1]
CHAT = '[models.chat]\nmodel = "org/chat"\n'


@dataclass(frozen=True)
class Installed:
    """A wheel, and the program that it installs."""

    wheel: Path
    program: Path

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of it in a folder."""
        env = {name: value for name, value in clean_environment().items() if not name.startswith("PYTHON")}
        command = [str(self.program), *arguments]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def uv(*arguments: str) -> str:
    """Run uv, which `uv run` names in UV, in the checkout; returns its output."""
    places = [os.environ.get("UV"), shutil.which("uv"), str(Path.home() / ".cache/vllm-proxy/uv/bin/uv")]
    program = next((place for place in places if place and _works(place)), None)
    assert program is not None, "no uv: run the tests with `sh packaging/dev test`"
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _works(program: str) -> bool:
    try:
        return subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Built from the checkout, and installed with the locked versions of what it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--quiet", "--wheel", "--out-dir", str(folder))
    (wheel,) = folder.glob("*.whl")
    locked = folder / "locked.txt"
    uv("export", "--quiet", "--locked", "--no-dev", "--no-emit-project", "--no-hashes", "-o", str(locked))
    uv("venv", "--quiet", "--python", getattr(sys, "_base_executable", sys.executable), str(folder / "venv"))
    python = folder / "venv/bin/python"
    uv("pip", "install", "--quiet", "--python", str(python), "--constraints", str(locked), str(wheel))
    return Installed(wheel, folder / "venv/bin/vllm-proxy")


def test_the_wheel_holds_the_package_and_nothing_else(installed: Installed) -> None:
    """Every file of `vllm_proxy`, data and pages included, the licence, and completions where shells look."""
    with zipfile.ZipFile(installed.wheel) as archive:
        inside = set(archive.namelist())
    package = {str(file.relative_to(ROOT)) for file in (ROOT / "vllm_proxy").rglob("*") if file.is_file()}
    metadata = f"vllm_proxy-{__version__}.dist-info/"
    names = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert {"vllm_proxy/docs/operating.md", "vllm_proxy/ui/index.html", "vllm_proxy/ui/app.js"} <= inside
    shared = {
        f"vllm_proxy-{__version__}.data/data/share/{place}"
        for place in (
            "bash-completion/completions/vllm-proxy",
            "zsh/site-functions/_vllm-proxy",
            "fish/vendor_completions.d/vllm-proxy.fish",
        )
    }
    package = {name for name in package if "__pycache__" not in name}
    assert inside == package | {metadata + name for name in names} | shared


def test_its_commands_run_from_anywhere(installed: Installed, tmp_path: Path) -> None:
    """Version, help, the pages of the manual, a first file, and the verdict over a good and a bad one."""
    assert installed.run(tmp_path, "--version").stdout == f"vllm-proxy {__version__}\n"
    assert "serve" in installed.run(tmp_path, "--help").stdout
    for topic in TOPICS:
        assert installed.run(tmp_path, "help", topic).stdout == (ROOT / f"vllm_proxy/docs/{topic}.md").read_text()
    assert installed.run(tmp_path, "init").returncode == 0
    assert installed.run(tmp_path, "check").stdout == f"{tmp_path}/models.toml: valid, 1 model\n"
    (tmp_path / "models.toml").write_text("[models.chat]\n", encoding="utf-8")
    refused = installed.run(tmp_path, "check")
    assert (refused.returncode, "models.chat.model" in refused.stdout) == (78, True)


async def test_it_serves(installed: Installed, tmp_path: Path, port_start: int) -> None:
    """A round trip through an engine, the document of the API, pages that name the extra they need, a clean end."""
    (tmp_path / "models.toml").write_text(fake_engines(port_start) + CHAT, encoding="utf-8")
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            installed.program, "serve", "--port", str(port), "--state-dir", str(tmp_path / "state"),
            cwd=tmp_path, env=clean_environment(), stdout=log, stderr=log,
        )  # fmt: skip
    try:
        async with asyncio.timeout(60), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            while not await listens(client):
                assert process.returncode is None, (tmp_path / "log").read_text(encoding="utf-8")
            body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
            async with client.post("/v1/chat/completions", json=body) as answer:
                assert (await answer.json())["object"] == "chat.completion"
            for page, expected in (
                ("/openapi.json", 200),
                ("/ui/", 200),
                ("/ui/app.js", 200),
                ("/docs", 501),
                ("/redoc", 501),
            ):
                async with client.get(page) as answer:
                    assert answer.status == expected
    finally:
        process.terminate()
        status = await process.wait()
    assert status == 0


async def listens(client: aiohttp.ClientSession) -> bool:
    """Whether the daemon answers."""
    try:
        async with client.get("/health") as answer:
            return answer.status == 200
    except aiohttp.ClientConnectorError:
        return False
