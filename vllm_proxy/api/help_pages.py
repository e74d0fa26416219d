"""`/help/`: the pages of the manual as HTML, those that `vllm-proxy help` prints; no script, no other machine.

`/help/{topic}` is a page, `/help/{topic}.md` its text, `/help/all.md` all of them, for machines. A code leads to its
section: `/help/out_of_memory`.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from functools import cache
from html import escape

from aiohttp import web
from markdown_it import MarkdownIt
from markdown_it.token import Token

from vllm_proxy import help as pages
from vllm_proxy.api.docs import PAGE_HEADERS
from vllm_proxy.api.static import File, served
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.envelope import Handler

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} - vllm-proxy</title>
<link rel="icon" href="data:,">
<style>
body {{ margin: 0 auto; padding: 1rem; max-width: 64rem; font: 1rem/1.55 system-ui, sans-serif; }}
nav a {{ display: inline-block; padding: 0.25rem 0.6rem 0.25rem 0; }}
a {{ color: light-dark(#0b57d0, #a8c7fa); }}
nav a[aria-current] {{ color: inherit; font-weight: 600; text-decoration: none; }}
pre, code {{ font: 0.9rem/1.5 ui-monospace, monospace; }}
pre, .wide {{ overflow-x: auto; }}
pre {{ padding: 0.75rem; background: light-dark(#f2f4f7, #20242b); }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.3rem 0.75rem 0.3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid light-dark(#d5d9df, #3a404a); }}
h2, h3 {{ scroll-margin-top: 0.5rem; }}
:target {{ background: light-dark(#fff3c4, #4a3f12); }}
</style>
</head>
<body>
<nav aria-label="Pages"><a href="../ui/">fleet</a>
{navigation}</nav>
<main>
{body}</main>
</body>
</html>
"""
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_LINK = re.compile(r"(?P<page>[a-z]+)\.md(?P<section>#.*)?")
_HTML, _MARKDOWN = "text/html", "text/markdown"
_ALL = "all.md"


def routes() -> list[tuple[str, str, Handler]]:
    """Method, path and handler of each. The router knows each with a slash behind it, too."""
    return [("GET", "/help", _contents), ("GET", "/help/{topic}", _topic)]


async def _contents(request: web.Request) -> web.Response:
    """The list. Its links are relative ones, so that they hold behind a path prefix: they need the slash."""
    if not request.path.endswith("/"):
        return web.Response(status=308, headers={**PAGE_HEADERS, "Location": "help/"}, text="The manual is at help/\n")
    return served(request, await asyncio.to_thread(_list), PAGE_HEADERS)


async def _topic(request: web.Request) -> web.Response:
    name = request.match_info["topic"]
    made: Callable[[], File] | None = None
    if name == _ALL:
        made = _everything
    elif name in pages.TOPICS:
        made = lambda: _page(name)  # noqa: E731 - one of three
    elif name.removesuffix(".md") in pages.TOPICS:
        made = lambda: File.of(pages.page(name.removesuffix(".md")).encode(), _MARKDOWN)  # noqa: E731 - as above
    if made is not None:
        return served(request, await asyncio.to_thread(made), PAGE_HEADERS)
    place = await asyncio.to_thread(_place, name)
    if place is None:
        msg = f"cannot find a page about {name[:100]!r}: GET /help/ lists them"
        raise RequestError("not_found", msg)
    return web.Response(status=303, headers={**PAGE_HEADERS, "Location": place})


def _place(code: str) -> str | None:
    """Where a code is explained; a code is the heading of a section of the page about errors."""
    wanted = pages.anchor(code)
    found = {wanted, f"exit-status-{wanted}"} & {section.name for section in pages.sections("errors")}
    return f"errors#{found.pop()}" if wanted and found else None


@cache
def _everything() -> File:
    return File.of("\n".join(pages.page(topic) for topic in pages.TOPICS).encode(), _MARKDOWN)


@cache
def _list() -> File:
    rows = "".join(
        f'<li><a href="{name}">{name}</a>: {_markdown().renderInline(sentence, {"page": name})}</li>\n'
        for name, sentence in pages.topics()
    )
    body = (
        f"<h1>vllm-proxy</h1>\n<ul>\n{rows}</ul>\n"
        f'<p>All of it as text: <a href="{_ALL}">{_ALL}</a>. The API: <a href="../docs">docs</a>.</p>\n'
    )
    return _whole("The manual", "", body)


@cache
def _page(name: str) -> File:
    text = _COMMENT.sub("", pages.page(name))
    title = text.partition("\n")[0].lstrip("# ")
    return _whole(title, name, _markdown().render(text))


def _whole(title: str, current: str, body: str) -> File:
    links = "\n".join(
        f'<a href="{topic or "./"}"{" aria-current=page" if topic == current else ""}>{topic or "contents"}</a>'
        for topic in ("", *pages.TOPICS)
    )
    return File.of(_PAGE.format(title=escape(title), navigation=links, body=body).encode(), _HTML)


@cache
def _markdown() -> MarkdownIt:
    """What renders: tables, no HTML of the text's own, headings with addresses, links between the pages."""
    made = MarkdownIt("commonmark", {"html": False}).enable("table")
    made.core.ruler.push("addresses", lambda state: _address(state.tokens))
    made.add_render_rule("table_open", lambda _self, *_: '<div class="wide" tabindex="0" role="group"><table>\n')
    made.add_render_rule("table_close", lambda _self, *_: "</table></div>\n")
    return made


def _address(tokens: Sequence[Token]) -> None:
    """Give every heading its address, and lead links to other pages there; what is no page is no link."""
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", pages.anchor(tokens[place + 1].content))
        if token.children:
            token.children = _linked(token.children)


def _linked(children: Sequence[Token]) -> list[Token]:
    found: list[Token] = []
    leaves = False  # of a link to a file that is not here: its words stay
    for child in children:
        if child.type == "link_open":
            target = str(child.attrGet("href") or "")
            inside = _LINK.fullmatch(target)
            leaves = not (inside or target.startswith(("http://", "https://", "#")))
            if inside:
                child.attrSet("href", inside["page"] + (inside["section"] or ""))
        if leaves and child.type in {"link_open", "link_close"}:
            leaves = child.type == "link_open"
            continue
        found.append(child)
    return found
