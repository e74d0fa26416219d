"""`/openapi.json`, `/docs` and `/redoc`: the documentation of the API, served without any request to another machine.

The pages are ours. Their libraries, Swagger UI and ReDoc, are read from the installed package aiohttp-swagger3, whose
own code must never be imported. It comes with the extra `docs`; where it is missing, the pages say so.
"""

import asyncio
from collections.abc import Iterable
from functools import cache
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import msgspec
from aiohttp import web

from vllm_proxy.api.openapi import Described, document
from vllm_proxy.api.static import HEADERS, File, constant, served
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.envelope import Handler

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vllm-proxy: {title}</title>
<link rel="icon" type="image/png" href="docs/assets/{name}.png">
{style}<style>body {{ margin: 0; }}</style>
</head>
<body>
<div id="page"></div>
<noscript>This page needs JavaScript. What it shows is in <a href="openapi.json">openapi.json</a>.</noscript>
<script src="docs/assets/{library}"></script>
<script src="docs/assets/{name}.js"></script>
</body>
</html>
"""
_MISSING = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>vllm-proxy: API</title></head>
<body>
<p>This page is made of the package aiohttp-swagger3, which is not installed. It comes with the extra
<code>docs</code> of vllm-proxy: <code>uv sync --extra docs</code> in a checkout. Then restart the daemon.</p>
<p>What the page shows is in <a href="openapi.json">openapi.json</a>.</p>
</body>
</html>
"""
_STYLE = '<link rel="stylesheet" href="docs/assets/swagger-ui.css">\n'
_SWAGGER = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#page",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  validatorUrl: null,
});
"""
_REDOC = """const font = "system-ui, 'Liberation Sans', sans-serif";
Redoc.init("openapi.json", {
  hideDownloadButton: true,
  expandResponses: "200,201,202",
  theme: { typography: { fontFamily: font, headings: { fontFamily: font } } },
}, document.getElementById("page"));
"""
_LOGO = b"https://cdn.redoc.ly/redoc/logo-mini.svg"  # ReDoc would fetch it
_NO_LOGO = b"data:,"

PAGE_HEADERS = {
    **HEADERS,
    # The pages set styles as they go, and ReDoc searches in a worker made from a blob.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self'; connect-src 'self'; worker-src blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'",
}
_SCRIPT, _PNG = "text/javascript", "image/png"
_OWN = {"swagger.js": _SWAGGER, "redoc.js": _REDOC}
_PACKAGED = {
    "swagger-ui-bundle.js": ("swagger_ui/swagger-ui-bundle.js", _SCRIPT),
    "swagger-ui.css": ("swagger_ui/swagger-ui.css", "text/css"),
    "swagger.png": ("swagger_ui/favicon-32x32.png", _PNG),
    "redoc.standalone.js": ("redoc_ui/redoc.standalone.js", _SCRIPT),
    "redoc.png": ("redoc_ui/favicon-32x32.png", _PNG),
}


def find_assets() -> Path | None:
    """The folder of what the pages are made of; None where the extra `docs` is not installed."""
    try:
        return Path(str(distribution("aiohttp-swagger3").locate_file("aiohttp_swagger3")))
    except PackageNotFoundError:
        return None


def routes(others: Iterable[Described], assets: Path | None) -> list[tuple[str, str, Handler]]:
    """Method, path and handler of each page; they describe themselves and all `others`.

    `assets`: as `find_assets` has it.
    """
    swagger = _PAGE.format(title="API", name="swagger", library="swagger-ui-bundle.js", style=_STYLE)
    redoc = _PAGE.format(title="API reference", name="redoc", library="redoc.standalone.js", style="")
    found = [
        ("GET", "/docs", _page(swagger, assets)),
        ("GET", "/redoc", _page(redoc, assets)),
        ("GET", "/docs/assets/{file}", _asset(assets)),
    ]
    described = [*others, ("GET", "/openapi.json", None), *((method, path, None) for method, path, _ in found)]
    json = File.of(msgspec.json.encode(document(described)), "application/json")
    return [("GET", "/openapi.json", constant(json, PAGE_HEADERS)), *found]


def _page(text: str, assets: Path | None) -> Handler:
    if assets is None:
        return constant(File.of(_MISSING.encode(), "text/html"), PAGE_HEADERS, HTTPStatus.NOT_IMPLEMENTED)
    return constant(File.of(text.encode(), "text/html"), PAGE_HEADERS)


def _asset(assets: Path | None) -> Handler:
    """`GET /docs/assets/{file}`."""

    async def handle(request: web.Request) -> web.Response:
        name = request.match_info["file"]
        if assets is None or (name not in _OWN and name not in _PACKAGED):
            raise RequestError("not_found", f"cannot find {request.path}: see GET / for what there is")
        return served(request, await asyncio.to_thread(_read, assets, name), PAGE_HEADERS)

    return handle


@cache
def _read(assets: Path, name: str) -> File:
    """A file that a page is made of; cached after its first use."""
    if name in _OWN:
        return File.of(_OWN[name].encode(), _SCRIPT)
    path, kind = _PACKAGED[name]
    return File.of((assets / path).read_bytes().replace(_LOGO, _NO_LOGO), kind)
