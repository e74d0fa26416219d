"""`GET /schema.json`: the JSON schema of the configuration, for editors; with `?vllm=1` the options of vLLM in it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files

import msgspec
from aiohttp import web

from vllm_proxy.api.static import File, served
from vllm_proxy.domain.keys import Scope
from vllm_proxy.domain.options import OptionTable
from vllm_proxy.domain.schema import Schema, with_options
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.envelope import Handler
from vllm_proxy.traffic.front import caller_of

FILE = files("vllm_proxy").joinpath("models.schema.json")


def schema(options: Callable[[], Awaitable[OptionTable | None]]) -> Handler:
    """The handler. `options`: of the vLLM that would run; None where they cannot be had."""

    async def handle(request: web.Request) -> web.Response:
        asked = request.query.get("vllm", "0")
        if asked not in {"0", "1"}:
            msg = f"cannot make the schema: expected vllm=1, got vllm={asked[:20]!r}"
            raise RequestError("bad_request", msg, param="vllm")
        file = await asyncio.to_thread(_plain)
        may = Scope.READ in caller_of(request).scopes
        if asked == "1" and may and (table := await options()) is not None:
            file = await asyncio.to_thread(_with, table)
        return served(request, file)

    return handle


@cache
def _plain() -> File:
    return File.of(FILE.read_bytes(), "application/schema+json")


def _with(table: OptionTable) -> File:
    whole: Schema = json.loads(_plain().body)
    return File.of(msgspec.json.encode(with_options(whole, table)), "application/schema+json")
