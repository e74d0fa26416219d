"""`/ui/`: the page that operators see. Its files are those of `vllm_proxy/ui`, as they are: nothing is built.

All addresses in them are relative, so that it works behind a path prefix. It is public, as the documentation is; what
it shows comes from routes that need a scope. Its policy allows no scripts of others and no markup made of text.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files

from aiohttp import web

from vllm_proxy.api.reply import Answers, Reply
from vllm_proxy.api.static import HEADERS, File, served
from vllm_proxy.domain.resources import Root
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.envelope import Handler

_INDEX = "index.html"
_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_HTML = {"text/html", "application/xhtml+xml"}
_VARY = {"Vary": "Accept"}
PAGE_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def routes() -> list[tuple[str, str, Handler]]:
    """Method, path and handler of each. The router knows the first with a slash behind it, too."""
    return [("GET", "/ui", _page), ("GET", "/ui/{file}", _file)]


def page_or(root: Answers[Root]) -> Callable[[web.Request], Awaitable[Reply[Root] | web.StreamResponse]]:
    """`GET /`: browsers are led to the page, and all others get what `root` answers."""

    async def handle(request: web.Request) -> Reply[Root] | web.StreamResponse:
        if _asks_for_html(request.headers.get("Accept", "")):
            return web.Response(status=303, headers={**PAGE_HEADERS, **_VARY, "Location": "ui/"})
        answer = await root(request)
        return Reply(answer.value, answer.status, {**answer.headers, **_VARY})

    return handle


async def _page(request: web.Request) -> web.Response:
    """The page. Its addresses are relative ones, which need the slash."""
    if not request.path.endswith("/"):
        return web.Response(status=308, headers={**PAGE_HEADERS, "Location": "ui/"}, text="The page is at ui/\n")
    return served(request, (await asyncio.to_thread(_files))[_INDEX], PAGE_HEADERS)


async def _file(request: web.Request) -> web.Response:
    """What it is made of."""
    found = (await asyncio.to_thread(_files)).get(request.match_info["file"])
    if found is None:
        raise RequestError("not_found", f"cannot find {request.path[:100]}: the page is at /ui/")
    return served(request, found, PAGE_HEADERS)


@cache
def _files() -> dict[str, File]:
    """By name."""
    return {
        file.name: File.of(file.read_bytes(), _KINDS[kind])
        for file in files("vllm_proxy").joinpath("ui").iterdir()
        if (kind := file.name.rpartition(".")[2]) in _KINDS
    }


def _asks_for_html(accept: str) -> bool:
    """Whether nothing is wanted more than HTML; of what is wanted as much, the first counts."""
    wanted = [_wanted(one) for one in accept.split(",")]
    return max(wanted, key=lambda one: one[1])[0] in _HTML


def _wanted(media_range: str) -> tuple[str, float]:
    kind, *parameters = (part.strip().lower() for part in media_range.split(";"))
    quality = next((text.removeprefix("q=") for text in parameters if text.startswith("q=")), "1")
    try:
        return kind, float(quality)
    except ValueError:
        return kind, 0.0
