"""What requests that change something carry: a body in JSON or TOML, bounded and counted, and `If-Match`.

For `config` and `keys`. Bodies of inference are in `traffic/body.py`.
"""

import re
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from vllm_proxy.domain.config import Server
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.body import read_content
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.framing import ask_for_body
from vllm_proxy.traffic.front import client_of

_MOST_BYTES = 4 * 2**20  # a thousand models have a tenth of that
_DEEPEST = 500  # values inside each other, of which messages can still be made: what comes later may recurse
_ETAG = re.compile(r'(?:W/)?"([^"]*)"')


class Bodies:
    """Reads the bodies of one daemon's requests."""

    def __init__(self, server: Callable[[], Server], budget: Budget) -> None:
        """`server`: the `[server]` table now; `budget`: bodies count there until their request has ended."""
        self._server = server
        self._budget = budget

    async def read(self, request: web.Request) -> bytes:
        """All of it, of a size that can be worked with in a moment.

        Raises:
            RequestError: `request_too_large`, `overloaded`, or what else `read_content` raises.

        """
        server = self._server()
        size = request.content_length or 0
        self._budget.check_length(size, server)
        if size <= _MOST_BYTES:
            ask_for_body(request)
            data = await read_content(request.content, client_of(request), server, self._budget)
            if len(data) <= _MOST_BYTES:
                return data
        msg = f"cannot take this request: what changes a configuration has at most {_MOST_BYTES // 2**20} MiB"
        raise RequestError("request_too_large", msg)

    async def json_object(self, request: web.Request, of: str) -> dict[str, Any]:
        """A JSON object. `of`: what it is, for the message.

        Raises:
            RequestError: `invalid_json`, or as `read`.

        """
        keys = _decoded(await self.read(request))
        if not isinstance(keys, dict):
            raise RequestError("invalid_json", f"cannot read this body: expected a JSON object of {of}")
        return keys

    async def toml(self, request: web.Request) -> bytes:
        """A text declared as TOML, or none.

        Raises:
            RequestError: `unsupported_media_type`, or as `read`.

        """
        if request.body_exists and "toml" not in request.content_type:
            msg = f"cannot read a configuration of type {request.content_type}: send it as text/toml"
            raise RequestError("unsupported_media_type", msg)
        return await self.read(request)


def _decoded(data: bytes) -> object:
    why = "it is nested too deeply"
    try:
        if not _is_deep(value := msgspec.json.decode(data)):
            return value
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        why = str(error)
        if "truncated" in why:  # what msgspec says of half a pair, too
            why = "it ends in the middle, or a text in it has half of a surrogate pair, such as \\ud83d"
    except RecursionError:
        pass
    raise RequestError("invalid_json", f"cannot read this body as JSON: {why}")


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for values in inner for each in values]
        if not level:
            return False
    return True


def if_match(request: web.Request) -> str | None:
    """The revision that a write insists on; None for any.

    Raises:
        RequestError: `bad_request`, where it names several.

    """
    header = request.headers.get("If-Match", "*").strip()
    if header == "*":
        return None
    found = _ETAG.fullmatch(header)
    if found is None and len(_ETAG.findall(header)) > 1:
        raise RequestError("bad_request", "cannot read If-Match: name one revision, or * for any")
    return found[1] if found else header
