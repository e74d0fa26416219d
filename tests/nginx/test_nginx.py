"""Behind a real nginx: that has nothing configured but where to pass requests, and as docs/security.md has it."""

import asyncio
import io
import json
from pathlib import Path

import aiohttp
import pytest

from tests import pages
from tests.harness import daemon, fake_engines, free_port
from tests.nginx.server import nginx
from tests.test_pages import blocks
from vllm_proxy.api.openapi_inference import INFERENCE_ROUTES
from vllm_proxy.domain.keys import hash_of, new_key

pytestmark = pytest.mark.nginx
CHAT = '[models.chat]\nmodel = "org/chat"\n'
PLAIN = "server {{ listen 80; location / {{ proxy_pass http://127.0.0.1:{behind}; }} }}"
KEY = new_key(b"k" * 32)
JSON = {"Content-Type": "application/json"}


async def test_each_event_comes_through_nginx_as_soon_as_it_is_there(tmp_path: Path, port_start: int) -> None:
    """nginx would collect them until its buffer is full or the stream ends: here the engine waits for the first one."""
    gate = tmp_path / "gate"
    body = {"model": "chat", "stream": True, "fake": {"chunks": 3, "hold_at": 1, "hold": str(gate)}}
    async with (
        daemon(fake_engines(port_start) + CHAT, tmp_path) as running,
        nginx(tmp_path, PLAIN.format(behind=running.port)) as url,
    ):
        await running.all_ready()
        async with asyncio.timeout(60), running.session.post(f"{url}/v1/chat/completions", json=body) as answer:
            first = await answer.content.readuntil(b"\n\n")
            assert b"t0" in first
            gate.touch()
            rest = await answer.content.read()
    assert rest.count(b"data: ") == 3
    assert rest.endswith(b"data: [DONE]\n\n")


async def test_the_block_of_the_page_passes_all_inference_on_and_nothing_else(tmp_path: Path, port_start: int) -> None:
    """Each route of it gets as far as the daemon's 401; a body of 2 MiB and a WebSocket of who has a key go through."""
    (block,) = blocks(pages.DOCS / "security.md", "nginx")
    own = free_port()
    text = f'[server]\nlisten = ["127.0.0.1:{own}", "unix:s"]\n{fake_engines(port_start)}{CHAT}'
    keys = f'[keys.me]\nhash = "{hash_of(KEY)}"\n'
    server = block.replace("/run/vllm-proxy-http.sock", str(tmp_path / "s"))
    assert server != block
    async with daemon(text + keys, tmp_path, listens_on=own) as running, nginx(tmp_path, server) as url:
        await running.until("1 of 1 models ready")
        async with aiohttp.ClientSession(url) as stranger, aiohttp.ClientSession(url, headers={"x-api-key": KEY}) as me:
            for route in INFERENCE_ROUTES:
                method, path = route.replace("{", "").replace("}", "").split()
                async with stranger.request(method, path) as answer:
                    assert (answer.status, "error" in await answer.json()) == (401, True), route
            for path in ("/", "/models", "/config", "/metrics", "/tokenize/x", "/v3/models"):
                async with me.get(path) as answer:
                    assert (answer.status, "nginx" in await answer.text()) == (404, True), path
            body = {"model": "chat", "messages": [{"role": "user", "content": "x" * 2**21}]}
            data = io.BytesIO(json.dumps(body).encode())
            async with me.post("/v1/chat/completions", data=data, headers=JSON) as answer:
                assert answer.status == 200
            async with me.ws_connect("/v1/realtime?model=chat") as socket:
                assert (await socket.receive_json(timeout=20))["type"] == "session.created"
