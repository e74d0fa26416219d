"""Debian's nginx, with nothing configured but the `server` that a test gives it."""

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from tests.harness import free_port, until

CONFIGURATION = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; {user}
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  {server}
}}
"""


@contextlib.asynccontextmanager
async def nginx(folder: Path, server: str) -> AsyncIterator[str]:
    """The URL of one with this `server`, at a port of its own in the place of 80, or of 443."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "no nginx here: `apt-get install nginx`, or leave these tests out with -m 'not nginx'"
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    file = folder / "nginx.conf"
    scheme = "https" if "listen 443 ssl;" in server else "http"
    server = re.sub(r"listen (80|443)\b", f"listen 127.0.0.1:{port}", server)
    file.write_text(CONFIGURATION.format(folder=folder, server=server, user=user))
    process = await asyncio.create_subprocess_exec(program, "-p", str(folder), "-c", str(file), "-e", "stderr")
    url = f"{scheme}://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as session:

            async def answers() -> bool:
                assert process.returncode is None, "nginx has ended"
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    async with session.get(f"{url}/health", ssl=False):
                        return True
                return False

            await until(answers, bool)
        yield url
    finally:
        process.terminate()
        await process.wait()
