"""Behind a real nginx that has nothing configured but where to pass requests."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.harness import daemon, fake_engines, free_port, until

pytestmark = pytest.mark.nginx
CHAT = '[models.chat]\nmodel = "org/chat"\n'
CONFIGURATION = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; {user}
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{behind}; }} }}
}}
"""


@contextlib.asynccontextmanager
async def nginx(folder: Path, behind: int) -> AsyncIterator[str]:
    """The URL of one in front of a port."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "no nginx here: `apt-get install nginx`, or leave these tests out with -m 'not nginx'"
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    file = folder / "nginx.conf"
    file.write_text(CONFIGURATION.format(folder=folder, port=port, behind=behind, user=user))
    process = await asyncio.create_subprocess_exec(program, "-p", str(folder), "-c", str(file), "-e", "stderr")
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as session:

            async def answers() -> bool:
                assert process.returncode is None, "nginx has ended"
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    async with session.get(f"{url}/health") as answer:
                        return answer.status == 200
                return False

            await until(answers, bool)
        yield url
    finally:
        process.terminate()
        await process.wait()


async def test_each_event_comes_through_nginx_as_soon_as_it_is_there(tmp_path: Path, port_start: int) -> None:
    """nginx would collect them until its buffer is full or the stream ends: here the engine waits for the first one."""
    gate = tmp_path / "gate"
    body = {"model": "chat", "stream": True, "fake": {"chunks": 3, "hold_at": 1, "hold": str(gate)}}
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running, nginx(tmp_path, running.port) as url:
        await running.all_ready()
        async with asyncio.timeout(60), running.session.post(f"{url}/v1/chat/completions", json=body) as answer:
            first = await answer.content.readuntil(b"\n\n")
            assert b"t0" in first
            gate.touch()
            rest = await answer.content.read()
    assert rest.count(b"data: ") == 3
    assert rest.endswith(b"data: [DONE]\n\n")
