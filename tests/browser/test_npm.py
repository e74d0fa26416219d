"""The official client of JavaScript, from npm, meets keys: as those of Python do in tests/daemon/test_clients.py."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_clients import KEYS, MISTYPED, TOKENS, configure, with_keys
from tests.harness import Daemon

pytestmark = pytest.mark.browser
PACKAGE = Path(__file__).parent / "npm"  # its lock says which version, with its hash


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """The daemon of all tests here."""
    async with with_keys(tmp_path_factory.mktemp("clients")) as found:
        yield found


@pytest.fixture(scope="module")
async def package(pytestconfig: pytest.Config) -> Path:
    """The package in a folder of the cache, fetched once."""
    npm = shutil.which("npm")
    assert npm, "no npm here: `apt-get install nodejs npm`, or leave these tests out with -m 'not browser'"
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("npm")
    for file in PACKAGE.iterdir():
        shutil.copy(file, folder)
    if not (folder / "node_modules" / "openai").is_dir():
        process = await asyncio.create_subprocess_exec(
            npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=folder,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await process.communicate()
        assert process.returncode == 0, f"cannot fetch openai from npm's registry:\n{out.decode()}"
    return folder


class Script:
    """The running script."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self._process = process
        self._url = url

    async def send(self, key: str, model: str = "chat", **more: object) -> None:
        """Have it ask."""
        assert self._process.stdin is not None
        asked = {"url": f"{self._url}/v1", "key": key, "model": model, **more}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        await self._process.stdin.drain()

    async def read(self) -> Any:  # noqa: ANN401 - JSON
        """The next thing that it says."""
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            return json.loads(await self._process.stdout.readline())

    async def ask(self, key: str, model: str = "chat", **more: object) -> Any:  # noqa: ANN401 - JSON
        """What becomes of a request."""
        await self.send(key, model, **more)
        while "event" in (found := await self.read()):
            pass
        return found


@pytest.fixture
async def script(running: Daemon, package: Path) -> AsyncIterator[Script]:
    """The script, ready to ask the daemon."""
    node = shutil.which("node")
    assert node, "no node here: `apt-get install nodejs`, or leave these tests out with -m 'not browser'"
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(node, "ask.mjs", cwd=package, stdin=pipe, stdout=pipe)
    try:
        yield Script(process, running.url)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("stream", [False, True])
async def test_the_client_from_npm_raises_at_once(script: Script, stream: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """The class that its users catch, with the code, and one request."""
    expected = [
        (MISTYPED, "AuthenticationError", 401, "invalid_api_key"),
        (TOKENS["unknown"], "AuthenticationError", 401, "invalid_api_key"),
        (TOKENS["revoked"], "AuthenticationError", 401, "invalid_api_key"),
        (TOKENS["expired"], "AuthenticationError", 401, "expired_api_key"),
        (TOKENS["narrow"], "PermissionDeniedError", 403, "missing_scope"),
    ]
    for key, error, status, code in expected:
        found = await script.ask(key, stream=stream)
        assert (found["error"], found["status"], found["code"], found["requests"]) == (error, status, code, 1)
    found = await script.ask(TOKENS["good"], "other", stream=stream)
    assert (found["error"], found["status"], found["requests"]) == ("NotFoundError", 404, 1)
    assert (await script.ask(TOKENS["good"], stream=stream))["error"] is None


async def test_a_stream_whose_key_is_revoked_raises_in_javascript_too(
    running: Daemon, script: Script, tmp_path: Path
) -> None:
    """What came before is there, and no reason why the model would have finished."""
    fault = {"hold": str(tmp_path / "never"), "hold_at": 2, "chunks": 4}
    await script.send(TOKENS["streams"], stream=True, fake=fault)
    assert await script.read() == {"event": "t0 "}
    await configure(running, KEYS.replace('models = ["*"]', "enabled = false"))
    while "event" in (found := await script.read()):
        pass
    await configure(running, KEYS)
    assert found["isApiError"]
    assert (found["code"], found["finished"], found["requests"]) == ("invalid_api_key", False, 1)


async def test_any_key_will_do_in_javascript_where_none_is_needed(running: Daemon, script: Script) -> None:
    """On loopback without keys, and where anonymous may infer."""
    for keys in ("", KEYS + '[keys.anonymous]\nscopes = ["inference"]\n'):
        await configure(running, keys)
        assert (await script.ask("EMPTY"))["text"] == "echo: hi"
    await configure(running, KEYS)
