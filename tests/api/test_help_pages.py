"""`/help/`: the pages of the manual in a browser, whole, with every link leading somewhere and nothing fetched."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from vllm_proxy.api import help_pages
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.errors import STATUS
from vllm_proxy.help import TOPICS, page, sections
from vllm_proxy.traffic.envelope import envelope


@pytest.fixture(name="client")
async def _client() -> Any:  # noqa: ANN401 - an async generator
    """Of a server with these routes alone."""
    app = web.Application(middlewares=[envelope])
    for method, path, handler in help_pages.routes():
        app.router.add_route(method, path, handler)
        app.router.add_route(method, path + "/", handler)
    async with TestClient(TestServer(app)) as client:
        yield client


async def fetched(client: TestClient[Any, Any], path: str) -> str:
    """The text of a page, its head checked."""
    async with client.get(path, allow_redirects=False) as answer:
        assert answer.status == 200, path
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        return await answer.text()


async def test_every_page_is_there_with_its_sections_and_links(client: TestClient[Any, Any]) -> None:
    """Every heading has its address; every link leads to a page and a heading that it has, or to the web."""
    texts = {topic: await fetched(client, f"/help/{topic}") for topic in TOPICS}
    addresses = {topic: set(re.findall(r'id="([^"]+)"', text)) for topic, text in texts.items()}
    for topic, text in texts.items():
        assert {section.name for section in sections(topic)} <= addresses[topic], topic
        assert "<script" not in text
        assert not re.search(r'(?:src|url\()\s*=?\s*"?https?:', text), "nothing is fetched from elsewhere"
        for target in re.findall(r'href="([^"]+)"', text):
            if target.startswith(("http://", "https://", "data:")) or target in {"./", "../ui/"}:
                continue
            name, heading = urldefrag(target)
            assert (name or topic) in TOPICS, (topic, target)
            assert not heading or heading in addresses[name or topic], (topic, target)
        assert "<!--" not in text.replace("<!DOCTYPE", "")


async def test_what_a_page_says_is_in_it(client: TestClient[Any, Any]) -> None:
    """Tables are tables, code is code, and what looks like markup in the text is none."""
    text = await fetched(client, "/help/errors")
    assert text.count("<table>") == len(re.findall(r"^\|[ -]*---", page("errors"), re.MULTILINE))
    assert "<code>vllm-proxy help" in text or "<code>" in text


async def test_the_list_names_every_page(client: TestClient[Any, Any]) -> None:
    """In the manual's order, with a sentence each; `/help` leads there."""
    text = await fetched(client, "/help/")
    assert re.findall(r'<li><a href="(\w+)">', text) == list(TOPICS)
    assert '<nav aria-label="Pages"><a href="../ui/">fleet</a>' in text, "and the way back to the page of the fleet"
    async with client.get("/help", allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (308, "help/")


@pytest.mark.parametrize("code", [*STATUS, *map(str, Reason), "78"])
async def test_a_code_leads_to_its_section(client: TestClient[Any, Any], code: str) -> None:
    """Error codes, reasons, exit statuses."""
    async with client.get(f"/help/{code}", allow_redirects=False) as answer:
        assert answer.status == 303
        name, heading = urldefrag(answer.headers["Location"])
    assert name == "errors"
    assert heading in {section.name for section in sections("errors")}


async def test_machines_get_the_text(client: TestClient[Any, Any]) -> None:
    """One page, or all; unchanged ones are not sent again."""
    async with client.get("/help/errors.md") as answer:
        assert (answer.content_type, await answer.text()) == ("text/markdown", page("errors"))
        tag = answer.headers["ETag"]
    async with client.get("/help/errors.md", headers={"If-None-Match": tag}) as answer:
        assert answer.status == 304
    async with client.get("/help/all.md") as answer:
        text = await answer.text()
    assert all(page(topic) in text for topic in TOPICS)


@pytest.mark.parametrize("name", ["nothing", "..%2Ferrors", "errors.html", "%3Cscript%3E"])
async def test_what_is_no_page_is_404(client: TestClient[Any, Any], name: str) -> None:
    """With where the pages are."""
    async with client.get(f"/help/{name}") as answer:
        assert answer.status == 404
        assert "GET /help/ lists them" in (await answer.json())["error"]["message"]


def test_the_pages_are_in_the_package() -> None:
    """So that they are of the daemon's own version."""
    assert all((Path(help_pages.__file__).parents[1] / "docs" / f"{topic}.md").is_file() for topic in TOPICS)
