"""The page behind a real nginx that speaks TLS and has the daemon below a path, with nginx's defaults otherwise."""

from pathlib import Path

import pytest

from tests import certificates
from tests.browser.chromium import Browser
from tests.browser.screens import click, fill, goes, has, sends, value
from tests.harness import OPEN, daemon, fake_engines
from tests.nginx.server import nginx

pytestmark = [pytest.mark.browser, pytest.mark.nginx]
MODELS = """
[models.chat]
model = "org/chat"
max_model_len = 4096 # as the card says
[models.later]
model = "org/later"
start = "on-demand"
"""
SERVER = """server {{
  listen 443 ssl; ssl_certificate {pair.certificate}; ssl_certificate_key {pair.key};
  location /llm/ {{ proxy_pass http://127.0.0.1:{port}/; }}
}}"""
LATER = "[...document.querySelectorAll('main tbody tr')].find(row => row.querySelector('.name').innerText === 'later')"
ANSWER = "document.querySelector('.bubble.assistant > p:last-of-type')?.innerText.trim()"


async def test_it_works_behind_tls_and_a_path_prefix(chromium: Browser, tmp_path: Path, port_start: int) -> None:
    """Every address is relative to it; its streams come event by event; a change is planned and applied there."""
    pair, gate = certificates.make(tmp_path), tmp_path / "gate"
    async with (
        daemon(fake_engines(port_start) + OPEN + MODELS, tmp_path) as running,
        nginx(tmp_path, SERVER.format(pair=pair, port=running.port)) as url,
    ):
        await running.once("chat", lambda one: one["state"] == "ready")
        page = await chromium.page()
        await page.call("Security.setIgnoreCertificateErrors", ignore=True)
        await page.open(f"{url}/llm/ui/")
        await page.front()
        await page.until(has("tbody", "chat"))

        await click(page, "Start later")
        await page.until(f"{LATER}.innerText.includes('ready')")
        await running.write("POST", "/models/later/stop", status=202)
        await page.until(f"{LATER}.querySelector('.state').innerText === 'stopped'")
        await goes(page, "model/chat")
        await page.until("document.querySelectorAll('.log div').length > 3")

        await goes(page, "config")
        await page.until(has("#verdict", "In force"))
        text = (await value(page, "models.toml")).replace("4096", "8192")
        await fill(page, "models.toml", text)
        await page.until(has("#verdict", "max_model_len 4096 -> 8192"))
        await click(page, "Apply")
        await page.until(has("#said", "applied"))
        assert running.file.read_text() == text
        await running.eventually("/v1/models/chat", lambda card: card["max_model_len"] == 8192)

        await goes(page, "play/chat")
        await sends(page, {"fake": {"hold_at": 2, "hold": str(gate), "chunks": 5}})
        await fill(page, "Message", "hello")
        await click(page, "Send")
        await page.until(f"{ANSWER} === 't0 t1'")
        gate.touch()
        await page.until(f"{ANSWER} === 't0 t1 t2 t3 t4'")

        assert all(asked.startswith(f"{url}/llm/") for asked in page.requests), page.requests
        assert page.complaints == []
        await page.close()
